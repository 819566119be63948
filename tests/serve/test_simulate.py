"""The scheduler in simulated time against formulas, and against the paper's own numbers."""

import numpy as np
import pytest
import torch

from gemma_ext.serve.runner import Rows
from gemma_ext.serve.simulate import (
    A100,
    Workload,
    config_for,
    fixed,
    gemma_2b,
    ladder,
    paper_speedups,
    roofline,
    simulate,
)

FREE = {"prompts": False, "fills": False}


def rate(workload, width, mode):
    config = config_for(workload, width, mode=mode)
    return simulate(workload, config, *fixed(0.5), **FREE)["tokens_per_second"]


@pytest.mark.parametrize(("exits", "width"), [((0.8, 0.2), 16), ((0.5, 0.2, 0.3), 7), ((1.0,), 4)])
def test_throughput_is_that_of_the_formulas(exits, width):
    workload = Workload(exits, requests=20 * width, output=40)
    share = np.cumsum(exits)
    deepest = 1 + sum(1 - share[j] ** width for j in range(len(exits) - 1))
    for mode, loops in (("cdb", workload.mean_exit), ("csb", len(exits)), ("lockstep", deepest)):
        assert rate(workload, width, mode) == pytest.approx(width / (loops * 0.5), rel=0.02), mode


def test_a_static_batch_waits_for_its_longest_request():
    lengths = tuple(10 + 30 * (i % 4) for i in range(400))
    workload = Workload((0.0, 1.0), requests=400, output=lengths)
    config = config_for(workload, 8, mode="static", requests=8)
    static = simulate(workload, config, *fixed(1.0), **FREE)["tokens_per_second"]
    assert static == pytest.approx(8 / 2 * (np.mean(lengths) - 1) / (max(lengths) - 1), rel=0.02)


@pytest.mark.slow
def test_the_papers_own_simulation():
    """b = 43, 3000 requests, 0.8 leave after the first of two loops: 1.66 of 2 / 1.2, lock-step
    1.00 to 1.01, and 1.09 at b = 8."""
    workload = Workload((0.8, 0.2), requests=3000)
    found = paper_speedups(workload, 43)
    assert found["cdb"] == pytest.approx(5 / 3, abs=0.02)
    assert found["lockstep"] == pytest.approx(1.0, abs=0.015)
    narrow = paper_speedups(Workload((0.8, 0.2), requests=600), 8, modes=("lockstep",))
    assert narrow["lockstep"] == pytest.approx(2 / (2 - 0.8**8), abs=0.015)


@pytest.mark.parametrize(
    ("leave", "block_ms", "width", "paper"),
    [(0.81, 0.265, 43, 3159), (0.78, 0.265, 43, 3050), (0.69, 0.323, 41, 2357)],
)
def test_the_papers_throughput_from_its_times(leave, block_ms, width, paper):
    """Gemma, two loops, SlimPajama and RedPajama at r = 0, SlimPajama at r = 64: milliseconds per
    token and block, and the share that leaves early that its tokens per second imply."""
    workload = Workload((leave, 1 - leave), requests=20 * width, output=50)
    found = simulate(workload, config_for(workload, width), *fixed(block_ms * width / 1e3), **FREE)
    assert found["tokens_per_second"] == pytest.approx(paper, rel=0.03)


def test_outputs_of_one_token_have_no_rate():
    workload = Workload((0.8, 0.2), requests=5, output=1)
    config = config_for(workload, 4)
    found = simulate(workload, config, *fixed(1.0), **FREE)
    assert found["outputs"] == 5
    assert np.isnan(found["tokens_per_second"])
    assert np.isnan(found["busy"])
    assert np.isnan(paper_speedups(workload, 4)["cdb"])
    timed = simulate(workload, config, *fixed(1.0, head=0.5), **FREE)
    assert (timed["tokens_per_second"], timed["busy"]) == (0.0, 1.0)
    with pytest.raises(ValueError, match=r"^output: expected more than one token, got 1"):
        ladder(workload, 4, 2, A100)


def test_rooflines_of_gemma():
    """18,432 bytes of KV a token; the head is 0.53 of a block of 9 layers; 2.5 ms for the weights
    of a token on an A100."""
    shape = gemma_2b(2)
    assert 2 * shape.kv == 18432
    assert shape.head / shape.block == pytest.approx(0.53, abs=0.005)
    assert 2 * 2 * shape.block / A100.bandwidth == pytest.approx(2.5e-3, rel=0.03)
    adapters = gemma_2b(2, 512).adapters
    assert adapters / shape.block == pytest.approx(0.306, abs=0.02)
    _, head = roofline(shape, A100)
    assert head(1) == pytest.approx(2 * shape.head / A100.bandwidth)
    assert head(10**6) == pytest.approx(2e6 * shape.head / A100.peak)


def test_a_block_reads_its_weights_the_adapters_of_its_loops_and_every_key():
    block, _ = roofline(gemma_2b(2, 64), A100)
    shape = gemma_2b(2, 64)
    rows = Rows(
        *(torch.tensor(x, dtype=torch.int32) for x in ([0, 1, 2], [9, 5, 3], [0, 1, 2], [0, 0, 1])),
        torch.tensor([0, 2, 3], dtype=torch.int32), torch.zeros(3), torch.zeros(3, 1),
    )  # fmt: skip
    moved = 2 * (shape.block + 2 * shape.adapters) + shape.kv * (10 + 6 + 4)
    assert block(rows) == pytest.approx(moved / A100.bandwidth)
    deep = rows._replace(seg_offsets=torch.tensor([0, 0, 3], dtype=torch.int32))
    assert block(rows) - block(deep) == pytest.approx(2 * shape.adapters / A100.bandwidth)
    chunk = rows._replace(req=torch.tensor([0, 0, 0], dtype=torch.int32))  # two rows at loop 0
    assert block(rows) - block(chunk) == pytest.approx(shape.kv * 6 / A100.bandwidth)


def test_every_cost_that_comes_back_takes_some_of_the_gain():
    workload = Workload((0.8, 0.2), requests=60, prompt=64, output=48)
    rungs = dict(ladder(workload, 8, 2, A100, rank=64))
    values = list(rungs.values())
    assert values[0] == pytest.approx(5 / 3, rel=0.06)
    assert rungs["depth LoRA of rank 64"] < values[0]
    assert rungs["head after every step"] < rungs["head for 8 tokens at a time"]
    assert rungs["keys and values of skipped loops"] <= rungs["head for 8 tokens at a time"]
    assert 1 < rungs["prompts"] < values[0]
