"""What an engine with exits equals at either end of the threshold, and where policies agree."""

import copy
import json
from functools import cache

import pytest
import torch
from serve_driver import Driver, keys
from serve_tiny import OPTIONS, VOCABULARY, WINDOW, Double, tiny
from toy_models import drain

from gemma_ext.nn.recursive import merged
from gemma_ext.serve.config import EngineConfig
from gemma_ext.serve.engine import Engine
from gemma_ext.serve.exits import ExitTest
from gemma_ext.serve.protocol import Request, SamplingParams
from gemma_ext.serve.runner import ModelRunner, Sizes
from gemma_ext.serve.trace import Trace, to_chrome
from gemma_ext.serve.weights import read_weights

NEVER, ALWAYS = 2.0, 0.0  # of max_prob
COUNT = 14
SIZES = Sizes(requests=4, slots=96, pages=24, max_length=64)
# a head of its own: the tied one repeats the last token whatever the keys
OWN_HEAD = {"tie_word_embeddings": False}
MODELS = [("Gemma2", 2), ("Qwen3", 3)]


def prompts() -> list[tuple[int, ...]]:
    random = torch.Generator().manual_seed(4)
    return [
        tuple(torch.randint(VOCABULARY, (length,), generator=random).tolist())
        for length in (1, 6, 19)
    ]


def served(model, threshold: float, policy: str, routing: str, **params):
    config = EngineConfig(
        width=2, max_model_len=64, prefill_tokens=16, kv_policy=policy, routing=routing, verify=True
    )
    engine = Engine.of_model(model, config, exits=ExitTest("max_prob", threshold=threshold))
    asked = SamplingParams(max_tokens=COUNT, temperature=0.0, **params)
    ids = [engine.submit(Request(prompt, asked)) for prompt in prompts()]
    found = drain(engine)
    return [found[id][:2] for id in ids]


def checkpoint(model):
    """Merged to vanilla; scales and angles of these models are float32 numbers in float64."""
    made = merged(model)
    for mine, own in zip(made.buffers(), model.buffers(), strict=True):
        mine.data = own.data.clone()
    return made


def greedy(model, prompt: tuple[int, ...], count: int) -> list[int]:
    """Of the modules of transformers, without caches, and without anything of this package."""
    ids = list(prompt)
    with torch.no_grad(), Double():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def first_layers(model, count: int):
    """An ordinary model of the first layers."""
    cut = copy.deepcopy(model)
    cut.config.num_hidden_layers = count
    cut.config.layer_types = cut.config.layer_types[:count]
    cut.model.layers = cut.model.layers[:count]
    return cut


@pytest.mark.parametrize("order", ["cycle", "middle-cycle", "sequence"])
@pytest.mark.parametrize("name", OPTIONS)
def test_the_merged_checkpoint_has_the_logits_of_the_runtime(name, order):
    """Beyond the windows, and to the rounding of float64, which the modules alone do not keep."""
    layers = {"layer_types": ["sliding_attention", "full_attention"] * 3}
    windows = layers if name in ("Gemma2", "Gemma3Text") else {}
    model = tiny(name, loops=2, rank=3, layers=6, order=order, **windows)
    ids = torch.randint(VOCABULARY, (2, 4 * WINDOW), generator=torch.Generator().manual_seed(2))
    vanilla = checkpoint(model)
    with torch.no_grad(), Double():
        own, other = (m(ids, use_cache=False).logits for m in (model, vanilla))
    torch.testing.assert_close(other, own, rtol=1e-11, atol=1e-11)


