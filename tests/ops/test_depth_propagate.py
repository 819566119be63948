"""State propagation: K and V of skipped loops from the hidden state that a token left with."""

from __future__ import annotations

import pytest
import torch
from depth_pages import DEVICES, DTYPES, EPS, IDS, IMPLS, ints, mixed, problem
from test_depth_kv import by_hand, distinct

from gemma_ext.ops.depth_batching import (
    PAGE,
    DeeperLayer,
    kv_propagate,
    rope_kv_write,
    rope_table,
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
                    # one rounding after the norm, one between the adapters, one of the result; of
                    # float32 also those of three sums, whose terms are several times their result
                    limit = max(12 * EPS[dtype], 48 * EPS[torch.float32])
                    assert_close(got.cpu()[place][half], want, rel=limit)
                written[place] = True
        assert int(mark[page, t % PAGE]) == (LOOPS if left + 1 < LOOPS else 0)
    assert got.cpu()[~written].isnan().all()


def test_bits_do_not_depend_on_the_rows_beside():
    p, whole, h = rows_and_pool(torch.float32)
    alone = whole.clone()
    layers = layers_of(3, True)
    places = p.tables, p.req, p.pos, p.loop
    kv_propagate(h, layers, whole, *places)
    for n in range(len(h)):
        row = p.rows([n])
        places = row.tables, row.req, row.pos, row.loop
        kv_propagate(h[n : n + 1], layers, alone, *places)
    assert torch.equal(whole.nan_to_num(7.0), alone.nan_to_num(7.0))


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
    assert_close(pool.nan_to_num(0.0), want.nan_to_num(0.0), rel=1e-6)


def test_calls_that_do_not_fit():
    p, pool, h = rows_and_pool(torch.float32)
    places = p.tables, p.req, p.pos, p.loop
    with pytest.raises(ValueError, match=r"expected h to be \[\d+, D\], got \[1, 24\]"):
        kv_propagate(h[:1], layers_of(0, False), pool, *places)
    with pytest.raises(TypeError, match=r"expected h in torch\.float32, got it in torch\.float64"):
        kv_propagate(h.double(), layers_of(0, False), pool, *places)
