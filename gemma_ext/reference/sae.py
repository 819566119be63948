"""Encoders of sparse dictionaries from the formulas: all of p, then a choice of its entries.

    p = x W^T + b
    score = p * scale, or |p| * scale        N tokens, D width, F features, K chosen

A larger score goes first, equal ones by the lower index; -0 equals 0, and NaN is larger than any
number. The values are p itself.

| function | chooses | published as |
|---|---|---|
| `topk` | K of every row | TopK, Gao et al. 2024, arXiv 2406.04093; AbsTopK |
| `group_max` | one of every F / groups features | GroupMax, of sparsify |
| `batch_topk` | of all rows together, positive ones | BatchTopK, Bussmann et al. 2024, 2412.06410 |
| `threshold` | all above | ReLU; JumpReLU, Rajamanoharan et al. 2024, arXiv 2407.14435 |

In the last two, where the length of a row is open, a row with NaN scores lists the first of them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def pre_activations(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """p [N, F] of x [N, D] and weight [F, D], at least float32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    p = functional.linear(x.to(wide), weight.to(wide))
    return p if bias is None else p + bias.to(wide)


def scores(p: Tensor, scale: Tensor | None, *, magnitude: bool = False) -> Tensor:
    """What is compared."""
    score = p.detach().abs() if magnitude else p.detach()
    return score if scale is None else score * scale.detach().to(p.dtype)


def topk(p: Tensor, score: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of every row, best first: values [N, k] and indices [N, k]."""
    at = score.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    return p.gather(1, at), at.int()


def masked_topk(p: Tensor, score: Tensor, mask: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`topk` among the features of `mask` [F]; value 0 and index 0 behind the last of them."""
    allowed = mask.nonzero().squeeze(-1)
    values, at = topk(p[:, allowed], score[:, allowed], k)
    missing = k - values.shape[1]
    indices = allowed[at.long()].int()
    return functional.pad(values, (0, missing)), functional.pad(indices, (0, missing))


def group_max(p: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """The best of each of `groups` runs of F / groups features: values and indices [N, groups]."""
    n, features = p.shape
    size = features // groups
    values, at = topk(p.reshape(-1, size), p.detach().reshape(-1, size), 1)
    first = torch.arange(groups, device=p.device, dtype=torch.int32) * size
    return values.reshape(n, groups), at.reshape(n, groups) + first


def batch_topk(p: Tensor, score: Tensor, total: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The `total` largest positive scores of the batch, equal ones by row, then index.

    Returns:
        values and indices [total], row by row, ascending, value 0 and index 0 behind the last;
        offsets int64 [N + 1]; the smallest chosen score, inf without any.
    """
    allowed = (score > 0) | _first_nan(score)
    flat = score.masked_fill(~allowed, -torch.inf).flatten()
    count = min(total, int(allowed.sum()))
    chosen = flat.sort(descending=True, stable=True).indices[:count].sort().values
    mask = torch.zeros_like(flat, dtype=torch.bool).index_fill(0, chosen, True)
    values, indices, offsets = _compressed(p, mask.view_as(score))
    numbers = torch.where(flat[chosen] > 0, flat[chosen], torch.inf)
    least = torch.cat([numbers, numbers.new_full((1,), torch.inf)]).min()
    behind = (0, total - count)
    return functional.pad(values, behind), functional.pad(indices, behind), offsets, least


def threshold(
    p: Tensor, score: Tensor, limit: Tensor, *, inclusive: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Entries with score > limit [F], or >=: values, indices [nnz] and offsets int64 [N + 1]."""
    above = score >= limit if inclusive else score > limit
    return _compressed(p, above | _first_nan(score))


def padded(
    values: Tensor, indices: Tensor, offsets: Tensor, capacity: int
) -> tuple[Tensor, Tensor]:
    """Rows of equal length [N, capacity], 0 behind the last entry; NaN where a row is longer."""
    counts = offsets.diff().unsqueeze(-1)
    place = torch.arange(capacity, device=values.device)
    fits = counts <= capacity
    real = (place < counts) & fits
    at = (offsets[:-1].unsqueeze(-1) + place).clamp(max=max(len(values) - 1, 0))
    if len(values) == 0:
        values, indices = values.new_zeros(1), indices.new_zeros(1)
    return torch.where(real, values[at], 0.0).masked_fill(~fits, torch.nan), indices[at] * real


def _first_nan(score: Tensor) -> Tensor:
    nan = score.isnan()
    return nan & (nan.cumsum(-1) == 1)


def _compressed(p: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = mask.nonzero(as_tuple=True)
    offsets = functional.pad(mask.sum(-1).cumsum(0), (1, 0))
    return p[rows, columns], columns.int(), offsets
