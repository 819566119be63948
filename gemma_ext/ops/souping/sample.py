"""Where a cut probably lies, from a few elements. Results do not depend on it, only their time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gemma_ext.ops.souping.inputs import tensors_of
from gemma_ext.ops.souping.parts import Part
from gemma_ext.ops.souping.plain import COARSE

ENOUGH = 1 << 20
"""Elements of a group from which on a sample is worth its time."""
SAMPLE = 1 << 14
DEVIATIONS = 6.0
"""Standard deviations of a quantile of the sample that a window reaches to either side."""


def window(
    parts: Sequence[Part], keep: Tensor, groups: Sequence[int], quantity: str
) -> Tensor | None:
    """int64 [G, S, 2]: bins (upper 15 bits of a magnitude) below and above those in which the cuts
    `keep` [G, S, C] should lie; None where a sample is not worth it."""
    sizes = [part.sources[0].numel() if part.sources else 0 for part in parts]
    totals = [
        sum(n for n, at in zip(sizes, groups, strict=True) if at == g) for g in range(len(keep))
    ]
    if min(totals) < ENOUGH or not all(
        x.is_contiguous() for part in parts for x in tensors_of(part)
    ):
        return None
    found = []
    for g, total in enumerate(totals):
        mine = [part for part, at in zip(parts, groups, strict=True) if at == g]
        step = total // SAMPLE | 1  # odd: a power of 2 would meet few columns of a matrix
        bins = torch.cat([_bins(part, step, quantity) for part in mine], -1)
        found.append(_around(bins, keep[g].to(bins.device), total))
    return torch.stack(found)


def _bins(part: Part, step: int, quantity: str) -> Tensor:
    """int32 [S, n] of every `step`-th element."""
    d = torch.stack([x.detach().view(-1)[::step].float() for x in part.sources])
    if part.base is not None:
        d = d - part.base.detach().view(-1)[::step].float()
    if quantity == "variance":
        d = (d - d.mean(0, keepdim=True)).square().mean(0, keepdim=True)
    return d.abs().view(torch.int32) >> 16


def _around(bins: Tensor, keep: Tensor, total: int) -> Tensor:
    """[S, 2] from sampled bins [S, n] and keep [S, C]."""
    n = bins.shape[-1]
    down = bins.sort(-1, descending=True).values.long()
    share = (keep.double() / total).clamp(0, 1)
    reach = DEVIATIONS * (share * (1 - share) * n).sqrt() + 1
    top = (share * n - reach).floor().long().amin(-1, keepdim=True)
    bottom = (share * n + reach).ceil().long().amax(-1, keepdim=True)
    above = torch.where(top < 0, COARSE - 1, down.gather(-1, top.clamp(0, n - 1)) + 1)
    below = torch.where(bottom >= n, -1, down.gather(-1, bottom.clamp(0, n - 1)) - 1)
    return torch.cat([below.clamp(min=-1), above.clamp(max=COARSE - 1)], -1)
