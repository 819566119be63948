"""torch's own checks of the ops of rows and pages, and the derivatives that they refuse."""

from __future__ import annotations

import pytest
import torch
from depth_pages import DTYPES, IDS, ints, mixed, problem
from test_depth_kv import distinct, given
from torch.library import opcheck

from gemma_ext.ops.depth_batching import paged_attn_mixed_depth, rope_kv_write


def sample_compact(dtype, full):
    loop, leave = ints(0, 1, -1, 2), torch.tensor([True, False, False, True])
    return loop, leave, ~leave if full else None, 3


def sample_write(dtype, full):
    p, k, v, rope = given(dtype=dtype)
    mark = torch.zeros(p.pool.shape[1], 16, dtype=torch.uint8)
    norm = torch.randn(1, 32)
    options = (rope, ints(0, 1, 0), norm, norm) if full else (None,) * 4
    pool = torch.zeros_like(p.pool)  # opcheck compares what is written with ==
    return p.q, k, v, pool, *p.places(), *options, 1e-6, full, mark if full else None


def sample_attention(dtype, full):
    p = problem([5, 40], mixed([5, 40], 3, 9), dtype=dtype)
    window, softcap = (ints(0, 7, 0), 5.0) if full else (None, 0.0)
    return p.q, p.pool.nan_to_num(0.0), *p.places(), window, 0.3, softcap, 2 * full


def sample_copy(dtype, full):
    p = problem([33], distinct(mixed([33], 3, 9)), dtype=dtype)
    mark = torch.zeros(p.pool.shape[1], 16, dtype=torch.uint8)
    depths = ints(0, 1, 2, 3, 3, 3).reshape(2, 3)
    return p.pool.nan_to_num(0.0), *p.places()[:4], depths, mark if full else None


def sample_propagate(dtype, full):
    p = problem([33], distinct(mixed([33], 3, 9)), dtype=dtype)
    n, kv_heads, width = len(p.req), p.pool.shape[3], p.pool.shape[5]
    g = torch.Generator().manual_seed(3)

    def some(*shape):
        return torch.randn(shape, generator=g).to(dtype)

    empty, lists = some(0), [ints(0, 1, 2), ints(3, 4, 4)]
    features, rank = kv_heads * width, 3
    mark = torch.zeros(p.pool.shape[1], 16, dtype=torch.uint8)
    return (
        some(n, 12), torch.zeros_like(p.pool), *p.places()[:4],
        [some(3 if full else 1, 12) for _ in lists], [some(features, 12) for _ in range(4)],
        [some(features) if full else empty for _ in range(4)],
        [some(3, rank, 12) if full else empty for _ in range(4)],
        [some(3, features, rank) if full else empty for _ in range(4)], lists,
        [ints(0, 1, 0) if full else ints() for _ in lists],
        [torch.randn(1, width, generator=g) if full else empty for _ in lists],
        torch.randn(2, 40, 2, width // 2, generator=g) if full else None, 1e-6, full,
        mark if full else None,
    )  # fmt: skip


SAMPLES = {
    "depth_compact": sample_compact,
    "rope_kv_write": sample_write,
    "paged_attn_mixed_depth": sample_attention,
    "kv_copy": sample_copy,
    "kv_propagate": sample_propagate,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("full", [False, True], ids=["bare", "full"])
@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(name, full, dtype):
    opcheck(getattr(torch.ops.gemma_ext, name).default, SAMPLES[name](dtype, full))


def test_on_meta():
    p = problem([5], [(0, 4, 1), (0, 2, 0)]).to("meta")
    out = paged_attn_mixed_depth(p.q, p.pool, *p.places())
    assert out.shape == p.q.shape
    assert out.is_meta


def test_compiled():
    p, k, v, rope = given()
    pools = p.pool.nan_to_num(0.0), p.pool.nan_to_num(0.0)

    def step(q, pool):
        q = rope_kv_write(q * 2, k, v, pool, *p.places(), rope=rope)
        return paged_attn_mixed_depth(q, pool, *p.places(), softcap=3.0)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(p.q, pools[0]), step(p.q, pools[1]))
    assert torch.equal(*pools)


def test_derivatives_are_refused():
    p, k, v, _ = given()
    pool = p.pool.nan_to_num(0.0)
    q = p.q.requires_grad_()
    for out in (
        rope_kv_write(q, k, v, pool, *p.places()),
        paged_attn_mixed_depth(q, pool, *p.places()),
    ):
        with pytest.raises(NotImplementedError, match="has no derivative of this order"):
            out.sum().backward()
