"""Rows at different loops of one recursive model, in plain torch: routing, K and V, attention.

A pool of K and V is [L, pages, 2, n_kv, 16, hd]: L depths, pages of 16 tokens, one table of pages
per request for all depths. Row n belongs to request `row_req[n]`, stands at position `row_pos[n]`
and runs loop `row_loop[n]`, whose K and V lie at depth `depth_of[row_loop[n]]`. A row of request -1
fills a launch up: it writes nothing and its results are 0.

Every row is computed by itself, so that its bits are those it would have alone. Any floating dtype:
sums are at least float32, of float64 they are float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gemma_ext.reference.depth_batching_linear import rms_norm, seg_depth_lora

PAGE = 16
"""Tokens of a page."""


def depth_compact(loop: Tensor, leave: Tensor, drop: Tensor | None, loops: int):
    """(order [n], next_loop [n], seg_offsets [loops + 1], counts [3]) by the loops that follow."""
    valid = (loop >= -1) & (loop < loops)
    if drop is not None:
        valid &= ~drop
    leaves = valid & (loop >= 0) & (leave | (loop == loops - 1))
    # loops, then the coda, then what is dropped
    kind = torch.where(leaves, loops, torch.where(valid, loop + 1, loops + 1)).long()
    order = torch.argsort(kind, stable=True)
    sizes = torch.zeros(loops + 2, dtype=torch.long, device=loop.device)
    sizes.scatter_add_(0, kind, torch.ones_like(kind))
    ends = sizes.cumsum(0)
    offsets = torch.cat([ends.new_zeros(1), ends[:loops]])
    next_loop = torch.where(kind < loops, kind, -1)[order]
    counts = torch.stack([ends[loops - 1], sizes[loops], sizes[loops + 1]])
    return tuple(t.to(torch.int32) for t in (order, next_loop, offsets, counts))


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """The first 2 H elements of x [..., hd] turned by (cos, sin) = table [2, H], i with i + H."""
    half = table.shape[-1]
    cos, sin = table
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


def place(block_tables: Tensor, request: int, position: int) -> tuple[int, int]:
    """(page, offset) of a position."""
    return int(block_tables[request, position // PAGE]), position % PAGE


def rope_kv_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_pool: Tensor,
    block_tables: Tensor,
    row_req: Tensor,
    row_pos: Tensor,
    row_loop: Tensor,
    depth_of: Tensor,
    rope: Tensor | None,
    rope_of: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    plus_one: bool,
    fill_mark: Tensor | None,
) -> Tensor:
    """q normed and rotated; k the same and v into the pool, in place."""
    wide = torch.promote_types(q.dtype, torch.float32)

    def turned(x: Tensor, norm: Tensor | None, loop: int, position: int) -> Tensor:
        x = x.contiguous().to(wide)
        if norm is not None:
            own = norm[loop if norm.shape[0] > 1 else 0].to(wide)
            x = rms_norm(x, own, eps, plus_one)
        if rope is None:
            return x
        return rotate(x, rope[int(rope_of[loop]) if rope_of is not None else 0, position].to(wide))

    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    for n, (request, position, loop) in enumerate(rows_of(row_req, row_pos, row_loop)):
        if request < 0:
            continue
        out[n] = turned(q[n], q_norm, loop, position).to(q.dtype)
        page, offset = place(block_tables, request, position)
        own = kv_pool[int(depth_of[loop]), page]
        own[0, :, offset] = turned(k[n], k_norm, loop, position).to(kv_pool.dtype)
        own[1, :, offset] = v[n].to(kv_pool.dtype)
        raise_mark(fill_mark, page, offset, loop + 1)
    return out


def rows_of(*columns: Tensor) -> zip:
    return zip(*(c.tolist() for c in columns), strict=True)


def raise_mark(fill_mark: Tensor | None, page: int, offset: int, loops: int) -> None:
    if fill_mark is not None and int(fill_mark[page, offset]) < loops:
        fill_mark[page, offset] = loops


def paged_attn_mixed_depth(
    q: Tensor,
    kv_pool: Tensor,
    block_tables: Tensor,
    row_req: Tensor,
    row_pos: Tensor,
    row_loop: Tensor,
    depth_of: Tensor,
    window: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: int = 0,
) -> Tensor:
    """softmax(softcap(scale q k)) v over a row's token, those before it in its window, and the
    first `sinks` tokens."""
    wide = torch.promote_types(q.dtype, torch.float32)
    heads, width = q.shape[1:]
    kv_heads = kv_pool.shape[3]
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    for n, (request, position, loop) in enumerate(rows_of(row_req, row_pos, row_loop)):
        if request < 0:
            continue
        reach = int(window[loop]) if window is not None else 0
        first = max(position + 1 - reach, 0) if reach > 0 else 0
        every = torch.arange(position + 1, device=q.device)
        seen = every[(every >= first) | (every < sinks)]
        pages, tokens = torch.unique_consecutive(seen // PAGE, return_inverse=True)
        tokens = tokens * PAGE + seen % PAGE
        pages = block_tables[request, pages].long()
        own = kv_pool[int(depth_of[loop]), pages].to(wide)  # [pages, 2, n_kv, 16, hd]
        k, v = own.permute(1, 2, 0, 3, 4).reshape(2, kv_heads, 1, -1, width)[:, :, :, tokens]
        x = q[n].contiguous().to(wide).reshape(kv_heads, heads // kv_heads, 1, width)
        scores = (x * k).sum(-1) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        p = torch.softmax(scores, -1)
        out[n] = (p.unsqueeze(-1) * v).sum(-2).reshape(heads, width).to(q.dtype)
    return out


def kv_copy(
    kv_pool: Tensor,
    block_tables: Tensor,
    row_req: Tensor,
    row_pos: Tensor,
    row_loop: Tensor,
    depths: Tensor,
    fill_mark: Tensor | None,
) -> None:
    """Depths of later loops that no earlier one shares take K and V of a row's loop, in place."""
    for request, position, loop in rows_of(row_req, row_pos, row_loop):
        if request < 0:
            continue
        page, offset = place(block_tables, request, position)
        for own in depths.tolist():
            for depth in set(own[loop + 1 :]) - set(own[: loop + 1]):
                kv_pool[depth, page, :, :, offset] = kv_pool[own[loop], page, :, :, offset]
        raise_mark(fill_mark, page, offset, depths.shape[1])


