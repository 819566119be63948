"""Rows and pages where only a card shows it: graphs, waiting, sizes, numbers that lead nowhere."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from depth_steps import parts
from depth_steps import step_of_pages as step
from gpu_problem import DEVICE, DTYPES, need_memory

# tests/ops, which gpu_problem has put on the path
from depth_pages import Problem, ints, problem  # isort: skip

from gemma_ext.ops.depth_batching import kv_copy, paged_attn_mixed_depth, rope_kv_write


@pytest.fixture(autouse=True)
def allow_waiting_again() -> Iterator[None]:
    yield
    if DEVICE == "cuda":
        torch.cuda.set_sync_debug_mode("default")


def attend(p: Problem, **options):
    return paged_attn_mixed_depth(p.q, p.pool, *p.places(), **options)


@pytest.mark.card
def test_nothing_waits():
    given = parts(torch.bfloat16)
    step(*given)
    torch.cuda.set_sync_debug_mode("error")
    step(*given)


@pytest.mark.card
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_graphs_follow_what_the_device_holds(dtype):
    """One graph, other rows, positions, loops and pages at every replay."""
    p, k, v, rope, leave = parts(dtype)
    n = len(p.req)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step(p, k, v, rope, leave)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step(p, k, v, rope, leave)
    for seed in (1, 2, 3):
        other, *rest = parts(dtype, seed)
        fewer = len(other.req)
        p.req.fill_(-1)  # the graph has the rows of its capture
        for name in ("req", "pos", "loop", "q"):
            count = min(n, fewer)
            getattr(p, name)[:count] = getattr(other, name)[:count]
        for name in ("tables", "depth_of", "pool"):
            getattr(p, name).copy_(getattr(other, name))
        for mine, theirs in zip((k, v, rope, leave), rest, strict=True):
            mine[: min(n, len(theirs))] = theirs[: min(n, len(theirs))]
        pool = p.pool.clone()
        graph.replay()
        torch.cuda.synchronize()
        want = step(replace(p, pool=pool), k, v, rope, leave)
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)
        assert torch.equal(p.pool, pool)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_runs_agree_bit_by_bit(dtype):
    p, *_ = parts(dtype)
    first = attend(p, softcap=20.0)
    for _ in range(20):
        assert torch.equal(attend(p, softcap=20.0), first)


@pytest.mark.card
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_lead_nowhere_are_nan(dtype):
    rows = [(0, 8, 1), (9, 8, 0), (0, 8, 9), (0, 999, 0), (0, -1, 0), (0, 15, 0)]
    p = problem([9], rows, width=64, dtype=dtype).to(DEVICE)
    p.tables[0, 1] = 2**30
    out = attend(p)
    assert torch.equal(out[0], attend(p.rows([0]))[0])
    assert out[1:5].isnan().all()
    lost = replace(p, tables=torch.full_like(p.tables, -7))
    assert attend(lost).isnan().all()
    before = p.pool.clone()
    k = p.q[:, :2].contiguous()
    q = rope_kv_write(p.q, k, k, p.pool, lost.tables, *lost.places()[1:])
    assert q.isnan().all()
    kv_copy(p.pool, lost.tables, p.req, p.pos, p.loop, ints(0, 1, 2)[None].to(DEVICE))
    assert torch.equal(p.pool.nan_to_num(7.0), before.nan_to_num(7.0))


@pytest.mark.card
def test_pools_beyond_two_to_the_31():
    need_memory(12)
    p = problem([40], [(0, 39, 2), (0, 7, 0)], width=256, loops=3, dtype=torch.bfloat16)
    pages = (1 << 31) // (5 * 2 * 2 * 16 * 256) + 7
    pool = torch.empty(5, pages, 2, 2, 16, 256, dtype=torch.bfloat16, device="cuda")
    far = torch.arange(pages - p.pool.shape[1], pages)
    pool[:, far.cuda()] = p.pool.cuda()
    known = p.tables < 2**30
    moved = far[torch.where(known, p.tables, 0).long()].to(torch.int32)
    tables = torch.where(known, moved, p.tables)
    moved_far = replace(p, pool=pool, tables=tables).to("cuda")
    assert torch.equal(attend(moved_far), attend(p.to("cuda")))


@pytest.mark.card
@pytest.mark.parametrize("rows", [4, 300])
def test_long_requests(rows):
    """Launches that are cut by rows, and many splits, against float64."""
    length = 20_000
    chunk = [(0, length - rows + i, 0) for i in range(rows)]
    p = problem([64], [(0, 0, 0)] * rows, width=128, loops=1, dtype=torch.bfloat16)
    g = torch.Generator("cuda").manual_seed(0)
    shape = (1, -(-length // 16), 2, 2, 16, 128)
    pool = torch.randn(shape, generator=g, device="cuda").bfloat16()
    tables = torch.randperm(shape[1], generator=g, device="cuda").to(torch.int32)[None]
    req, pos, loop = (torch.tensor(c, dtype=torch.int32) for c in zip(*chunk, strict=True))
    p = replace(p, pool=pool, tables=tables, req=req, pos=pos, loop=loop, depth_of=ints(0))
    p = p.to("cuda")
    got = attend(p)
    for n in (0, rows - 1):
        kv = pool[0, tables[0].long()].double().permute(1, 2, 0, 3, 4).reshape(2, 2, -1, 128)
        k, v = kv[:, :, : int(pos[n]) + 1].repeat_interleave(2, 1)
        weights = torch.softmax(k @ p.q[n].double().unsqueeze(-1) * 128**-0.5, 1)
        want = (weights * v).sum(1)
        error = (got[n].double() - want).norm() / want.norm()
        assert error < 3 * 2.0**-8
