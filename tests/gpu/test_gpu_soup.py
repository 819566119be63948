"""Souping where only a card shows it: sizes, streams, graphs, waiting."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from gpu_problem import DEVICE, DTYPES, need_memory
from soup_digest import results
from soup_problem import assert_same_bits, models

from gemma_ext.ops.souping import Magnitudes, Mask, Part, Rule, merge_, soup_

WEIGHTS = [0.3, -0.7, 1.1]
TIES = Rule("sum", combine="weighted_mean")


@pytest.fixture(autouse=True)
def allow_waiting_again() -> Iterator[None]:
    yield
    if DEVICE == "cuda":
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_op_has_the_bits_of_the_cpu(dtype):
    want, found = results(dtype), results(dtype, DEVICE)
    assert [name for name in want if not torch.equal(want[name], found[name])] == []


def trimmed(part: Part) -> Mask:
    magnitudes = Magnitudes(len(part.sources))
    for _ in range(2):
        magnitudes.survey([part])
        magnitudes.settle(part.base.numel() // 5)
    return Mask(magnitudes.cut().fresh(), None, 0.9)


def test_runs_agree_bit_by_bit():
    """Blocks race for chunks and look back at each other, and no order shows."""
    part = models((1500, 1031), 3, device=DEVICE)
    mask = trimmed(part)
    first = None
    for _ in range(20):
        fresh = Mask(mask.keep.fresh(), None, mask.density)
        merge_([part], TIES, WEIGHTS, mask=fresh, rounding="stochastic")
        first = part.out.clone() if first is None else first
        assert_same_bits(part.out, first)


@pytest.mark.card
def test_more_than_two_to_the_31_elements():
    need_memory(40)
    n = 2**31 + 4099
    g = torch.Generator("cuda").manual_seed(1)
    base = torch.randn(n, generator=g, device="cuda", dtype=torch.bfloat16)
    x = base + 1e-2
    part = Part([x, base], base, torch.empty_like(base), "long")
    soup_([part], [0.7, 0.1], rounding="stochastic", seed=3)
    outs = [part.out[-70_000:].cpu()]
    merge_([part], Rule(), 0.5, mask=Mask(density=0.5), seed=4)
    outs.append(part.out[-70_000:].cpu())
    tail = [t[-70_000:].cpu() for t in (x, base)]
    last = Part(tail, tail[1], torch.empty_like(tail[1]), "long", n - 70_000)
    soup_([last], [0.7, 0.1], rounding="stochastic", seed=3)
    assert_same_bits(last.out, outs[0])
    merge_([last], Rule(), 0.5, mask=Mask(density=0.5), seed=4)
    assert_same_bits(last.out, outs[1])


@pytest.mark.card
def test_inputs_made_on_a_side_stream():
    part = models((700, 1031), 3, device="cuda")
    soup_([part], WEIGHTS)
    want, late = part.out.clone(), part.sources[0].clone()
    part.sources[0].zero_()
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # about 30 ms: another stream would overtake
        part.sources[0].copy_(late)
        soup_([part], WEIGHTS)
        found = part.out.clone()
    side.synchronize()
    assert_same_bits(found, want)


@pytest.mark.card
def test_a_captured_merge_replays_on_new_values():
    part, other = (
        models((300, 1031), 3, device="cuda"),
        models((300, 1031), 3, device="cuda", seed=1),
    )
    soup_([part], WEIGHTS, scale=0.5)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        soup_([part], WEIGHTS, scale=0.5)
        merge_([Part(part.sources, part.base, part.out)], TIES, WEIGHTS, mask=Mask(density=0.4))
    for x, y in zip((*part.sources, part.base), (*other.sources, other.base), strict=True):
        x.copy_(y)
    part.out.zero_()
    graph.replay()
    merge_([Part(other.sources, other.base, other.out)], TIES, WEIGHTS, mask=Mask(density=0.4))
    assert_same_bits(part.out, other.out)


@pytest.mark.card
def test_a_table_too_large_for_a_graph_is_refused():
    part = models((70_000, 2), 3, device="cuda")
    rows = torch.rand(70_000, 3)
    soup_([part], rows, rows=True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="captur"), torch.cuda.graph(graph):
        soup_([part], rows, rows=True)


@pytest.mark.card
def test_nothing_waits():
    part = models((300, 1031), 3, device="cuda")
    mask = trimmed(part)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    soup_([part], WEIGHTS, rounding="stochastic")
    merge_([part], TIES, WEIGHTS, mask=mask)
