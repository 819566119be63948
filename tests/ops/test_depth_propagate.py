"""State propagation: K and V of skipped loops from the hidden state that a token left with."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from depth_pages import DEVICES, DTYPES, EPS, IDS, IMPLS, ints, mixed, problem
from depth_rows import is_split
from test_depth_kv import by_hand, distinct

from gemma_ext.ops.depth_batching import (
    PAGE,
    DeeperLayer,
    gather_rms_norm,
    kv_propagate,
    rope_kv_write,
    rope_table,
    seg_depth_lora,
)
from gemma_ext.ops.depth_batching.linear import Projection
from gemma_ext.testing import assert_close

LENGTHS = [1, 33, 60]
LOOPS, WIDTH, KV_HEADS, HEAD = 3, 24, 2, 8


def projection(rank: int, dtype, g) -> Projection:
    out = KV_HEADS * HEAD
    a, b = torch.randn(LOOPS, rank, WIDTH, generator=g), torch.randn(LOOPS, out, rank, generator=g)
    weight = torch.randn(out, WIDTH, generator=g)
    adapters = {"lora_a": a.to(dtype), "lora_b": b.to(dtype)} if rank else {}
    return Projection(weight.to(dtype), torch.randn(out, generator=g).to(dtype), **adapters)


def layers_of(rank: int, by_loop: bool, dtype=torch.float32) -> list[DeeperLayer]:
    g = torch.Generator().manual_seed(rank)
    shape = (LOOPS, WIDTH) if by_loop else (WIDTH,)
    return [
        DeeperLayer(
            torch.randn(shape, generator=g).to(dtype),
            projection(rank, dtype, g),
            projection(rank, dtype, g),
            ints(*(at + 2 * j for j in range(LOOPS))),
            ints(0, 1, 0),
            torch.randn(HEAD, generator=g) if at else None,
        )
        for at in range(2)
    ]


def moved(layer: DeeperLayer, device) -> DeeperLayer:
    def there(x):
        if isinstance(x, torch.Tensor):
            return x.to(device)
        if isinstance(x, Projection):
            return Projection(*(there(y) for y in (x.weight, x.bias, x.lora_a, x.lora_b)))
        return x

    return DeeperLayer(*(there(x) for x in vars(layer).values()))


def rows_and_pool(dtype, seed=4):
    rows = distinct(mixed(LENGTHS, LOOPS, 20, seed))
    p = problem(LENGTHS, rows, heads=(2, KV_HEADS), width=HEAD, loops=LOOPS, dtype=dtype)
    pool = torch.full((6, *p.pool.shape[1:]), float("nan"), dtype=dtype)
    h = torch.randn(len(rows), WIDTH, generator=torch.Generator().manual_seed(9)).to(dtype)
    return p, pool, h


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize(("rank", "by_loop"), [(0, False), (3, False), (0, True)])
@pytest.mark.parametrize("impl", IMPLS)
def test_matches_the_formula(impl, rank, by_loop, dtype, device):
    p, pool, h = rows_and_pool(dtype)
    layers = layers_of(rank, by_loop, dtype)
    rope = torch.stack([rope_table(torch.rand(4), 64) for _ in range(2)])
    mark = torch.zeros(pool.shape[1], PAGE, dtype=torch.uint8, device=device)
    got = pool.to(device)
    kv_propagate(
        h.to(device), [moved(x, device) for x in layers], got,
        *(x.to(device) for x in (p.tables, p.req, p.pos, p.loop)),
        rope=rope.to(device), eps=1e-3, plus_one=True, fill_mark=mark, impl=impl,
    )  # fmt: skip
    # one rounding after the norm, one between the adapters, one of the result; of float32 also
    # those of three sums, whose terms are several times their result
    rel = 12 * (2.0**-16 if impl == "auto" and is_split(got) else max(EPS[dtype], 2.0**-22))
    written = torch.zeros(pool.shape, dtype=torch.bool)
    for n, (r, t, left) in enumerate(p.columns()):
        if r < 0:
            continue
        page = p.tables[r, t // PAGE]
        for layer in layers:
            for j in range(left + 1, LOOPS):
                x = h[n].double()
                norm = layer.norm[j] if by_loop else layer.norm
                x = x / (x.square().mean() + 1e-3).sqrt() * (norm.double() + 1)
                place = layer.depth_of[j], page, slice(None), slice(None), t % PAGE
                for half, q in enumerate((layer.k, layer.v)):
                    y = q.weight.double() @ x + q.bias.double()
                    if rank:
                        y += q.lora_b[j].double() @ (q.lora_a[j].double() @ x)
                    want = y.reshape(KV_HEADS, HEAD)
                    if half == 0:
                        table = rope[layer.rope_of[j], t]
                        want = torch.stack(
                            [by_hand(v, layer.k_norm, 1e-3, True, table) for v in want]
                        )
                    assert_close(got.cpu()[place][half], want, rel=rel)
                written[place] = True
        assert int(mark[page, t % PAGE]) == (LOOPS if left + 1 < LOOPS else 0)
    assert got.cpu()[~written].isnan().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
def test_bits_do_not_depend_on_the_rows_beside(dtype, device):
    p, whole, h = rows_and_pool(dtype)
    p, whole, h = p.to(device), whole.to(device), h.to(device)
    alone = whole.clone()
    layers = [moved(x, device) for x in layers_of(3, True, dtype)]
    places = p.tables, p.req, p.pos, p.loop
    kv_propagate(h, layers, whole, *places)
    for n in range(len(h)):
        row = p.rows([n])
        places = row.tables, row.req, row.pos, row.loop
        kv_propagate(h[n : n + 1], layers, alone, *places)
    assert torch.equal(whole.nan_to_num(7.0), alone.nan_to_num(7.0))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("rank", [0, 3])
def test_bits_are_those_of_the_ops_one_after_the_other(rank, dtype, device):
    """Norm, products and write by the ops of their own, a layer and a loop at a time."""
    p, pool, h = rows_and_pool(dtype)
    p, pool, h = p.to(device), pool.to(device), h.to(device)
    layers = [moved(x, device) for x in layers_of(rank, True, dtype)]
    rope = torch.stack([rope_table(torch.rand(4), 64) for _ in range(2)]).to(device)
    want, every = pool.clone(), ints(*range(len(h))).to(device)
    for layer in layers:
        for j in range(1, LOOPS):
            x = gather_rms_norm(h, every, layer.norm[j], eps=1e-3)
            cut = ints(*(len(h) * (i > j) for i in range(LOOPS + 1))).to(device)
            k, v = seg_depth_lora(x, (layer.k, layer.v), cut)
            k, v = (y.unflatten(1, (KV_HEADS, HEAD)) for y in (k, v))
            req, loop = torch.where(p.loop < j, p.req, -1), torch.full_like(p.loop, j)
            rope_kv_write(
                h.new_empty(len(h), 0, HEAD), k, v, want, p.tables, req, p.pos, loop,
                layer.depth_of, rope=rope, rope_of=layer.rope_of, k_norm=layer.k_norm, eps=1e-3,
            )  # fmt: skip
    kv_propagate(h, layers, pool, p.tables, p.req, p.pos, p.loop, rope=rope, eps=1e-3)
    assert torch.equal(pool.nan_to_num(7.0), want.nan_to_num(7.0))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("impl", IMPLS)
def test_the_last_of_loops_that_share_a_depth_stays(impl, device):
    p, pool, h = rows_and_pool(torch.float32)
    layer = layers_of(3, True)[1]
    shared = replace(layer, depth_of=ints(0, 4, 4))
    own = pool.clone().to(device)
    pool = pool.to(device)
    places = tuple(x.to(device) for x in (p.tables, p.req, p.pos, p.loop))
    for at, to in ((layer, own), (shared, pool)):
        kv_propagate(h.to(device), [moved(at, device)], to, *places, impl=impl)
    assert torch.equal(pool[4].nan_to_num(7.0), own[layer.depth_of[2]].nan_to_num(7.0))


@pytest.mark.parametrize("device", DEVICES)
def test_more_layers_than_a_launch_takes(device):
    """40 layers beside one at a time; marks are raised when all are there."""
    p, pool, h = rows_and_pool(torch.float32)
    some = layers_of(0, False)[0]
    layers = [moved(replace(some, depth_of=ints(0, s, s)), device) for s in range(1, 41)]
    pool = torch.full((41, *pool.shape[1:]), 7.0, device=device)
    want = pool.clone()
    mark = torch.zeros(pool.shape[1], PAGE, dtype=torch.uint8, device=device)
    places = tuple(x.to(device) for x in (p.tables, p.req, p.pos, p.loop))
    kv_propagate(h.to(device), layers, pool, *places, fill_mark=mark)
    for layer in layers:
        kv_propagate(h.to(device), [layer], want, *places)
    assert torch.equal(pool, want)
    assert mark.max() == LOOPS


@pytest.mark.parametrize("impl", IMPLS)
def test_blocks_that_change_nothing_make_it_exact(impl):
    """The hidden state of every loop is the same, so are K and V of running the loop."""
    p, pool, h = rows_and_pool(torch.float64 if impl == "reference" else torch.float32)
    layer = layers_of(0, False, pool.dtype)[0]
    want = pool.clone()
    x = h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.norm
    k, v = (torch.nn.functional.linear(x, q.weight, q.bias) for q in (layer.k, layer.v))
    k, v = (y.unflatten(1, (KV_HEADS, HEAD)) for y in (k, v))
    for j in range(1, LOOPS):
        req = torch.where(p.loop < j, p.req, -1)
        loop = torch.full_like(p.loop, j)
        rope_kv_write(
            p.q.to(h.dtype), k, v, want, p.tables, req, p.pos, loop, layer.depth_of, impl=impl
        )
    kv_propagate(h, [layer], pool, p.tables, p.req, p.pos, p.loop, impl=impl)
    assert torch.equal(pool.isnan(), want.isnan())
    split = impl == "auto" and is_split(pool)
    assert_close(pool.nan_to_num(0.0), want.nan_to_num(0.0), rel=12 * 2.0**-16 if split else 1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("impl", IMPLS)
def test_nobody_owes_anything(impl, device):
    """No rows; rows that have run all loops or fill a launch up; a model of one loop."""
    p, pool, h = rows_and_pool(torch.float32)
    layer = layers_of(0, False)[0]
    alone = replace(layer, depth_of=ints(0), rope_of=None)
    done, nobody = torch.full_like(p.loop, LOOPS - 1), torch.full_like(p.req, -1)
    calls = (
        (h[:0], layer, p.req[:0], p.pos[:0], p.loop[:0]),
        (h, layer, p.req, p.pos, done),
        (h, layer, nobody, p.pos, p.loop),
        (h, alone, p.req, p.pos, torch.zeros_like(p.loop)),
    )
    got, tables = pool.to(device), p.tables.to(device)
    for h, own, *rows in calls:
        rows = (x.to(device) for x in rows)
        kv_propagate(h.to(device), [moved(own, device)], got, tables, *rows, impl=impl)
    assert got.isnan().all()


def test_calls_that_do_not_fit():
    p, pool, h = rows_and_pool(torch.float32)
    places = p.tables, p.req, p.pos, p.loop
    layer = layers_of(3, False)[0]

    def run(h=h, **changed):
        kv_propagate(h, [replace(layer, **changed)], pool, *places)

    g = torch.Generator().manual_seed(0)
    narrow = Projection(torch.randn(8, WIDTH, generator=g))
    alone = Projection(layer.k.weight, None, layer.k.lora_a[:1], layer.k.lora_b[:1])
    wrong = {
        r"expected h to be \[\d+, D\], got \[1, 24\]": {"h": h[:1]},
        r"expected norm to be \[24\] or \[3, 24\], got \[2, 24\]": {"norm": torch.ones(2, 24)},
        r"expected the weight of v to be \[16, 24\], got \[8, 24\]": {"v": narrow},
        r"expected adapters of k for 3 loops, got 1": {"k": alone},
        r"expected rope_of to be \[3\], got \[2\]": {"rope_of": ints(0, 1)},
        r"expected k_norm to be \[8\] or \[3, 8\], got \[9\]": {"k_norm": torch.ones(9)},
    }
    for sentence, changed in wrong.items():
        with pytest.raises(ValueError, match=sentence):
            run(**changed)
    with pytest.raises(TypeError, match=r"expected h in torch\.float32, got it in torch\.float64"):
        run(h=h.double())
    with pytest.raises(ValueError, match="expected at least one layer, got none"):
        kv_propagate(h, [], pool, *places)


@pytest.mark.cpu
def test_numbers_that_lead_outside():
    p, pool, h = rows_and_pool(torch.float32)
    layer = replace(layers_of(0, False)[0], depth_of=ints(0, 1, 6))
    with pytest.raises(
        RuntimeError, match=r"kv_propagate: expected depth_of in \[0, 6\), got 6 at 2"
    ):
        kv_propagate(h, [layer], pool, p.tables, p.req, p.pos, p.loop)
