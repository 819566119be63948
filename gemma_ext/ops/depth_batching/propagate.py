"""State propagation: K and V of skipped loops from the hidden state that a token left with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gemma_ext.ops.depth_batching.inputs import check_like, check_rows, check_shape
from gemma_ext.ops.depth_batching.rope import rope_kv_write
from gemma_ext.reference import depth_batching as formulas


@dataclass(frozen=True)
class Projection:
    """x W^T + b + (x A_j^T) B_j^T at loop j.

    Attributes:
        weight: W [out, D]. bias: b [out] or None.
        lora_a, lora_b: [B, r, D] and [B, out, r], or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None


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
    check_like("h", h, "kv_pool", kv_pool)
    no_queries = h.new_empty(n, 0, kv_pool.shape[5])
    for at, layer in enumerate(layers):
        loops = layer.depth_of.shape[0]
        for loop in range(1, loops):
            x = _normed(h, layer.norm, loop, eps, plus_one)
            k, v = (
                _projected(x, p, loop).reshape(n, *kv_pool.shape[3:6:2]) for p in (layer.k, layer.v)
            )
            skipped = torch.where(row_loop < loop, row_req, -1)
            rope_kv_write(
                no_queries, k, v, kv_pool, block_tables, skipped, row_pos,
                torch.full_like(row_loop, loop), layer.depth_of, rope=rope, rope_of=layer.rope_of,
                k_norm=layer.k_norm, eps=eps, plus_one=plus_one,
                fill_mark=fill_mark if at + 1 == len(layers) else None, impl=impl,
            )  # fmt: skip


def _normed(h: Tensor, weight: Tensor, loop: int, eps: float, plus_one: bool) -> Tensor:
    own = weight[loop] if weight.dim() == 2 else weight
    wide = torch.promote_types(h.dtype, torch.float32)
    return formulas.rms_norm(h.to(wide), own.to(wide), eps, plus_one).to(h.dtype)


def _projected(x: Tensor, p: Projection, loop: int) -> Tensor:
    """Row by row: a product's bits depend on how many rows share it."""
    rows = []
    for row in x:
        y = torch.nn.functional.linear(row, p.weight, p.bias)
        if p.lora_a is not None:
            y = y + (row @ p.lora_a[loop].T) @ p.lora_b[loop].T
        rows.append(y)
    return torch.stack(rows) if rows else x.new_empty(0, p.weight.shape[0])
