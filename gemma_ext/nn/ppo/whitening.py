"""Moments and whitening of all tokens of a batch, over every rank.

y = (x - mean) / sqrt(var + eps)  [+ mean],   var = sum (x - mean)^2 / (n - 1 or n)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Moments(NamedTuple):
    """float64 scalars: how many elements, their mean and their variance (nan for none)."""

    count: Tensor
    mean: Tensor
    var: Tensor


def reduced_sum(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The sum of x over the ranks of `group`; x itself for None."""
    if group is None:
        return x
    x = x.clone()
    dist.all_reduce(x, group=group)
    return x


def moments(
    x: Tensor,
    mask: Tensor | None = None,
    *,
    unbiased: bool = True,
    group: dist.ProcessGroup | None = None,
) -> Moments:
    """Count, mean and variance of x (any shape) where `mask` is True, over the ranks of `group`.

    Args:
        unbiased: divide by n - 1 (at least 1), else by n.
        group: the ranks that hold one batch together, `torch.distributed.group.WORLD` for all;
            None is this process alone.
    """
    x = (x if mask is None else x[mask]).detach().double()
    count, total = reduced_sum(torch.stack([x.new_tensor(x.numel()), x.sum()]), group)
    mean = total / count
    squares = reduced_sum((x - mean).square().sum(), group)
    return Moments(count, mean, squares / ((count - 1).clamp(min=1) if unbiased else count))


def whiten(
    x: Tensor,
    mask: Tensor | None = None,
    *,
    shift_mean: bool = True,
    unbiased: bool = True,
    eps: float = 1e-8,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """x with variance 1, and mean 0 unless `shift_mean` is False; 0 where `mask` is False.

    Args:
        x: [N] packed, or [B, T] with a bool mask of its shape.
        unbiased: Bessel's correction, as in trl; PAR's code has the biased variance.
        eps, group: added to the variance; as in `moments`.

    Returns:
        The shape and dtype of x. One token alone has variance 0.
    """
    if mask is not None and (mask.shape != x.shape or mask.dtype != torch.bool):
        raise ValueError(
            f"expected mask to be bool {list(x.shape)}, got {mask.dtype} {list(mask.shape)}"
        )
    _, mean, var = moments(x, mask, unbiased=unbiased, group=group)
    white = (x.double() - mean) / (var + eps).sqrt()
    if not shift_mean:
        white = white + mean
    white = white.to(x.dtype)
    return white if mask is None else white.masked_fill(~mask, 0)
