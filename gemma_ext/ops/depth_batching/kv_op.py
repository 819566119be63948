"""The ops of rows and pages as torch sees them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gemma_ext.ops._derivatives import refuse_derivatives

if TYPE_CHECKING:
    from gemma_ext.ops.depth_batching.propagate import DeeperLayer

_REMEDY = "rows of a serving engine have none; a model is trained through its own forward"

depth_compact = torch.ops.gemma_ext.depth_compact
rope_kv_write = torch.ops.gemma_ext.rope_kv_write
paged_attn_mixed_depth = torch.ops.gemma_ext.paged_attn_mixed_depth
kv_copy = torch.ops.gemma_ext.kv_copy


def kv_propagate(
    h: Tensor,
    layers: Sequence[DeeperLayer],
    kv_pool: Tensor,
    places: tuple[Tensor, Tensor, Tensor, Tensor],
    rope: Tensor | None,
    eps: float,
    plus_one: bool,
    fill_mark: Tensor | None,
) -> None:
    """`places`: block_tables, row_req, row_pos and row_loop."""
    projections = [p for layer in layers for p in (layer.k, layer.v)]
    floats, ints = h.new_empty(0), places[1].new_empty(0)

    def given(values: Sequence[Tensor | None], absent: Tensor) -> list[Tensor]:
        return [absent if x is None else x for x in values]

    torch.ops.gemma_ext.kv_propagate.default(
        h,
        kv_pool,
        *places,
        [layer.norm.reshape(-1, h.shape[1]) for layer in layers],
        [p.weight for p in projections],
        given([p.bias for p in projections], floats),
        given([p.lora_a for p in projections], floats),
        given([p.lora_b for p in projections], floats),
        [layer.depth_of for layer in layers],
        given([layer.rope_of for layer in layers], ints),
        [
            floats if layer.k_norm is None else layer.k_norm.reshape(-1, kv_pool.shape[5])
            for layer in layers
        ],
        rope,
        eps,
        plus_one,
        fill_mark,
    )


_OPS = ("depth_compact", "rope_kv_write", "paged_attn_mixed_depth", "kv_copy", "kv_propagate")
for _name in _OPS:
    refuse_derivatives(_name, _REMEDY)


@torch.library.register_fake("gemma_ext::depth_compact")
def _compact_fake(loop, leave, drop, loops):
    return tuple(
        loop.new_empty(size, dtype=torch.int32)
        for size in (loop.shape[0], loop.shape[0], loops + 1, 3)
    )


@torch.library.register_fake("gemma_ext::rope_kv_write")
def _rope_kv_write_fake(q, *rest):
    return q.new_empty(q.shape)


@torch.library.register_fake("gemma_ext::paged_attn_mixed_depth")
def _attention_fake(q, *rest):
    return q.new_empty(q.shape)


@torch.library.register_fake("gemma_ext::kv_copy")
@torch.library.register_fake("gemma_ext::kv_propagate")
def _write_fake(*given):
    return None
