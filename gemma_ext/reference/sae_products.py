"""Products of sparse codes with dictionaries, and steering, from their formulas.

Entries are flat: `values` [E], the `rows` [E] (token, N for entries of nobody) and `indices` [E]
(feature) they belong to. Differentiable to any order; memory is that of [E, D].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def decode(
    values: Tensor, rows: Tensor, indices: Tensor, weight: Tensor, bias: Tensor | None, n: int
) -> Tensor:
    """out_n = b + sum_j v_nj W_{i_nj}: [N, D]."""
    out = values.new_zeros(n + 1, weight.shape[1])
    out = out.index_add(0, rows, values.unsqueeze(-1) * weight[indices])[:n]
    return out if bias is None else out + bias


def dots(values_like: Tensor, rows: Tensor, indices: Tensor, weight: Tensor, x: Tensor) -> Tensor:
    """<x_n, W_i> of each entry: [E]; 0 for entries of nobody."""
    padded = torch.cat([x, x.new_zeros(1, x.shape[1])])
    return (padded[rows] * weight[indices]).sum(-1).to(values_like.dtype)


def scatter(
    values: Tensor, rows: Tensor, indices: Tensor, x: Tensor, features: int
) -> tuple[Tensor, Tensor]:
    """(sum_n f_ni x_n [F, D], sum_n f_ni [F])."""
    padded = torch.cat([x, x.new_zeros(1, x.shape[1])])
    sums = values.new_zeros(features, x.shape[1])
    sums = sums.index_add(0, indices, values.unsqueeze(-1) * padded[rows])
    real = torch.where(rows < x.shape[0], values, torch.zeros_like(values))
    return sums, values.new_zeros(features).index_add(0, indices, real)


def nested_errors(
    values: Tensor,
    rows: Tensor,
    indices: Tensor,
    levels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    count: int,
) -> Tensor:
    """|b + sum_{j: level_j <= m} v_nj W_j - x_n|^2 for m < count: [N, count]."""
    found = []
    for m in range(count):
        kept = values * (levels <= m)
        out = decode(kept, rows, indices, weight, bias, target.shape[0])
        found.append((out - target).square().sum(-1))
    return torch.stack(found, -1) if found else values.new_zeros(target.shape[0], 0)


class ProjectGradient(torch.autograd.Function):
    """W, with gradients that leave out what is parallel to each row (sae-kernels 5a)."""

    @staticmethod
    def forward(ctx, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (weight,) = ctx.saved_tensors
        return without_parallel(grad, weight)


def without_parallel(grad: Tensor, weight: Tensor) -> Tensor:
    """grad_i - <grad_i, W_i> W_i / |W_i|^2; a row of zeros is parallel to nothing."""
    square = weight.square().sum(-1, keepdim=True)
    along = (grad * weight).sum(-1, keepdim=True) / torch.where(square > 0, square, 1.0)
    return grad - along * weight


class RowSparseGradient(torch.autograd.Function):
    """W, with gradients of the rows `touched` only, as sparse COO."""

    @staticmethod
    def forward(ctx, weight: Tensor, touched: Tensor) -> Tensor:
        ctx.save_for_backward(touched)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (touched,) = ctx.saved_tensors
        return row_sparse(touched, grad[touched], grad.shape[0]), None


def row_sparse(rows: Tensor, values: Tensor, count: int) -> Tensor:
    """Sparse COO [count, D] of ascending `rows` and their `values` [len(rows), D]."""
    size = (count, values.shape[1])
    return torch.sparse_coo_tensor(
        rows.unsqueeze(0), values, size, is_coalesced=True, check_invariants=False
    )


def firing(x: Tensor, encoder: Tensor, bias: Tensor, threshold: Tensor) -> Tensor:
    """f = p 1[p > theta], p = x . w + b: [..., S]."""
    p = x @ encoder.T + bias
    return torch.where(p > threshold, p, torch.zeros_like(p))


def increments(mode: str, f: Tensor, projection: Tensor, level: Tensor) -> Tensor:
    """What a direction is added with, but for its strength (sae-detox C, D)."""
    return {
        "add": torch.ones_like(f),
        "ablate": -f,
        "clamp": level - f,
        "min_clamp": (level - f).clamp(min=0),
        "scale": (level - 1) * f,
        "project": (level - 1) * projection,
        "cap": (level - projection).clamp(max=0),
    }[mode]


def added(x: Tensor, amounts: Sequence[Tensor], directions: Sequence[Tensor]) -> Tensor:
    """x + sum_s u_s d_s, and the bits of x where every u is 0."""
    if not amounts:
        return x.clone()
    total = x
    for u, d in zip(amounts, directions, strict=True):
        total = total + u.unsqueeze(-1) * d
    still = torch.stack([u == 0 for u in amounts]).all(0).unsqueeze(-1)
    return torch.where(still, WithBits.apply(total, x), total)


class WithBits(torch.autograd.Function):
    """The value of another tensor, the gradient of this one: x + 0 d is not x where x is -0."""

    @staticmethod
    def forward(ctx, total: Tensor, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
