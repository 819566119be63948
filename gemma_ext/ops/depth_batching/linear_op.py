"""The ops of norms and linear layers as torch sees them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gemma_ext.ops._derivatives import refuse_derivatives

if TYPE_CHECKING:
    from gemma_ext.ops.depth_batching.linear import Projection

ACTIVATIONS = (None, "gelu_tanh", "silu")
_ops = torch.ops.gemma_ext
_REMEDY = "it serves; the same functions with impl='reference' have derivatives"


def gather_rms_norm(
    bank: Tensor, slots: Tensor, weight: Tensor, eps: float, plus_one: bool
) -> Tensor:
    return _ops.depth_gather_rms_norm.default(bank, slots, weight, eps, plus_one)


def scatter_rms_norm(
    bank: Tensor,
    slots: Tensor,
    y: Tensor,
    weight: Tensor | None,
    next_weight: Tensor | None,
    eps: float,
    plus_one: bool,
) -> Tensor:
    """The next norm, [0, D] without a weight of it."""
    return _ops.depth_scatter_rms_norm.default(bank, slots, y, weight, next_weight, eps, plus_one)


def depth_linear(
    x: Tensor,
    projections: Sequence[Projection],
    seg_offsets: Tensor | None,
    scale: float,
    activation: str | None,
) -> Tensor:
    """[n, sum of F], or [n, F] with an activation."""
    empty = x.new_empty(0)
    return _ops.depth_linear.default(
        x,
        [p.weight for p in projections],
        [empty if p.bias is None else p.bias for p in projections],
        [empty if p.lora_a is None else p.lora_a for p in projections],
        [empty if p.lora_b is None else p.lora_b for p in projections],
        seg_offsets,
        scale,
        ACTIVATIONS.index(activation),
    )


for _name in ("depth_gather_rms_norm", "depth_scatter_rms_norm", "depth_linear"):
    refuse_derivatives(_name, _REMEDY)


@torch.library.register_fake("gemma_ext::depth_gather_rms_norm")
def _gather_fake(bank, slots, weight, eps, plus_one):
    return weight.new_empty(slots.shape[0], bank.shape[1])


@torch.library.register_fake("gemma_ext::depth_scatter_rms_norm")
def _scatter_fake(bank, slots, y, weight, next_weight, eps, plus_one):
    like = bank if next_weight is None else next_weight
    return like.new_empty(0 if next_weight is None else slots.shape[0], bank.shape[1])


@torch.library.register_fake("gemma_ext::depth_linear")
def _linear_fake(x, weights, biases, a, b, seg_offsets, scale, activation):
    width = weights[0].shape[0] if activation else sum(w.shape[0] for w in weights)
    return x.new_empty(x.shape[0], width)
