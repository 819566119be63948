"""Attention over pages of K and V, each row at its own depth."""

from __future__ import annotations

from torch import Tensor

from gemma_ext.ops.depth_batching import kv_op
from gemma_ext.ops.depth_batching.inputs import (
    check_ints,
    check_like,
    check_rows,
    check_shape,
    is_reference,
)
from gemma_ext.reference import depth_batching as formulas


def paged_attn_mixed_depth(
    q: Tensor,
    kv_pool: Tensor,
    block_tables: Tensor,
    row_req: Tensor,
    row_pos: Tensor,
    row_loop: Tensor,
    depth_of: Tensor,
    *,
    window: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: int = 0,
    impl: str = "auto",
) -> Tensor:
    """softmax(softcap(scale q k)) v over a row's request up to the row, at the depth of its loop.

    K and V of the row itself and of every token before it must lie in the pool: `rope_kv_write`
    comes first, also for rows of one chunk. Scores, their softmax and the sums are float32.

    Args:
        q: [n, n_q, hd] in the dtype of kv_pool; n_q a multiple of n_kv: head h reads n_kv head
            h // (n_q // n_kv).
        kv_pool: [L, pages, 2, n_kv, 16, hd].
        block_tables: int32 [R, max_pages]; entries beyond a row's position are not read.
        row_req: int32 [n], a row of block_tables; -1: the result is 0.
        row_pos: int32 [n].
        row_loop: int32 [n] in [0, B).
        depth_of: int32 [B], depth in kv_pool of this layer at each loop.
        window: int32 [B], how many tokens a row sees at each loop, its own included; 0 or None:
            all.
        scale: of q k; 1 / sqrt(hd) by default.
        softcap: caps scores at c tanh(score / c).
        sinks: first tokens of every request, which its rows see in front of any window.
        impl: "auto" or "reference".

    Returns:
        [n, n_q, hd], contiguous.

    Raises:
        ValueError, TypeError: what does not fit.
    """
    n = check_rows(kv_pool, block_tables, row_req, row_pos, row_loop)
    kv_heads, width = kv_pool.shape[3], kv_pool.shape[5]
    check_shape("q", q, (n, "n_q", width))
    check_like("q", q, kv_pool)
    if q.shape[1] % kv_heads:
        raise ValueError(f"expected heads of q in multiples of {kv_heads}, got {q.shape[1]}")
    check_ints("depth_of", depth_of, ("B",), kv_pool)
    if window is not None:
        check_ints("window", window, (depth_of.shape[0],), kv_pool)
    if softcap is not None and not softcap > 0:
        raise ValueError(f"expected softcap to be positive, got {softcap}")
    if sinks < 0:
        raise ValueError(f"expected sinks to be at least 0, got {sinks}")
    scale = width**-0.5 if scale is None else scale
    if is_reference(impl, q, "paged_attn_mixed_depth"):
        return formulas.paged_attn_mixed_depth(
            q, kv_pool, block_tables, row_req, row_pos, row_loop, depth_of, window, scale, softcap,
            sinks,
        )  # fmt: skip
    return kv_op.paged_attn_mixed_depth(
        q, kv_pool, block_tables, row_req, row_pos, row_loop, depth_of, window, scale,
        softcap or 0, sinks,
    )  # fmt: skip