def kv_propagate(
    h: Tensor,
    layers: Sequence[tuple],
    kv_pool: Tensor,
    block_tables: Tensor,
    row_req: Tensor,
    row_pos: Tensor,
    row_loop: Tensor,
    rope: Tensor | None,
    eps: float,
    plus_one: bool,
    fill_mark: Tensor | None,
) -> None:
    """K and V of the loops after a row's, in place, from the norm of its h. Of every layer: a norm
    [1 or B, D], (weight, bias, a, b) of k and of v, depth_of, rope_of and a norm of k or None."""
    n, shape = len(h), kv_pool.shape[3:6:2]
    for at, (norm, k, v, depth_of, rope_of, k_norm) in enumerate(layers):
        loops = len(depth_of)
        for loop in range(1, loops):
            own = norm[loop if len(norm) > 1 else 0]
            x = rms_norm(h, own, eps, plus_one=plus_one).to(h.dtype)
            segments = (torch.arange(loops + 1, device=h.device) > loop) * n
            keys, values = (
                y.unflatten(1, shape) for y in seg_depth_lora(x, [k, v], segments, 1.0, None)
            )
            rope_kv_write(
                h.new_empty(n, 0, shape[1]), keys, values, kv_pool, block_tables,
                torch.where(row_loop < loop, row_req, -1), row_pos,
                torch.full_like(row_loop, loop), depth_of, rope, rope_of, None, k_norm, eps,
                plus_one, fill_mark if at + 1 == len(layers) else None,
            )  # fmt: skip


def unfilled(
    fill_mark: Tensor,
    block_tables: Tensor,
    row_req: Tensor,
    row_pos: Tensor,
    row_loop: Tensor,
    window: Tensor | None,
) -> Tensor:
    """bool [n]: rows that would read K or V which their loop has not written."""
    found = []
    for request, position, loop in rows_of(row_req, row_pos, row_loop):
        reach = int(window[loop]) if window is not None else 0
        first = max(position + 1 - reach, 0) if reach > 0 else 0
        pages = block_tables[request, first // PAGE : position // PAGE + 1].long()
        marks = fill_mark[pages].reshape(-1)[first % PAGE : position + 1 - first // PAGE * PAGE]
        found.append(request >= 0 and bool((marks <= loop).any()))
    return torch.tensor(found, dtype=torch.bool, device=row_req.device)
