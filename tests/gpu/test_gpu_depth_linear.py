"""Linear layers, norms and head where only a card shows it: graphs, waiting, tiles, sizes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from depth_steps import VOCABULARY, layers, rows
from depth_steps import step_of_rows as step
from gpu_problem import DEVICE, DTYPES, need_memory

# tests/ops, which gpu_problem has put on the path
from depth_rows import offsets, projection, randn  # isort: skip

from gemma_ext.ops.depth_batching import (
    head_exit,
    make_shortlist,
    scatter_rms_norm,
    seg_depth_lora,
    shortlist_head,
)


@pytest.fixture(autouse=True)
def allow_waiting_again() -> Iterator[None]:
    yield
    if DEVICE == "cuda":
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.card
def test_nothing_waits():
    own = layers(torch.bfloat16)
    given = rows(torch.bfloat16, 20)
    step(own, *given)
    torch.cuda.set_sync_debug_mode("error")
    step(own, *given)


@pytest.mark.card
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_graphs_follow_what_the_device_holds(dtype):
    """One graph, other rows, segments, keys and thresholds at every replay."""
    own, given = layers(dtype), rows(dtype, 30)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step(own, *given)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step(own, *given)
    for seed in (1, 2, 3):
        for mine, theirs in zip(given, rows(dtype, 30, seed), strict=True):
            mine.copy_(theirs)
        bank = given[0].clone()
        graph.replay()
        torch.cuda.synchronize()
        want = step(own, bank, *given[1:])
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)
        assert torch.equal(given[0], bank)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_has_its_bits_in_every_tile(dtype):
    """1, 16, 17, 64, 65 and 200 rows take three kinds of tiles."""
    width = 328
    p = projection(200, width, 2, 24, bias=True, dtype=dtype, device=DEVICE)
    head = randn(VOCABULARY, width, seed=9, dtype=dtype).to(DEVICE)
    x = randn(200, width, dtype=dtype).to(DEVICE)
    keys = torch.arange(600, device=DEVICE).reshape(200, 3)

    def run(n):
        (y,) = seg_depth_lora(x[:n], [p], offsets(min(n, 3), max(n - 3, 0)).to(DEVICE))
        got = head_exit(x[:n], head, temperature=1.0, keys=keys[:n], candidates=9)
        return [y, *(t for t in got if t is not None)]

    want = run(200)
    for n in (1, 16, 17, 64, 65):
        for a, b in zip(run(n), want, strict=True):
            assert torch.equal(a, b[:n]), n


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_runs_agree_bit_by_bit(dtype):
    own = layers(dtype)
    first = step(own, *rows(dtype, 40))
    for _ in range(20):
        for a, b in zip(step(own, *rows(dtype, 40)), first, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_shortlist_is_its_head(dtype):
    """Rows near a token each, and rows that are near none: both kinds, and every tile of rows."""
    weight = randn(VOCABULARY, 256, seed=9, dtype=dtype).to(DEVICE) * 256**-0.5
    short = make_shortlist(weight)
    near = torch.linspace(0, 9, 70, device=DEVICE).unsqueeze(-1) * weight[:70].float()
    h = (randn(70, 256).to(DEVICE) + near).to(dtype)
    options = {"softcap": 30.0, "mode": "margin", "threshold": 0.3}
    for n in (1, 16, 70):
        got, want = shortlist_head(h[-n:], short, **options), head_exit(h[-n:], weight, **options)
        assert torch.equal(got.ids, want.ids)
        assert torch.equal(got.top, want.top[:, 0])
        assert torch.equal(got.exits, want.exits)
    assert 0 < int(got.certified.sum()) < 70


@pytest.mark.card
def test_slots_that_lead_nowhere_are_left_out():
    bank = torch.ones(3, 8, device=DEVICE)
    slots = torch.tensor([7, 1], dtype=torch.int32, device=DEVICE)
    got = scatter_rms_norm(bank, slots, torch.ones(2, 8, device=DEVICE), next_weight=bank[0] * 1)
    assert bank[:, 0].tolist() == [1, 2, 1]
    assert got[0].abs().max() == 0


@pytest.mark.card
def test_a_real_head():
    """Gemma's vocabulary at 128 rows against float32 logits on the card, 64-bit places."""
    need_memory(8)
    h = torch.randn(128, 2304, device=DEVICE).bfloat16()
    weight = torch.randn(256_000, 2304, device=DEVICE).bfloat16() * 2304**-0.5
    got = head_exit(h, weight, softcap=30.0, candidates=64)
    for at in range(0, 128, 32):
        part = slice(at, at + 32)
        s = 30 * torch.tanh(h[part].float() @ weight.float().T / 30)
        torch.testing.assert_close(got.lse[part], s.logsumexp(-1), rtol=0, atol=2e-3)
        torch.testing.assert_close(got.values[part], s.topk(64, -1).values, rtol=0, atol=5e-3)
    short = shortlist_head(h, make_shortlist(weight), softcap=30.0)
    assert torch.equal(short.ids, got.ids)
    assert torch.equal(short.top, got.top[:, 0])