@cache
def wanted(name: str, loops: int):
    """A model, and for each prompt the tokens of its merged checkpoint, of the ordinary model of
    the first loop alone, and of that one behind the first token of the checkpoint."""
    model = tiny(name, loops=loops, rank=3, layers=6, **OWN_HEAD)
    vanilla = checkpoint(model)
    first = first_layers(vanilla, 6 // loops)
    full = [greedy(vanilla, prompt, COUNT) for prompt in prompts()]
    alone = [greedy(first, prompt, COUNT) for prompt in prompts()]
    behind = [
        greedy(first, (*prompt, tokens[0]), COUNT - 1)
        for prompt, tokens in zip(prompts(), full, strict=True)
    ]
    return model, full, alone, behind


@pytest.mark.parametrize("routing", ["host", "device"])
@pytest.mark.parametrize("policy", ["exact_lazy", "exact_eager", "propagate"])
@pytest.mark.parametrize(("name", "loops"), MODELS)
def test_where_nothing_leaves_it_is_the_merged_checkpoint(name, loops, policy, routing):
    model, full, _, _ = wanted(name, loops)
    found = served(model, NEVER, policy, routing)
    assert found == [(tokens, [loops] * COUNT) for tokens in full]


@pytest.mark.parametrize("routing", ["host", "device"])
@pytest.mark.parametrize("policy", ["exact_lazy", "exact_eager"])
@pytest.mark.parametrize(("name", "loops"), MODELS)
def test_where_all_leave_at_once_it_is_a_model_of_the_first_loop(name, loops, policy, routing):
    """Stored layers with the matrices of loop 1; a prompt's own token is read after all loops."""
    model, full, alone, behind = wanted(name, loops)
    assert alone != full
    found = served(model, ALWAYS, policy, routing)
    depths = [loops] + [1] * (COUNT - 1)
    assert found == [([f[0], *b], depths) for f, b in zip(full, behind, strict=True)]
    bounded = served(model, NEVER, policy, routing, max_loops=1)
    assert bounded == [(tokens, [1] * COUNT) for tokens in alone]


def replayed(model, policy: str, depths: list[list[int]]):
    """Keys and values of every loop, with those that skipped loops are owed."""
    runner = ModelRunner(read_weights(model), SIZES, policy=policy)
    driver = Driver(runner, 3, depths)
    asked = [Request(prompt, SamplingParams(max_tokens=COUNT)) for prompt in prompts()]
    jobs = driver.run(asked)
    for job in jobs:
        driver.fill(job)
    return jobs, [keys(driver, job.row, len(job.tokens) - 1) for job in jobs]


@pytest.mark.parametrize("name", ["Gemma2", "Llama"])
def test_policies_agree_where_a_block_changes_nothing(name):
    """Its states are fixed points and its keys those of any loop, but for attention types."""
    depths = torch.randint(1, 4, (3, COUNT), generator=torch.Generator().manual_seed(5))
    depths[:, 0] = 3
    model = tiny(name, loops=3, rank=0, layers=6, **OWN_HEAD)
    for still in (False, True):
        if still:
            for layer in model.model.layers:
                torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
                torch.nn.init.zeros_(layer.mlp.down_proj.weight)
        jobs, exact = replayed(model, "exact_lazy", depths.tolist())
        for policy in ("exact_eager", "propagate", "copy"):
            others, found = replayed(model, policy, depths.tolist())
            agree = [
                torch.allclose(a, b, rtol=1e-12, atol=1e-12)
                for a, b in zip(exact, found, strict=True)
            ]
            assert all(agree) == (still or policy == "exact_eager"), (policy, still)
            if still or policy == "exact_eager":
                assert [job.tokens for job in others] == [job.tokens for job in jobs]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "loops"), MODELS)
def test_filled_keys_have_the_bits_of_a_full_pass(name, loops, dtype):
    """So that a request which is computed again, or shares pages, goes on as it would have."""
    model = tiny(name, loops=loops, rank=3, layers=6, dtype=dtype, **OWN_HEAD)
    depths = torch.randint(1, loops + 1, (3, COUNT), generator=torch.Generator().manual_seed(6))
    depths[:, 0] = loops
    jobs, found = replayed(model, "exact_lazy", depths.tolist())
    assert any(depth < loops for job in jobs for depth in job.depths)
    again = Driver(ModelRunner(read_weights(model), SIZES), 8, whole_prompts=True)
    for job, mine in zip(jobs, found, strict=True):
        written = job.tokens[:-1]
        again.admit(job.row, Request(tuple(written), SamplingParams(max_tokens=1)))
        assert torch.equal(keys(again, job.row, len(written)), mine)


def test_a_device_that_routes_is_traced(tmp_path):
    model = tiny("Llama", loops=2, rank=3, layers=4)
    config = EngineConfig(width=2, max_model_len=64, routing="device")
    with (tmp_path / "trace.jsonl").open("w") as file:
        engine = Engine.of_model(model, config, trace=Trace(file))
        engine.submit(Request((1, 2, 3), SamplingParams(max_tokens=6, temperature=0.0)))
        drain(engine)
    lines = [json.loads(line) for line in (tmp_path / "trace.jsonl").read_text().splitlines()]
    ticks = [line for line in lines if line["stage"] == "tick"]
    assert len(ticks) == engine.router.ticks > 0
    assert sum(line["rows"] for line in lines if line["stage"] == "block") == 2 * 3
    to_chrome(tmp_path / "trace.jsonl", tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert sum(event["ph"] == "X" for event in events) == len(lines)
