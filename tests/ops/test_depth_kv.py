"""K and V into pages, and those of loops that a token has skipped."""

from __future__ import annotations

import pytest
import torch
from depth_pages import DEVICES, DTYPES, EPS, IDS, IMPLS, ints, mixed, problem

from gemma_ext.ops.depth_batching import (
    PAGE,
    kv_copy,
    kv_depths,
    rope_kv_write,
    rope_table,
    unfilled,
)
from gemma_ext.testing import assert_close

LENGTHS = [1, 33, 60]


def distinct(rows):
    """One row a position, as a step has them."""
    found = {(r, t): (r, t, j) for r, t, j in rows if r >= 0}
    return [(-1, 0, 0), *found.values(), (-1, 99, 77)]


def given(heads=(4, 2), width=32, dtype=torch.float32, half=None, settings=2, seed=0):
    """(problem, k, v, rope) of rows at three loops."""
    p = problem(LENGTHS, distinct(mixed(LENGTHS, 3, 30, 2)), heads=heads, width=width, dtype=dtype)
    p.pool.fill_(float("nan"))
    g = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, len(p.req), heads[1], width, generator=g).to(dtype)
    half = width // 2 if half is None else half
    frequencies = torch.rand(settings, half, generator=g)
    return p, k, v, torch.stack([rope_table(f, 64) for f in frequencies])


def write(p, k, v, pool, **options):
    return rope_kv_write(p.q, k, v, pool, *p.places(), **options)


