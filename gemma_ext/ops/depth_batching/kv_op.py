"""The ops of rows and pages as torch sees them."""

from __future__ import annotations

import torch

from gemma_ext.ops._derivatives import refuse_derivatives

_REMEDY = "rows of a serving engine have none; a model is trained through its own forward"

depth_compact = torch.ops.gemma_ext.depth_compact
rope_kv_write = torch.ops.gemma_ext.rope_kv_write
paged_attn_mixed_depth = torch.ops.gemma_ext.paged_attn_mixed_depth
kv_copy = torch.ops.gemma_ext.kv_copy

for _name in ("depth_compact", "rope_kv_write", "paged_attn_mixed_depth", "kv_copy"):
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
def _copy_fake(*given):
    return None
