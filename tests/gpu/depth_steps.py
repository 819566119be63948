"""Rows and pages, linear layers and heads of mixed depths: every op on one problem."""

from __future__ import annotations

from functools import cache

import torch
from gpu_problem import DEVICE

# tests/ops, which gpu_problem has put on the path
from depth_pages import Problem, mixed, problem  # isort: skip
from depth_rows import offsets, projection, randn  # isort: skip

from gemma_ext.ops.depth_batching import (
    DeeperLayer,
    depth_compact,
    gate_exit,
    gather_rms_norm,
    head_exit,
    kv_copy,
    kv_propagate,
    make_shortlist,
    paged_attn_mixed_depth,
    rope_kv_write,
    rope_table,
    scatter_rms_norm,
    seg_depth_gated,
    seg_depth_lora,
    shortlist_head,
)

LENGTHS = [1, 37, 300, 530]
WIDTH, HIDDEN, VOCABULARY = 64, 96, 3000


@cache
def deeper(dtype):
    """Norm, k and v of a layer."""
    k, v = (projection(128, 128, 3, 8, seed=s, dtype=dtype, device=DEVICE) for s in (1, 2))
    return randn(128, seed=3, dtype=dtype).to(DEVICE), k, v


def step_of_pages(p: Problem, k, v, rope, leave):
    """A layer of a block, what its rows owe, and where they go."""
    q = rope_kv_write(p.q, k, v, p.pool, *p.places(), rope=rope)
    out = paged_attn_mixed_depth(q, p.pool, *p.places(), softcap=30.0)
    kv_copy(p.pool, p.tables, p.req, p.pos, p.loop, p.depth_of[None])
    owed = DeeperLayer(*deeper(q.dtype), p.depth_of)
    h = q.flatten(1)[:, :128]
    kv_propagate(h, [owed], p.pool, p.tables, p.req, p.pos, p.loop, rope=rope)
    return out, *depth_compact(p.loop, leave, 3)


def parts(dtype, seed=0):
    rows = list({(r, t): (r, t, j) for r, t, j in mixed(LENGTHS, 3, 40, seed)}.values())
    p = problem(LENGTHS, rows, width=64, dtype=dtype, seed=seed).to(DEVICE)
    p.pool.nan_to_num_(0.5)
    g = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, len(rows), 2, 64, generator=g).to(DEVICE, dtype)
    leave = (torch.rand(len(rows), generator=g) < 0.5).to(DEVICE)
    return p, k, v, rope_table(torch.rand(32, generator=g), 640).to(DEVICE), leave


def layers(dtype):
    made = {"dtype": dtype, "device": DEVICE}
    return (
        projection(HIDDEN, WIDTH, 2, 16, seed=1, **made),
        projection(HIDDEN, WIDTH, 2, 8, seed=2, **made),
        projection(WIDTH, HIDDEN, 2, 16, bias=True, seed=3, **made),
        randn(WIDTH, seed=4, dtype=dtype).to(DEVICE),
        make_shortlist(randn(VOCABULARY, WIDTH, seed=5, dtype=dtype).to(DEVICE)),
    )


def rows(dtype, n, seed=0):
    g = torch.Generator().manual_seed(seed)
    slots = torch.randperm(64, generator=g)[:n].int()
    slots[torch.rand(n, generator=g) < 0.1] = -1
    cut = offsets(int(torch.randint(n, (1,), generator=g)), 0)
    cut[2] = n
    keys = torch.randint(1 << 40, (n, 3), generator=g)
    bank = torch.randn(64, WIDTH, generator=g).to(dtype)
    limit = torch.rand(n, generator=g) * 0.2
    return [x.to(DEVICE) for x in (bank, slots, cut, keys, limit)]


def step_of_rows(layers, bank, slots, cut, keys, limit):
    gate, up, down, weight, short = layers
    x = gather_rms_norm(bank, slots, weight)
    (y,) = seg_depth_lora(seg_depth_gated(x, gate, up, cut), [down], cut)
    after = scatter_rms_norm(bank, slots, y, next_weight=weight)
    options = {"mode": "margin", "threshold": limit, "softcap": 30.0}
    got = head_exit(after, short.weight, **options, temperature=limit, keys=keys, candidates=20)
    certified = shortlist_head(after, short, **options, candidates=9)
    return after, *got, *certified, gate_exit(after, "cosine", limit, previous=x).exits
