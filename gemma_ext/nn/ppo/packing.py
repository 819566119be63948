"""Responses of different lengths as one packed vector.

    x[N] = responses 0 .. B-1 one after another, N = sum_b lengths[b];  rows[n] = b of token n

`lengths` [B] is all that any function here needs to tell them apart, and there is no padding to
mask. Of a padded mask [B, T] it is `mask.sum(1)`, and `x[mask]` is the packed vector.
"""

from __future__ import annotations

import torch
from torch import Tensor


def check_lengths(lengths: Tensor, tokens: int) -> None:
    """Raise unless `lengths` is an integer vector, not negative, that sums to `tokens`."""
    if lengths.ndim != 1 or lengths.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"expected lengths to be int32 or int64 of shape [B], got {lengths.dtype} of shape "
            f"{list(lengths.shape)}"
        )
    total = int(lengths.sum())
    if total != tokens or bool((lengths < 0).any()):
        raise ValueError(f"expected lengths >= 0 with sum N = {tokens}, got the sum {total}")


def rows_of(lengths: Tensor) -> Tensor:
    """The sequence of each packed token: int64 [N] of `lengths` [B]."""
    return torch.repeat_interleave(lengths.long())


def spread(x: Tensor, lengths: Tensor) -> Tensor:
    """One value per sequence [B] given to each of its tokens [N]."""
    if x.shape != lengths.shape:
        raise ValueError(f"expected x to be {list(lengths.shape)}, got {list(x.shape)}")
    return torch.repeat_interleave(x, lengths.long())


def sequence_sum(x: Tensor, lengths: Tensor) -> Tensor:
    """Sum of the packed x [N] over each sequence, [B]; 0 where a sequence has no token.

    Every sequence is summed alone and in order, so its sum does not depend on its neighbours.
    """
    check_lengths(lengths, len(x))
    return torch.segment_reduce(x, "sum", lengths=lengths.long(), unsafe=True, initial=0)


def padded(x: Tensor, mask: Tensor, fill: float = 0.0) -> Tensor:
    """Packed x [N] laid out as `mask` [B, T], with `fill` where it is False."""
    out = x.new_full(mask.shape, fill)
    out[mask] = x
    return out
