"""Weight-space merging from the formulas, one run of n elements at a time.

    delta_m = x_m - base                         M models
    soup    = base + scale sum_m w_m delta_m     or sum_m w_m x_m without a base
    merge   = base + scale combine_{m in A} w_m mask_m delta_m / divide_m,  A: who agrees

Arithmetic is float64; sums over models take their terms in ascending order, so that the order of
the models changes no bit. Choices (which elements are kept) look at delta as float32 rounds it,
and at random numbers that depend on (seed, name, model, position) alone, so that they are the
same everywhere. A NaN in any delta makes the result NaN and is never counted.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gemma_ext.reference.random_numbers import GENE, normals, uniforms

INFINITE = 0x7F800000
_WORD = 0xFFFFFFFF


# Rounding.


def rounded(x: Tensor, dtype: torch.dtype, noise: Tensor | None = None) -> Tensor:
    """float64 `x` in `dtype`, rounded once to nearest even.

    With `noise` (random words) and a 16-bit `dtype`, x as float32 is rounded to one of its two
    neighbours, to each in proportion to how near it is.
    """
    if dtype == torch.float64:
        return x
    single = x.float()
    if dtype == torch.float32:
        return single
    if noise is not None:
        return _stochastic(single, dtype, noise)
    # rounding to odd first: a conversion through float32 would round twice
    bits = single.view(torch.int32)
    exact = (single.double() == x) | ~x.isfinite() | ~single.isfinite()
    bits = torch.where(single.double().abs() > x.abs(), bits - 1, bits)
    return torch.where(exact, bits, bits | 1).view(torch.float32).to(dtype)


def _stochastic(x: Tensor, dtype: torch.dtype, noise: Tensor) -> Tensor:
    if dtype == torch.bfloat16:
        bits = x.view(torch.int32).long() & _WORD
        up = (bits + (noise & 0xFFFF)) >> 16 << 16
        up = torch.where(up >= 1 << 31, up - (1 << 32), up).int().view(torch.float32)
        return torch.where(x.isfinite(), up, x).to(dtype)
    # float16 keeps 11 bits, fewer below 2^-14; at most 32 bits of noise
    bits = x.abs().view(torch.int32).long()
    exponent = (bits >> 23).clamp(min=1)
    mantissa = torch.where(bits >> 23 > 0, bits & 0x7FFFFF | 0x800000, bits & 0x7FFFFF)
    shift = 13 + (113 - exponent).clamp(min=0)
    lost = (shift - 32).clamp(min=0, max=31)
    steps = ((mantissa >> lost) + (noise & ((1 << (shift - lost)) - 1))) >> (shift - lost)
    size = steps.double() * 2.0 ** (exponent + shift - 150).double()
    return torch.where(x.isfinite(), size.copysign(x), x.double()).to(dtype)


# What every merge begins with.


def deltas(x: Tensor, base: Tensor | None) -> Tensor:
    """x - base [M, n] float64."""
    return x.double() if base is None else x.double() - base.double()


def sum_models(terms: Tensor) -> Tensor:
    """The sum of terms [M, n] in ascending order; of none -0, which leaves any number as it is."""
    total = -terms.new_zeros(terms.shape[1:])
    for row in terms.sort(0).values:
        total = total + row
    return total


def weighted(w: Tensor, x: Tensor) -> Tensor:
    """w x; where w is 0, -0 (or NaN where x is not finite)."""
    y = w * x
    return torch.where(w == 0, -(y * y), y)


def soup(x: Tensor, base: Tensor | None, weights: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """float64 [n] of x [M, n], base [n], weights [M] or [M, n]."""
    mixed = sum_models(weighted(_column(weights), deltas(x, base)))
    return mixed if base is None else _moved(base, scale, mixed)


def _moved(base: Tensor | None, scale: float | Tensor, result: Tensor) -> Tensor:
    scale = torch.as_tensor(scale, dtype=torch.float64)
    return scale * result + 0.0 if base is None else base.double() + weighted(scale, result)


def _column(value: Tensor) -> Tensor:
    return value.double() if value.dim() == 2 else value.double().unsqueeze(-1)


# Selection by magnitude.


def keys(x: Tensor) -> Tensor:
    """|x| as float32 in 31 bits that order like it, int64; -1 where NaN."""
    bits = x.float().abs().view(torch.int32).long()
    return torch.where(bits > INFINITE, -1, bits)


def delta_keys(x: Tensor, base: Tensor | None) -> Tensor:
    """Keys [M, n] of the differences in float32."""
    return keys(x.float() if base is None else x.float() - base.float())


def variance_keys(x: Tensor, base: Tensor | None) -> Tensor:
    """Keys [1, n] of the population variance over the models, in float32, in ascending order."""
    d = (x.float() if base is None else x.float() - base.float()).sort(0).values
    count = torch.tensor(float(len(d)))
    mean = torch.zeros_like(d[0])
    for row in d:
        mean = mean + row
    mean = mean / count
    total = torch.zeros_like(mean)
    for row in d:
        total = total + (row - mean) * (row - mean)
    return keys(total / count).unsqueeze(0)


def cut(keys: Tensor, keep: int) -> tuple[int, int]:
    """(bits, ties): the `keep` largest keys [n] are those above `bits` and the first `ties` equal
    to it."""
    found = keys[keys >= 0].sort(descending=True).values
    keep = min(keep, len(found))
    if keep <= 0:
        return 0x7FFFFFFF, 0
    bits = int(found[keep - 1])
    return bits, keep - int((found > bits).sum())


def chosen(keys: Tensor, bits: int, ties: int) -> Tensor:
    """bool [n]: keys above `bits`, and the first `ties` equal to it."""
    equal = keys == bits
    return (keys > bits) | (equal & (equal.cumsum(-1) <= ties))


def row_order(keys: Tensor) -> Tensor:
    """Place of each key [R, C] in its row from the largest down, equals by column."""
    order = keys.sort(dim=-1, descending=True, stable=True).indices
    places = torch.arange(keys.shape[-1]).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


def rank_probabilities(keys: Tensor, density: float, epsilon: float, by_value: bool) -> Tensor:
    """float32 [R, C]: keep probabilities of MAGPRUNE (DELLA, arXiv 2406.11617), density - epsilon
    for the smallest of a row up to density + epsilon for the largest, linear in the rank, or
    `by_value` in the magnitude."""
    low, spread = torch.tensor(density - epsilon).float(), torch.tensor(2 * epsilon).float()
    if by_value:
        size = keys.clamp(min=0).int().view(torch.float32)
        least = torch.where(keys < 0, torch.inf, size).amin(-1, keepdim=True)
        reach = size.amax(-1, keepdim=True) - least
        share = torch.where(reach > 0, (size - least) / reach, 0.5)
    else:
        n = keys.shape[-1]
        place = (n - 1 - row_order(keys)).float()
        share = place / torch.tensor(float(n - 1)) if n > 1 else torch.full_like(place, 0.5)
    return low + spread * share


# Trim, elect, combine.


def merge(
    delta: Tensor,
    base: Tensor | None,
    weights: Tensor,
    *,
    mask: Tensor | None = None,
    divide: Tensor | None = None,
    alone: Tensor | None = None,
    scale: float = 1.0,
    election: str = "none",
    weighted: bool = True,
    zero: int = 1,
    combine: str = "sum",
) -> Tensor:
    """float64 [n] of delta [M, n], mask bool [M, n], weights, divide, alone [M] (divide may be
    [M, n]); the options are those of `gemma_ext.ops.souping.Rule`."""
    x, agree, _ = elect(
        delta,
        weights,
        mask=mask,
        divide=divide,
        election=election,
        weighted=weighted,
        zero=zero,
    )
    x = torch.where(agree, x, -0.0)
    count = agree.sum(0)
    if combine == "max":  # of two equals the positive one
        top = x.abs().amax(0)
        result = torch.where((x == top).any(0), top, -top)
    else:
        result = sum_models(x)
    if combine == "mean":
        result = result / count.clamp(min=1)
    if combine == "weighted_mean":
        total = sum_models(torch.where(agree, _column(weights), 0.0))
        result = result / torch.where(total == 0, 1.0, total)
    if alone is not None:
        factor = (_column(alone) * agree).sum(0)
        result = torch.where(count == 1, factor * result, result)
    return torch.where(delta.isnan().any(0), torch.nan, _moved(base, scale, result))


def elect(
    delta: Tensor,
    weights: Tensor,
    *,
    mask: Tensor | None = None,
    divide: Tensor | None = None,
    election: str = "none",
    weighted: bool = True,
    zero: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """(x [M, n]: masked, weighted deltas; agree [M, n]; elected sign before `zero` [n])."""
    mask = torch.ones_like(delta, dtype=torch.bool) if mask is None else mask
    y = torch.where(mask, delta, 0.0)
    y = y if divide is None else y / _column(divide)
    x = torch.where(mask, _column(weights) * y, 0.0)
    votes = x if weighted else y
    if election == "none":
        return x, mask, torch.zeros_like(x[0])
    sign = sum_models(votes.sign() if election == "count" else votes).sign()
    elected = torch.where(sign == 0, float(zero), sign)
    return x, mask & (votes != 0) & (votes.sign() == elected), sign


def norms(delta: Tensor, mask: Tensor | None) -> Tensor:
    """float64 [M, 2, 3]: L1, squared L2 and largest magnitude of delta [M, n], all and masked; NaN
    elements count as 0."""
    whole = delta.double().nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf).abs()
    kept = whole if mask is None else torch.where(mask, whole, 0.0)
    both = torch.stack([whole, kept], 1)
    top = both.amax(-1) if both.shape[-1] else both.new_zeros(both.shape[:2])
    return torch.stack([both.sum(-1), both.square().sum(-1), top], -1)


def gram(delta: Tensor) -> Tensor:
    """<delta_i, delta_j>, float64 [M, M]."""
    return delta.double() @ delta.double().T


def overlaps(mask: Tensor) -> Tensor:
    """int64 [M, 2]: in how many places of mask [M, n] a model stands alone, and with others."""
    count = mask.sum(0)
    return torch.stack([(mask & (count == 1)).sum(1), (mask & (count > 1)).sum(1)], -1)


def consensus(
    delta: Tensor,
    base: Tensor,
    lambdas: Tensor,
    *,
    votes: int,
    task: int | None = None,
    scale: float = 1.0,
) -> Tensor:
    """TALL masks (arXiv 2405.07813, eq. 5): model m uses an element where
    |delta_m| > lambda_m |sum_j delta_j - delta_m|; base + scale * sum_j delta_j where at least
    `votes` models use it, or where model `task` does."""
    total = sum_models(delta)
    uses = delta.abs() > _column(lambdas) * (total - delta).abs()
    where = uses.sum(0) >= votes if task is None else uses[task]
    merged = base.double() + scale * torch.where(where, total, 0.0)
    return torch.where(delta.isnan().any(0), torch.nan, merged)


def fisher(
    x: Tensor, base: Tensor | None, fishers: Tensor, weights: Tensor, floor: Tensor, add: float
) -> Tensor:
    """sum_m c_m F_m x_m / sum_m c_m F_m (arXiv 2111.09832, eq. 5), F_m = max(F_m, floor_m) + add;
    where the divisor is 0 the base, or without one sum_m c_m x_m / sum_m c_m."""
    c, x = _column(weights), x.double()
    f = c * (torch.maximum(fishers.double(), _column(floor)) + add)
    total = sum_models(f)
    plain = sum_models(c * x) / sum_models(c) if base is None else base.double()
    return torch.where(total == 0, plain, sum_models(f * x) / total)


def nearswap(x: Tensor, base: Tensor, t: float) -> Tensor:
    """base + clamp(t / max(|x - base|, 1e-6), 0, 1) (x - base), x [n]."""
    delta = x.double() - base.double()
    return base.double() + (t / delta.abs().clamp(min=1e-6)).clamp(0, 1) * delta


def gather_rows(sources: Sequence[Tensor], rows: Tensor) -> Tensor:
    """float64 [V, D]: mean over the models m with rows[v, m] >= 0 of sources[m][rows[v, m]]; zeros
    where there is none."""
    has = rows >= 0
    taken = [s.double()[r.clamp(min=0)] for s, r in zip(sources, rows.T, strict=True)]
    owned = [torch.where(h.unsqueeze(-1), t, -0.0) for h, t in zip(has.T, taken, strict=True)]
    count = has.sum(1, keepdim=True)
    return torch.where(count > 0, sum_models(torch.stack(owned)) / count.clamp(min=1), 0.0)


# Populations (GENOME, arXiv 2503.01155).


def mutate(x: Tensor, rate: float, sigma: float, key: int, model: int, offset: int) -> Tensor:
    """x + m sigma e with m ~ Bernoulli(rate), e ~ N(0, 1), float64 [n]."""
    hit = uniforms(key, model, GENE, offset, len(x)) < rate
    return x.double() + torch.where(hit, sigma * normals(key, model, offset, len(x)), 0.0)


def pick(x: Tensor, weights: Tensor, u: Tensor) -> Tensor:
    """x[m] with probability weights[m] / sum, by u [n]; weights [M] or [M, n], not negative."""
    share = _column(weights)
    bound = share.cumsum(0)
    chosen = (u * bound[-1] >= bound[:-1]).sum(0, keepdim=True)
    return x.double().gather(0, chosen.expand(1, x.shape[1])).squeeze(0)


def blend(x: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """BLX-alpha: sum_m w_m x_m clamped to [min - alpha I, max + alpha I], I = max - min."""
    x = x.double()
    low, high = x.amin(0), x.amax(0)
    reach = alpha * (high - low)
    return soup(x, None, weights).clamp(low - reach, high + reach)


def swarm(
    x: Tensor,
    v: Tensor,
    best: Tensor,
    group_best: Tensor,
    group_worst: Tensor,
    coefficients: Sequence[float],
    step: float,
) -> tuple[Tensor, Tensor]:
    """(x, v) after v = c0 v + c1 (best - x) + c2 (group_best - x) - c3 (group_worst - x),
    x = x + step v."""
    x, v, p, g, w = (t.double() for t in (x, v, best, group_best, group_worst))
    c0, c1, c2, c3 = coefficients
    v = c0 * v + c1 * (p - x) + c2 * (g - x) - c3 * (w - x)
    return x + step * v, v
