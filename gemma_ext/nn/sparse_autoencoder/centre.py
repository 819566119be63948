"""The gradient of a centre that is subtracted from an encoder's input.

    p = (x - c) Wᵀ + b,    dL/dc = -(Σ_n q_n) W,    q = dL/dp

x - c enters the product as a constant, and the bias carries the gradient: one product of a vector
with the encoder is all that it costs, and no gradient of the input is needed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def centred_bias(bias: Tensor, centre: Tensor, weight: Tensor) -> Tensor:
    """The bias [F] as it is, with the gradient of the centre [D] behind it; weight [F, D]."""
    return _CentredBias.apply(bias, centre, weight)


class _CentredBias(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, bias: Tensor, centre: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.dtype = centre.dtype
        return bias.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return grad, -(grad.to(weight.dtype) @ weight).to(ctx.dtype), None
