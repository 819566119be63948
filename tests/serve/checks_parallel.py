"""Checks that every rank of a group runs: the tokens of one process."""

import torch
import torch.distributed as dist
from serve_driver import Driver
from serve_tiny import VOCABULARY, tiny

from gemma_ext.serve.config import EngineConfig
from gemma_ext.serve.engine import Engine
from gemma_ext.serve.exits import ExitTest
from gemma_ext.serve.parallel import Leader, ShardedRunner, follow, shard_weights
from gemma_ext.serve.protocol import Request, SamplingParams
from gemma_ext.serve.runner import ModelRunner, Sizes
from gemma_ext.serve.weights import read_weights

SIZES = Sizes(requests=4, slots=64, pages=24, max_length=64)
SETTINGS = (
    {"temperature": 0.0, "logprobs": 3},
    {"temperature": 1.5, "seed": 4, "logprobs": 0},
    {"temperature": 2.0, "top_p": 0.9, "seed": 5, "logprobs": 20},
    {"temperature": 1.0, "presence_penalty": 1.0, "logit_bias": ((3, 2.0),), "seed": 6},
)


def requests() -> list[Request]:
    random = torch.Generator().manual_seed(2)
    return [
        Request(
            tuple(torch.randint(VOCABULARY, (5 + i,), generator=random).tolist()),
            SamplingParams(max_tokens=6, **own),
        )
        for i, own in enumerate(SETTINGS)
    ]


def assert_tokens_of_one_process(rank, world, model, **options):
    weights = read_weights(model)
    group = dist.group.WORLD
    runner = ShardedRunner(shard_weights(weights, rank, world), SIZES, group, **options)
    if rank:
        follow(runner, group)
        return
    leader = Leader(runner, group)
    try:
        jobs = Driver(leader, 3).run(requests())
    finally:
        leader.stop()
    alone = Driver(ModelRunner(weights, SIZES, **options), 5).run(requests())
    assert [job.tokens for job in jobs] == [job.tokens for job in alone]
    assert [job.depths for job in jobs] == [job.depths for job in alone]
    for job, other in zip(jobs, alone, strict=True):
        asked = job.request.params.logprobs
        for (mine, i), (its, j) in zip(job.sampled, other.sampled, strict=True):
            if asked is not None:
                torch.testing.assert_close(mine.logprobs[i], its.logprobs[j])
                assert mine.top_ids[i, :asked].tolist() == its.top_ids[j, :asked].tolist()
                torch.testing.assert_close(
                    mine.top_logprobs[i, :asked], its.top_logprobs[j, :asked]
                )


def check_exits_on_the_head(rank, world):
    model = tiny("Gemma2", loops=3, rank=3, layers=6, seed=5)
    for name, threshold in (("max_prob", 0.3), ("kl", 0.3)):
        exits = ExitTest(name, threshold=threshold)
        assert_tokens_of_one_process(rank, world, model, exits=exits)


def check_bias_and_norms_of_heads(rank, world):
    for name in ("Qwen2", "Gemma3Text"):
        model = tiny(name, loops=2, rank=2, num_key_value_heads=4)
        exits = ExitTest("latent_diff", threshold=0.7)
        assert_tokens_of_one_process(rank, world, model, exits=exits)


def check_one_head_of_keys_is_on_every_rank(rank, world):
    model = tiny("Gemma", loops=2, rank=2, num_key_value_heads=1)
    exits = ExitTest("margin", threshold=0.15)
    assert_tokens_of_one_process(rank, world, model, exits=exits, policy="propagate")


def check_middle_cycle_with_an_exit_head(rank, world):
    from gemma_ext.nn.recursive import ExitHead

    model = tiny("Gemma2", loops=2, rank=3, layers=6, order="middle-cycle")
    model.exit_head = ExitHead(model.lm_head.weight, rank=4)
    with torch.no_grad():
        model.exit_head.lora_A.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
        model.exit_head.lora_B.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    exits = ExitTest("max_prob", threshold=0.4)
    assert_tokens_of_one_process(rank, world, model, exits=exits)


def check_a_request_that_cannot_begin(rank, world):
    """Fails on every rank, and none of them goes."""
    runner = ShardedRunner(
        shard_weights(read_weights(tiny("Gemma2")), rank, world), SIZES, dist.group.WORLD
    )
    if rank:
        follow(runner, dist.group.WORLD)
        return
    leader = Leader(runner, dist.group.WORLD)
    config = EngineConfig(
        width=4, requests=4, max_model_len=64, pages=24, backlog=4, prefill_tokens=16
    )
    engine = Engine(leader, config)
    bad = Request((1,), SamplingParams(max_tokens=2))
    object.__setattr__(bad.params, "seed", 2**70)  # more than the protocol lets through
    try:
        ids = [engine.submit(bad), *map(engine.submit, requests())]
        events = []
        while engine.has_work():
            events += engine.step()
    finally:
        leader.stop()
    ends = {event.request: event.finish_reason for event in events if event.finish_reason}
    assert [ends[id] for id in ids] == ["error", *["length"] * len(SETTINGS)]


def check_prefixes(rank, world):
    from gemma_ext.nn.recursive import add_prefixes

    model = add_prefixes(tiny("Gemma2", loops=2, rank=2), 3)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.prefix.normal_(generator=torch.Generator().manual_seed(3))
    config = EngineConfig(
        width=4, requests=4, max_model_len=64, pages=24, backlog=4, prefill_tokens=16
    )
    exits = ExitTest("max_prob", threshold=0.12)

    def told(runner):
        engine = Engine(runner, config)
        ids, tokens = list(map(engine.submit, requests())), {}
        while engine.has_work():
            for event in engine.step():
                tokens.setdefault(event.request, []).append(event.token)
        return [[(token.id, token.exit_depth) for token in tokens[id]] for id in ids]

    weights = read_weights(model)
    runner = ShardedRunner(
        shard_weights(weights, rank, world), config.sizes, dist.group.WORLD, exits=exits
    )
    if rank:
        follow(runner, dist.group.WORLD)
        return
    leader = Leader(runner, dist.group.WORLD)
    try:
        found = told(leader)
    finally:
        leader.stop()
    assert found == told(ModelRunner(weights, config.sizes, exits=exits))


check_a_request_that_cannot_begin.worlds = check_prefixes.worlds = (2,)
check_bias_and_norms_of_heads.worlds = check_middle_cycle_with_an_exit_head.worlds = (2,)
