"""Rotary positions, and K and V into pages."""

from __future__ import annotations

import torch
from torch import Tensor

from gemma_ext.ops.depth_batching import kv_op
from gemma_ext.ops.depth_batching.inputs import (
    check_floats,
    check_ints,
    check_like,
    check_marks,
    check_rows,
    check_shape,
    is_reference,
)
from gemma_ext.reference import depth_batching as formulas


def rope_table(
    inv_freq: Tensor, positions: int, *, scaling: float = 1.0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """[positions, 2, H]: cos and sin of position * inv_freq [H], times `scaling` (as YaRN asks).

    Angles are taken in float64. Tables of several settings are stacked: `torch.stack([a, b])`.
    """
    at = torch.arange(positions, dtype=torch.float64, device=inv_freq.device)
    angles = at.unsqueeze(-1) * inv_freq.double()
    return torch.stack([angles.cos(), angles.sin()], 1).mul(scaling).to(dtype)


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
    *,
    rope: Tensor | None = None,
    rope_of: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    plus_one: bool = False,
    fill_mark: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Norm and rotate q and k, and write k and v into pages; returns q.

    Norm (where given), rotation and the one rounding follow each other in float32. A position
    stands in one row of a call at most.

    Args:
        q, k, v: [n, n_q, hd], [n, n_kv, hd] twice, in the dtype of kv_pool; rows may be strided.
        kv_pool: [L, pages, 2, n_kv, 16, hd], written in place.
        block_tables: int32 [R, max_pages].
        row_req: int32 [n], a row of block_tables; -1: nothing is written and q is 0.
        row_pos: int32 [n].
        row_loop: int32 [n] in [0, B).
        depth_of: int32 [B], depth in kv_pool of this layer at each loop.
        rope: cos and sin, floats [positions, 2, H] or [S, positions, 2, H] of S settings, 2 H <= hd
            (`rope_table`); None: no rotation. Element i turns with i + H, the rest stays.
        rope_of: int32 [B], the setting of each loop; None: setting 0.
        q_norm, k_norm: RMSNorm weights [hd], or [B, hd] by loop, before the rotation.
        eps, plus_one: of both; plus_one multiplies by weight + 1.
        fill_mark: uint8 [pages, 16], loops whose K and V a token has; raised to row_loop + 1, so
            give it with the last layer of a block.
        impl: "auto" or "reference".

    Returns:
        [n, n_q, hd], contiguous.

    Raises:
        ValueError, TypeError: what does not fit.
    """
    n = check_rows(kv_pool, block_tables, row_req, row_pos, row_loop)
    kv_heads, width = kv_pool.shape[3], kv_pool.shape[5]
    check_shape("q", q, (n, "n_q", width))
    check_shape("k", k, (n, kv_heads, width))
    check_shape("v", v, (n, kv_heads, width))
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_like(name, x, kv_pool)
    check_ints("depth_of", depth_of, ("B",), kv_pool)
    loops = depth_of.shape[0]
    if rope is not None:
        rope = check_rope(rope, width)
    if rope_of is not None:
        check_ints("rope_of", rope_of, (loops,), kv_pool)
    q_norm = check_norm("q_norm", q_norm, loops, width)
    k_norm = check_norm("k_norm", k_norm, loops, width)
    check_marks(fill_mark, kv_pool)
    reference = is_reference(impl, q, "rope_kv_write")
    write = formulas.rope_kv_write if reference else kv_op.rope_kv_write
    return write(
        q, k, v, kv_pool, block_tables, row_req, row_pos, row_loop, depth_of,
        rope, rope_of, q_norm, k_norm, eps, plus_one, fill_mark,
    )  # fmt: skip


def check_rope(rope: Tensor, width: int) -> Tensor:
    """[S, positions, 2, H]."""
    check_floats("rope", rope)
    rope = rope.unsqueeze(0) if rope.dim() == 3 else rope
    check_shape("rope", rope, ("S", "positions", 2, "H"))
    if 2 * rope.shape[-1] > width:
        raise ValueError(
            f"expected rope to turn at most {width} elements, got {2 * rope.shape[-1]}"
        )
    return rope


def check_norm(name: str, weight: Tensor | None, loops: int, width: int) -> Tensor | None:
    """[1 or loops, width]."""
    if weight is None:
        return None
    check_floats(name, weight)
    if tuple(weight.shape) not in ((width,), (loops, width)):
        raise ValueError(
            f"expected {name} to be [{width}] or [{loops}, {width}], got {list(weight.shape)}"
        )
    return weight.reshape(-1, width)
