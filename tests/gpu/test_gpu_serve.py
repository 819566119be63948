"""The model step of the serving engine on a card: graphs of the block, rows of every kind."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from gpu_problem import DEVICE

pytest.importorskip("transformers")
sys.path.append(str(Path(__file__).parents[1] / "serve"))
from serve_driver import Driver, keys  # isort: skip
from serve_tiny import VOCABULARY, tiny  # isort: skip

from gemma_ext.serve.exits import ExitTest
from gemma_ext.serve.protocol import Request, SamplingParams
from gemma_ext.serve.runner import ModelRunner, Sizes
from gemma_ext.serve.weights import read_weights

SIZES = Sizes(requests=4, slots=64, pages=24, max_length=64)
WAYS = (
    {"temperature": 0.0, "logprobs": 3},
    {"temperature": 1.5, "logprobs": 0},
    {"temperature": 2.0, "top_p": 0.9, "logprobs": 20},
    {"temperature": 1.0, "presence_penalty": 1.0, "min_p": 0.01, "logit_bias": ((3, 2.0),)},
)


def requests() -> list[Request]:
    random = torch.Generator().manual_seed(2)
    return [
        Request(
            tuple(torch.randint(VOCABULARY, (5 + 3 * i,), generator=random).tolist()),
            SamplingParams(max_tokens=10, seed=i, **own),
        )
        for i, own in enumerate(WAYS)
    ]


def served(model, seed: int, device: str = DEVICE, dtype: torch.dtype | None = None, **options):
    weights = read_weights(model, device=device, dtype=dtype)
    driver = Driver(ModelRunner(weights, SIZES, **options), seed)
    return driver, driver.run(requests())


EXITS = [
    ExitTest("max_prob", threshold=0.3),
    ExitTest("entropy", threshold=2.0),
    ExitTest("kl", threshold=0.3),
    ExitTest("argmax", threshold=1),
    ExitTest("latent_diff", threshold=0.6),
    ExitTest("hazard", threshold=0.7, weight=torch.full((32,), 0.05), bias=-0.1),
    ExitTest("preloop", threshold=0.6, weight=torch.full((3, 32), 0.05)),
]


@pytest.mark.parametrize("exits", EXITS, ids=lambda test: test.name)
def test_tokens_and_exits_are_those_of_the_cpu(exits):
    model = tiny("Gemma2", loops=3, rank=3, layers=6, seed=5, dtype=torch.float32)
    _, jobs = served(model, 1, exits=exits)
    _, own = served(model, 2, "cpu", exits=exits)
    assert [job.tokens for job in jobs] == [job.tokens for job in own]
    assert [job.depths for job in jobs] == [job.depths for job in own]
    for job, other in zip(jobs, own, strict=True):
        for (mine, i), (its, j) in zip(job.sampled, other.sampled, strict=True):
            if job.request.params.logprobs is not None:
                # products of float32 are split on a card: 2^-16 each, 18 layers of 7 and the head
                torch.testing.assert_close(mine.logprobs[i], its.logprobs[j], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("policy", ["exact_lazy", "propagate", "copy", "modulo", "single"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graphs_give_the_bits_of_single_launches(policy, dtype):
    model = tiny("Gemma2", loops=2, rank=3, dtype=dtype)
    for exits in (ExitTest("entropy", threshold=2.5), ExitTest("cosine", threshold=0.8)):
        given = {"exits": exits, "policy": policy, "keep": 2}
        (plain, jobs), (captured, others) = (
            served(model, 1, graphs=graphs, **given) for graphs in (False, True)
        )
        for job, other in zip(jobs, others, strict=True):
            assert (job.tokens, job.depths) == (other.tokens, other.depths)
            count = len(job.tokens) - 1
            assert torch.equal(keys(plain, job.row, count), keys(captured, other.row, count))


@pytest.mark.parametrize("name", ["Gemma", "Gemma3Text", "Llama", "Qwen2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_schedules_give_the_same_tokens(name, dtype):
    model = tiny(name, loops=2, rank=2, dtype=dtype)
    first = [job.tokens for job in served(model, 1)[1]]
    assert [job.tokens for job in served(model, 2)[1]] == first


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_shortlist_changes_no_token(dtype):
    model = tiny("Gemma2", loops=2, rank=2, dtype=dtype)
    whole, short = (served(model, 1, shortlist=given)[1] for given in (False, True))
    assert [job.tokens for job in short] == [job.tokens for job in whole]


def test_layers_in_front_of_and_behind_the_loops():
    model = tiny("Gemma2", loops=2, rank=3, layers=6, order="middle-cycle", dtype=torch.float32)
    exits = ExitTest("max_prob", threshold=0.3)
    _, jobs = served(model, 3, exits=exits)
    _, own = served(model, 3, "cpu", exits=exits)
    assert [job.tokens for job in jobs] == [job.tokens for job in own]
