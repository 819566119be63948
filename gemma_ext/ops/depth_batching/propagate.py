"""State propagation: K and V of skipped loops from the hidden state that a token left with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gemma_ext.ops.depth_batching.inputs import check_like, check_rows, check_shape
from gemma_ext.ops.depth_batching.linear import Projection, seg_depth_lora
from gemma_ext.ops.depth_batching.norm import gather_rms_norm
from gemma_ext.ops.depth_batching.rope import rope_kv_write


@dataclass(frozen=True)
class DeeperLayer:
    """What of a stored layer makes K and V.

    Attributes:
        norm: RMSNorm weight before the projections, [D], or [B, D] by loop.
        k, v: projections to n_kv * hd.
        depth_of, rope_of, k_norm: as `rope_kv_write` takes them.
    """

    norm: Tensor
    k: Projection
    v: Projection
    depth_of: Tensor
    rope_of: Tensor | None = None
    k_norm: Tensor | None = None


def kv_propagate(
    h: Tensor,
    layers: Sequence[DeeperLayer],
    kv_pool: Tensor,
    block_tables: Tensor,
    row_req: Tensor,
    row_pos: Tensor,
    row_loop: Tensor,
    *,
    rope: Tensor | None = None,
    eps: float = 1e-6,
    plus_one: bool = False,
    fill_mark: Tensor | None = None,
    impl: str = "auto",
) -> None:
    """Write K and V of every loop after a row's last one, in every layer, as if h were its input.

    What CALM calls state propagation: exact only where blocks change nothing.

    Args:
        h: [n, D], the hidden state after the last loop, in the dtype of kv_pool.
        layers: every stored layer of the block.
        kv_pool, block_tables, row_req, row_pos: as `rope_kv_write` takes them.
        row_loop: int32 [n], the last loop that a row ran.
        rope, fill_mark: as `rope_kv_write` takes them; fill_mark is raised to B.
        eps, plus_one: of every norm.
        impl: "auto" or "reference".

    Raises:
        ValueError, TypeError: what does not fit.
    """
    n = check_rows(kv_pool, block_tables, row_req, row_pos, row_loop)
    check_shape("h", h, (n, "D"))
    check_like("h", h, kv_pool)
    no_queries = h.new_empty(n, 0, kv_pool.shape[5])
    every = torch.arange(n, dtype=torch.int32, device=h.device)
    for at, layer in enumerate(layers):
        loops, adapted = layer.depth_of.shape[0], any(p.loops for p in (layer.k, layer.v))
        k = v = None
        for loop in range(1, loops):
            if k is None or adapted or layer.norm.dim() == 2:
                norm = layer.norm[loop] if layer.norm.dim() == 2 else layer.norm
                x = gather_rms_norm(h, every, norm, eps=eps, plus_one=plus_one, impl=impl)
                bounds = _all_at(loop, loops, n, h.device) if adapted else None
                k, v = seg_depth_lora(x.to(h.dtype), (layer.k, layer.v), bounds, impl=impl)
            rope_kv_write(
                no_queries,
                *(y.unflatten(1, kv_pool.shape[3:6:2]) for y in (k, v)),
                kv_pool,
                block_tables,
                torch.where(row_loop < loop, row_req, -1),
                row_pos,
                torch.full_like(row_loop, loop),
                layer.depth_of,
                rope=rope,
                rope_of=layer.rope_of,
                k_norm=layer.k_norm,
                eps=eps,
                plus_one=plus_one,
                fill_mark=fill_mark if at + 1 == len(layers) else None,
                impl=impl,
            )


def _all_at(loop: int, loops: int, n: int, device: torch.device) -> Tensor:
    """Bounds of segments, all rows in one."""
    return (torch.arange(loops + 1, device=device) > loop).to(torch.int32) * n