def token(pool, p, n):
    """[2, n_kv, hd] of row n."""
    page = p.tables[p.req[n], p.pos[n] // PAGE]
    return pool[p.depth_of[p.loop[n]], page, :, :, p.pos[n] % PAGE]


def by_hand(x, norm, eps, plus_one, table):
    """One head in float64: x [hd], table [2, H]."""
    x = x.double()
    if norm is not None:
        x = x / (x.square().mean() + eps).sqrt() * (norm.double() + plus_one)
    half = table.shape[1]
    turned = torch.complex(x[:half], x[half : 2 * half]) * torch.complex(*table.double())
    return torch.cat([turned.real, turned.imag, x[2 * half :]])


def rounding(dtype):
    """One rounding to 16 bits; in float32 those of a head: 6 units of the sum of 80 squares, 2 of
    its inverse root, 3 of the products, 3 of the rotation."""
    return max(4 * EPS[dtype], 16 * EPS[torch.float32])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("norm", ["none", "shared", "by loop"])
@pytest.mark.parametrize("shape", [((4, 2), 32, None), ((3, 3), 80, 10), ((8, 1), 37, 18)])
@pytest.mark.parametrize("impl", IMPLS)
def test_matches_the_formula(impl, shape, norm, dtype, device):
    heads, width, half = shape
    p, k, v, rope = given(heads, width, dtype, half)
    weights = {"none": None, "shared": torch.randn(2, width), "by loop": torch.randn(2, 3, width)}
    q_norm, k_norm = weights[norm] if norm != "none" else (None, None)
    moved = [x if x is None else x.to(device) for x in (k, v, p.pool, rope, q_norm, k_norm)]
    k_, v_, pool, rope_, q_norm_, k_norm_ = moved
    mark = torch.zeros(p.pool.shape[1], PAGE, dtype=torch.uint8, device=device)
    got = rope_kv_write(
        p.q.to(device), k_, v_, pool, *p.to(device).places(),
        rope=rope_, rope_of=ints(1, 0, 1).to(device), q_norm=q_norm_, k_norm=k_norm_, eps=1e-3,
        plus_one=norm == "shared", fill_mark=mark, impl=impl,
    )  # fmt: skip
    untouched = torch.ones(pool.shape, dtype=torch.bool)
    marks = torch.zeros(mark.shape, dtype=torch.uint8)
    for n, (r, t, j) in enumerate(p.columns()):
        if r < 0:
            assert torch.equal(got[n], torch.zeros_like(got[n]))
            continue

        def want(x, weight, j=j, t=t):
            own = weight if weight is None or weight.dim() == 1 else weight[j]
            table = rope[(1, 0, 1)[j], t]
            return torch.stack([by_hand(h, own, 1e-3, norm == "shared", table) for h in x])

        wanted = want(p.q[n], q_norm), want(k[n], k_norm)
        stored = token(pool.cpu(), p, n)
        limit = rounding(dtype)
        assert_close(got[n], wanted[0], rel=limit)
        assert_close(stored[0], wanted[1], rel=limit)
        assert torch.equal(stored[1], v[n])
        page = p.tables[r, t // PAGE]
        untouched[p.depth_of[j], page, :, :, t % PAGE] = False
        marks[page, t % PAGE] = j + 1
    assert pool.cpu()[untouched].isnan().all()
    assert torch.equal(mark.cpu(), marks)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
def test_bits_do_not_depend_on_the_rows_beside(dtype, device):
    p, k, v, rope = (x.to(device) for x in given(dtype=dtype))
    norm = torch.randn(32, device=device)
    options = {"rope": rope, "q_norm": norm, "k_norm": norm}
    whole, one = p.pool.clone(), p.pool.clone()
    got = write(p, k, v, whole, **options)
    for n in torch.randperm(len(p.req)).tolist():
        row = p.rows([n])
        alone = write(row, k[n : n + 1], v[n : n + 1], one, **options)
        assert torch.equal(alone[0], got[n])
    assert torch.equal(whole.nan_to_num(7.0), one.nan_to_num(7.0))


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_of_a_fused_projection(impl):
    p, k, v, rope = given()
    n = len(p.req)
    fused = torch.cat([p.q.flatten(1), k.flatten(1), v.flatten(1)], 1)
    q, k_, v_ = (x.unflatten(1, (-1, 32)) for x in fused.split((128, 64, 64), 1))
    assert not q.is_contiguous() or n == 1
    pools = p.pool.clone(), p.pool.clone()
    a = write(p, k, v, pools[0], rope=rope, impl=impl)
    b = rope_kv_write(q, k_, v_, pools[1], *p.places(), rope=rope, impl=impl)
    assert torch.equal(a, b)
    assert torch.equal(pools[0].nan_to_num(7.0), pools[1].nan_to_num(7.0))


@pytest.mark.parametrize("impl", IMPLS)
def test_without_norm_and_rotation_nothing_changes(impl):
    p, k, v, _ = given()
    pool = p.pool.clone()
    got = write(p, k, v, pool, impl=impl)
    for n in range(1, len(p.req) - 1):
        assert torch.equal(got[n], p.q[n])
        assert torch.equal(token(pool, p, n), torch.stack([k[n], v[n]]))


@pytest.mark.parametrize("impl", IMPLS)
def test_marks_are_raised_and_never_lowered(impl):
    p, k, v, _ = given()
    mark = torch.full((p.pool.shape[1], PAGE), 2, dtype=torch.uint8)
    write(p, k, v, p.pool, fill_mark=mark, impl=impl)
    for n in range(1, len(p.req) - 1):
        place = p.tables[p.req[n], p.pos[n] // PAGE], p.pos[n] % PAGE
        assert int(mark[place]) == max(2, int(p.loop[n]) + 1)
    places = p.tables, p.req, p.pos, p.loop
    kv_copy(p.pool, *places, ints(0, 1, 2)[None], fill_mark=mark, impl=impl)
    for n in range(1, len(p.req) - 1):
        assert int(mark[p.tables[p.req[n], p.pos[n] // PAGE], p.pos[n] % PAGE]) == 3


def test_no_row():
    p, k, v, rope = given()
    empty = p.rows([])
    before = p.pool.clone()
    assert write(empty, k[:0], v[:0], p.pool, rope=rope).shape == (0, 4, 32)
    kv_copy(p.pool, empty.tables, empty.req, empty.pos, empty.loop, ints(0, 1, 2)[None])
    assert torch.equal(p.pool.nan_to_num(7.0), before.nan_to_num(7.0))


def test_tables_of_angles():
    table = rope_table(torch.tensor([1.0, 0.5]), 3, scaling=2.0)
    assert table.shape == (3, 2, 2)
    torch.testing.assert_close(table[2, 0], 2 * torch.tensor([2.0, 1.0]).cos())
    torch.testing.assert_close(table[2, 1], 2 * torch.tensor([2.0, 1.0]).sin())


def test_depths_of_every_policy():
    assert kv_depths("own", 4) == [0, 1, 2, 3]
    assert kv_depths("single", 4) == [0, 0, 0, 0]
    assert kv_depths("first_then_shared", 4, keep=2) == [0, 1, 2, 2]
    assert kv_depths("modulo", 5, keep=3) == [0, 1, 2, 0, 1]
    message = "expected policy to be own, single, first_then_shared or modulo, got 'copy'"
    with pytest.raises(ValueError) as caught:
        kv_depths("copy", 2)
    assert str(caught.value) == message
    with pytest.raises(ValueError, match="expected loops and keep of at least 1, got 2 and 0"):
        kv_depths("modulo", 2, keep=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize(
    ("policy", "keep"), [("own", 1), ("single", 1), ("first_then_shared", 1), ("modulo", 2)]
)
@pytest.mark.parametrize("impl", IMPLS)
def test_copies_reach_what_no_loop_has_written(impl, policy, keep, dtype, device):
    """A pool of two layers and four loops; what a token wrote at its loops stays."""
    loops, layers = 4, 2
    own = torch.tensor(kv_depths(policy, loops, keep), dtype=torch.int32)
    slots = int(own.max()) + 1
    depths = torch.stack([own + slots * layer for layer in range(layers)])
    rows = distinct(mixed(LENGTHS, loops, 30, 3))
    p = problem(LENGTHS, rows, dtype=dtype, loops=loops)
    pool = torch.randn(slots * layers, *p.pool.shape[1:]).to(dtype)
    want = pool.clone()
    for r, t, j in rows:
        if r < 0:
            continue
        place = p.tables[r, t // PAGE], slice(None), slice(None), t % PAGE
        for layer in range(layers):
            written = set(depths[layer, : j + 1].tolist())
            for depth in set(depths[layer].tolist()) - written:
                want[(depth, *place)] = pool[(int(depths[layer, j]), *place)]
    got = pool.to(device)
    moved = (x.to(device) for x in (p.tables, p.req, p.pos, p.loop, depths))
    kv_copy(got, *moved, impl=impl)
    assert torch.equal(got.cpu(), want)


@pytest.mark.parametrize("impl", IMPLS)
def test_copies_are_exact_where_loops_change_nothing(impl):
    """The same K and V at every loop: running the loops and copying give one pool."""
    p, k, v, rope = given()
    ran, copied = p.pool.clone(), p.pool.clone()
    write(p, k, v, copied, rope=rope, impl=impl)
    kv_copy(copied, p.tables, p.req, p.pos, p.loop, p.depth_of[None], impl=impl)
    for loop in range(3):
        req = torch.where(p.loop <= loop, p.req, -1)
        at = torch.full_like(p.loop, loop)
        rope_kv_write(p.q, k, v, ran, p.tables, req, p.pos, at, p.depth_of, rope=rope, impl=impl)
    assert torch.equal(ran.nan_to_num(7.0), copied.nan_to_num(7.0))


def test_rows_that_would_read_what_is_not_there():
    tables, mark = ints(2, 0)[None], torch.zeros(3, PAGE, dtype=torch.uint8)
    mark[2], mark[0, :4] = 2, 1
    rows = [(0, 15, 1), (0, 16, 1), (0, 19, 0), (0, 20, 0), (-1, 90, 0)]
    columns = (torch.tensor(c, dtype=torch.int32) for c in zip(*rows, strict=True))
    found = unfilled(mark, tables, *columns)
    assert found.tolist() == [False, True, False, True, False]
    assert unfilled(mark, tables, ints(0), ints(17), ints(0), window=ints(2)).tolist() == [False]
    mark[2] = 0
    assert unfilled(mark, tables, ints(0), ints(17), ints(0), window=ints(2)).tolist() == [False]
    assert unfilled(mark, tables, ints(0), ints(17), ints(0), window=ints(3)).tolist() == [True]


P, K, V, ROPE = given()
CALLS = {
    "expected k to be [{n}, 2, 32], got [{n}, 1, 32]": {"k": K[:, :1]},
    "expected v to be [{n}, 2, 32], got [{n}, 2, 31]": {"v": V[..., 1:]},
    "expected v on cpu, got it on meta": {"v": V.to("meta")},
    "expected rope to be [S, positions, 2, H], got [64, 16]": {"rope": ROPE[0, :, 0]},
    "expected rope to turn at most 32 elements, got 34": {"rope": torch.zeros(9, 2, 17)},
    "expected rope_of to be [3], got [2]": {"rope": ROPE, "rope_of": ints(0, 0)},
    "expected q_norm to be [32] or [3, 32], got [2, 32]": {"q_norm": torch.ones(2, 32)},
    "expected k_norm to be [32] or [3, 32], got [31]": {"k_norm": torch.ones(31)},
    "expected fill_mark to be [{pages}, 16], got [1, 16]": {
        "fill_mark": torch.zeros(1, 16, dtype=torch.uint8)
    },
    "expected fill_mark to be contiguous: it is written in place": {
        "fill_mark": torch.zeros(16, P.pool.shape[1], dtype=torch.uint8).T
    },
    "expected impl to be 'auto' or 'reference', got 'x'": {"impl": "x"},
}


@pytest.mark.parametrize("message", CALLS)
def test_calls_that_do_not_fit(message):
    options = {"k": K, "v": V, **CALLS[message]}
    with pytest.raises(ValueError) as caught:
        write(P, options.pop("k"), options.pop("v"), P.pool, **options)
    assert str(caught.value) == message.format(n=len(P.req), pages=P.pool.shape[1])


def test_types_that_do_not_fit():
    with pytest.raises(TypeError, match=r"expected v in torch\.float32, got it in torch\.bfloat16"):
        write(P, K, V.bfloat16(), P.pool)
    with pytest.raises(TypeError, match=r"expected fill_mark to be uint8, got torch\.int32"):
        write(P, K, V, P.pool, fill_mark=torch.zeros(3, 16, dtype=torch.int32))
    with pytest.raises(TypeError, match=r"expected rope to be float32, .* got torch\.int32"):
        write(P, K, V, P.pool, rope=ROPE.int())
    with pytest.raises(TypeError, match=r"expected depths to be int32, got torch\.int64"):
        kv_copy(P.pool, *P.places()[:4], torch.zeros(1, 3, dtype=torch.int64))


@pytest.mark.cpu
def test_numbers_that_lead_out_of_the_tensors():
    with pytest.raises(RuntimeError, match=r"expected rope_of in \[0, 2\), got 2 at 1"):
        write(P, K, V, P.pool, rope=ROPE, rope_of=ints(0, 2, 0))
    with pytest.raises(RuntimeError, match=r"expected row_pos of rope in \[0, 3\), got"):
        write(P, K, V, P.pool, rope=ROPE[:, :3].contiguous())
    with pytest.raises(RuntimeError, match=r"kv_copy: expected depths in \[0, 5\), got 5 at 1"):
        kv_copy(P.pool, *P.places()[:4], ints(0, 5)[None].expand(1, 2))
