"""Norms and linear layers of a batch whose rows stand at different loops, from the formulas.

n rows, S slots of the hidden bank, D and F widths, B loops, r the rank of a module. Rows are sorted
by loop: those of loop j are seg_offsets[j] .. seg_offsets[j + 1]. Continuous depth-wise batching:
Bae et al. 2024, arXiv 2410.20672, appendix K, there with the LoRAs of all loops concatenated.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

ACTIVATIONS = ("gelu_tanh", "silu")


def rms_norm(x: Tensor, weight: Tensor, eps: float, plus_one: bool) -> Tensor:
    """x / sqrt(mean x^2 + eps) * (weight, or 1 + weight), at least float32 and not rounded."""
    wide = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    x, w = x.to(wide), weight.to(wide)
    unit = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return unit * (1 + w if plus_one else w)


def gather_rms_norm(
    bank: Tensor, slots: Tensor, weight: Tensor, eps: float, *, plus_one: bool
) -> Tensor:
    """Norms of bank[slots] [n, D] in the dtype of `weight`; 0 where a slot is negative."""
    rows = rms_norm(bank[slots.long().clamp(min=0)], weight, eps, plus_one=plus_one)
    return torch.where(slots.unsqueeze(-1) < 0, 0, rows).to(weight.dtype)


def scatter_rms_norm(
    bank: Tensor,
    slots: Tensor,
    y: Tensor,
    weight: Tensor | None,
    next_weight: Tensor | None,
    eps: float,
    *,
    plus_one: bool,
) -> Tensor | None:
    """bank[slots] += y, or the norm of y by `weight`, with one rounding; the norm of what the rows
    are then by `next_weight`, as `gather_rms_norm` gives it."""
    own = slots >= 0
    at = slots[own].long()
    wide = torch.promote_types(torch.promote_types(bank.dtype, y.dtype), torch.float32)
    step = y.to(wide) if weight is None else rms_norm(y, weight, eps, plus_one=plus_one).to(wide)
    bank[at] = (bank[at].to(wide) + step[own]).to(bank.dtype)
    if next_weight is None:
        return None
    return gather_rms_norm(bank, slots, next_weight, eps, plus_one=plus_one)


def by_rows(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """f of every row of x [n, ...] by itself: functions such as exp round otherwise at the end of
    a tensor, where vectors of it are not full."""
    return torch.stack([f(row) for row in x]) if x.shape[0] else f(x)


def row_products(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T [n, F] of x [n, D] and weight [F, D] of one dtype, row by row.

    A product of matrices takes other sums for other n. Each row is copied first, since a product
    with a vector may begin its sums by where that lies in memory.
    """
    if x.shape[0] == 0:
        return x.new_empty(0, weight.shape[0])
    return torch.stack([torch.mv(weight, row.clone()) for row in x.contiguous()])


def segmented_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    seg_offsets: Tensor | None,
    scale: float,
) -> Tensor:
    """y = x W^T + bias + scale (x A_j^T) B_j^T, at least float32 and not rounded, of x [n, D],
    weight [F, D], a [B, r, D] and b [B, F, r]. What comes between A and B is rounded to the dtype
    of x. Rows outside every segment have no adapter. A row has the bits that it has alone."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y = row_products(x.to(wide), weight.to(wide))
    if bias is not None:
        y = y + bias.to(wide)
    if a is None or b is None or seg_offsets is None:
        return y
    ends = seg_offsets.tolist()
    for j, (begin, end) in enumerate(itertools.pairwise(ends)):
        low = (scale * row_products(x[begin:end].to(wide), a[j].to(wide))).to(x.dtype)
        y[begin:end] += row_products(low.to(wide), b[j].to(wide))
    return y


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(gate) * up: GeGLU with the tanh form of GELU, or SwiGLU."""
    if activation == "gelu_tanh":
        return by_rows(lambda x: functional.gelu(x, approximate="tanh"), gate) * up
    return by_rows(functional.silu, gate) * up


def seg_depth_lora(
    x: Tensor,
    projections: Sequence[tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]],
    seg_offsets: Tensor | None,
    scale: float,
    activation: str | None,
) -> list[Tensor]:
    """One [n, F] in the dtype of x of every (weight, bias, a, b), or their product when gated."""
    ys = [segmented_linear(x, w, bias, a, b, seg_offsets, scale) for w, bias, a, b in projections]
    if activation is not None:
        ys = [gated(*ys, activation)]
    return [y.to(x.dtype) for y in ys]
