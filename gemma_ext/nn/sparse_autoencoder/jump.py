"""Straight-through estimators of JumpReLU (arXiv 2407.14435, equations 11 and 12).

Both take raw pre-activations p, never f: with f the rectangle would see only the half of its
window that lies above the threshold, and the gradient of the sparsity term would be halved.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def jump(
    p: Tensor,
    threshold: Tensor,
    bandwidth: float,
    *,
    inclusive: bool = False,
    to_input: bool = False,
) -> Tensor:
    """p where p > threshold, else 0.

    Gradients: of p, those of the values that pass; of the threshold,
    -(threshold / bandwidth) K((p - threshold) / bandwidth), K(u) = 1 for |u| < 1/2.

    Args:
        p, threshold: same shape.
        bandwidth: width of the window.
        inclusive: p = threshold passes.
        to_input: p also receives the negated estimator of the threshold (Anthropic, 2025).
    """
    return _Jump.apply(p, threshold, bandwidth, inclusive, to_input)


def step(
    p: Tensor,
    threshold: Tensor,
    bandwidth: float,
    *,
    inclusive: bool = False,
    to_input: bool = False,
) -> Tensor:
    """1 where p > threshold, else 0; the threshold's gradient is -K(.) / bandwidth; see `jump`."""
    return _Step.apply(p, threshold, bandwidth, inclusive, to_input)


def _passes(p: Tensor, threshold: Tensor, inclusive: bool) -> Tensor:
    return ~(p < threshold) if inclusive else ~(p <= threshold)  # NaN passes and stays visible


class _Jump(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, p: Tensor, threshold: Tensor, bandwidth: float, inclusive: bool, to_input: bool
    ) -> Tensor:
        ctx.save_for_backward(p, threshold)
        ctx.options = bandwidth, inclusive, to_input
        return torch.where(_passes(p, threshold, inclusive), p, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        p, threshold = ctx.saved_tensors
        bandwidth, inclusive, to_input = ctx.options
        estimate = _window(p, threshold, bandwidth) * threshold / bandwidth * grad
        through = torch.where(_passes(p, threshold, inclusive), grad, 0)
        return through + estimate if to_input else through, -estimate, None, None, None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, p: Tensor, threshold: Tensor, bandwidth: float, inclusive: bool, to_input: bool
    ) -> Tensor:
        ctx.save_for_backward(p, threshold)
        ctx.options = bandwidth, to_input
        return _passes(p, threshold, inclusive).to(p.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        p, threshold = ctx.saved_tensors
        bandwidth, to_input = ctx.options
        estimate = _window(p, threshold, bandwidth) / bandwidth * grad
        return estimate if to_input else None, -estimate, None, None, None


def _window(p: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    return ((p - threshold).abs() < bandwidth / 2).to(p.dtype)
