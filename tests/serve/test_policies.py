"""Policies of skipped loops against one request at a time with K and V in lists."""

import pytest
import torch
from policy_oracle import Oracle
from serve_driver import Driver
from serve_tiny import VOCABULARY, Double, tiny

from gemma_ext.serve.policies import POLICIES, pool_depths
from gemma_ext.serve.protocol import Request, SamplingParams
from gemma_ext.serve.runner import ModelRunner, Sizes
from gemma_ext.serve.weights import read_weights

SIZES = Sizes(requests=4, slots=64, pages=24, max_length=64)
FULL = ["full_attention"] * 6
# a head of its own: the tied one repeats the last token whatever the keys
SHAPE = {"loops": 3, "rank": 3, "layers": 6, "seed": 8, "tie_word_embeddings": False}
CASES = [
    *((policy, 1) for policy in POLICIES if policy not in ("first_then_shared", "modulo")),
    ("first_then_shared", 1),
    ("modulo", 2),
]


def replayed(seed: int, count: int = 10) -> tuple[list[Request], list[list[int]]]:
    random = torch.Generator().manual_seed(seed)
    requests = [
        Request(
            tuple(torch.randint(VOCABULARY, (length,), generator=random).tolist()),
            SamplingParams(max_tokens=count, temperature=0.0),
        )
        for length in (6, 1, 9)
    ]
    depths = torch.randint(1, 4, (3, count), generator=random)
    depths[:, 0] = 3
    return requests, depths.tolist()


@pytest.mark.parametrize(("policy", "keep"), CASES)
def test_tokens_are_those_of_one_request_at_a_time(policy, keep):
    windows = {"layer_types": FULL} if policy == "active_only" else {}
    model = tiny("Gemma2", **SHAPE, **windows)
    requests, depths = replayed(1)
    with Double():
        wanted = [
            Oracle(model, policy, keep).decode(list(request.prompt), own)
            for request, own in zip(requests, depths, strict=True)
        ]
    for seed in range(2):
        runner = ModelRunner(read_weights(model), SIZES, policy=policy, keep=keep)
        driver = Driver(runner, seed, depths, whole_prompts=True)
        jobs = driver.run(requests)
        assert [job.tokens[len(job.request.prompt) :] for job in jobs] == wanted
        assert [job.depths for job in jobs] == depths


def test_policies_differ():
    model = tiny("Gemma2", **SHAPE, layer_types=FULL)
    requests, depths = replayed(1)
    prompt = list(requests[0].prompt)
    with Double():
        outputs = {case: tuple(Oracle(model, *case).decode(prompt, depths[0])) for case in CASES}
    assert outputs["exact_lazy", 1] == outputs["exact_eager", 1]
    assert len(set(outputs.values())) > 4


def test_places_in_the_pool():
    weights = read_weights(tiny("Gemma2", loops=2, rank=0, layers=6, order="middle-cycle"))
    own = pool_depths(weights, "exact_lazy")
    assert [x.tolist() for x in (*own.prelude, *own.block, *own.coda)] == [
        [0, 0], [1, 3], [2, 4], [5, 5],
    ]  # fmt: skip
    assert own.count == 6
    weights = read_weights(tiny("Gemma2", loops=3, rank=0, layers=6))
    assert pool_depths(weights, "single").count == 2
    assert pool_depths(weights, "first_then_shared", 1).rows.tolist() == [[0, 2, 2], [1, 3, 3]]
    assert pool_depths(weights, "modulo", 2).rows.tolist() == [[0, 2, 0], [1, 3, 1]]


def test_refusals():
    weights = read_weights(tiny("Gemma2", loops=2, rank=0))
    with pytest.raises(ValueError, match=r"^policy: expected one of exact_lazy, .* got 'magic'"):
        pool_depths(weights, "magic")
    with pytest.raises(ValueError, match=r"^policy: expected a model without attention windows"):
        pool_depths(weights, "active_only")
    weights = read_weights(tiny("Gemma2", loops=2, rank=0, layers=6, order="middle-cycle"))
    with pytest.raises(ValueError, match=r"^policy: expected a model without layers behind its"):
        pool_depths(weights, "copy")
