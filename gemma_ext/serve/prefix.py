"""Keys and values of trained prefixes, which stand in front of every prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from gemma_ext.ops.depth_batching.linear import seg_depth_lora
from gemma_ext.reference.depth_batching import rms_norm
from gemma_ext.serve.policies import Depths
from gemma_ext.serve.weights import Weights


@torch.inference_mode()
def prefix_kv(model: Weights, depths: Depths, pool: Tensor, impl: str) -> Tensor:
    """[P, L, 2, n_kv, hd] of the pool of keys and values [L, pages, 2, n_kv, 16, hd], not turned.

    Args:
        model: has prefixes.
        depths: of its layers in the pool.
        impl: of the ops.
    """
    count, wide = model.prefix, torch.promote_types(pool.dtype, torch.float32)
    found = pool.new_zeros(count, depths.count, 2, model.kv_heads, model.head_dim)
    seg = count * torch.arange(model.loops + 1, dtype=torch.int32, device=pool.device)
    layers = (*model.prelude, *model.block, *model.coda)
    places = (*depths.prelude, *depths.block, *depths.coda)
    for layer, place in zip(layers, places, strict=True):
        made = seg_depth_lora(layer.prefix.flatten(0, 1), layer.qkv[1:], seg, impl=impl)
        k, v = (y.unflatten(1, (-1, model.head_dim)) for y in made)
        if layer.k_norm is not None:
            k = rms_norm(k.to(wide), layer.k_norm.to(wide), model.eps, model.plus_one)
        for loop, depth in enumerate(place.tolist()):
            own = slice(loop * count, (loop + 1) * count)
            found[:, depth, 0], found[:, depth, 1] = k[own].to(found.dtype), v[own]
    return found
