"""The sampled backward of cut cross-entropy, from its definition, with the logits materialised.

The vocabulary is cut into tiles of 256 consecutive ids; a strip is one row and one tile. With
a = d_nll + d_lse + d_m, b = d_nll, q = d_m (upstream of nll, lse and the mean logit m) the gradient
of the logits before cap and temperature is

    G_nv = w_nj p_nv (a + q (s_nv - m_n)) ds/da - b 1{v = label} ds/da

where w is 1 in the exact backward, and here 0 or at least 1, with mean 1, drawn per strip:

    m_nj = sum_{v in j} p_nv T ds/da        r_nj = m_nj max(1, |max_{v in j} s_nv - m_n|)
    x_nj = |a| m_nj + |q| r_nj              u_nj = x_nj / (tau ref_n)
    scale_n = max(|a|, |b|, |q|)            ref_n = min(scale_n, mean of the scales that are not 0)

The strip of the label and strips with u >= 1 are kept with w = 1. The others are sampled along the
row: a phase that starts at the row's draw gains u at each of them, and a strip over which it passes
a whole number is kept with w = 1 / u. So the weighted masses of a row sum to its mass within
tau ref. Phases are 32-bit fractions of a turn; the draw is the first word of philox2x32-10.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gemma_ext.reference.cce import logits, losses

TILE = 256
TAUS = tuple(2.0**-k for k in range(6, 13))
AUTO_ERROR = 2.0**-6
BREAK_EVEN = 0.6  # kept share above which exact is faster on a CPU

_WORD = 0xFFFFFFFF
_MULTIPLIER, _INCREMENT = 0xD256D193, 0x9E3779B9  # Salmon et al., SC 2011


class SampledGradients(NamedTuple):
    """Gradients of the sampled backward and what they are made of.

    Attributes:
        de: [N, D]. dc: [V, D]. dbias: [V] (of a zero bias when there is none).
        weight: [N, ceil(V / 256)], 0 where a strip is left out.
        size: [N, ceil(V / 256)] x of a strip; label: the same, bool, whether it holds the label.
        kept_fraction: kept strips over the strips of rows that have an upstream gradient.
    """

    de: Tensor
    dc: Tensor
    dbias: Tensor
    weight: Tensor
    size: Tensor
    label: Tensor
    kept_fraction: float


class Forecast(NamedTuple):
    """What a threshold makes of rows of equal upstream gradient.

    Attributes:
        kept: share of the strips of valid rows, expected; 1 for no rows.
        error: relative standard error of dE, were the rows of c orthogonal and of equal length.
    """

    kept: float
    error: float


class _Strips(NamedTuple):
    """m, max s and whether the label lies in a strip [N, tiles]; s, p, T ds/da [N, V]; nll [N]."""

    mass: Tensor
    top: Tensor
    label: Tensor
    s: Tensor
    p: Tensor
    slope: Tensor
    nll: Tensor


def philox(first: Tensor, second: Tensor, key: int) -> tuple[Tensor, Tensor]:
    """philox2x32-10 of counters (first, second), int64 tensors of 32-bit words."""
    for _ in range(10):
        # the 64-bit product of two words in halves of the second, which int64 holds
        low = _MULTIPLIER * (first & 0xFFFF)
        high = _MULTIPLIER * (first >> 16) + (low >> 16)
        first, second = (high >> 16) ^ key ^ second, (high & 0xFFFF) << 16 | low & 0xFFFF
        key = key + _INCREMENT & _WORD
    return first, second


def draws(rows: Tensor, lse: Tensor, seed: int) -> Tensor:
    """[N] int64, the 32-bit phase at which each row starts.

    Args:
        rows: [N] int64 position of the row in e. lse: [N], of which the float32 bits count.
        seed: any int64.
    """
    bits = lse.float().contiguous().view(torch.int32).long() & _WORD
    return philox(rows & _WORD, bits, (seed ^ seed >> 32) & _WORD)[0]


def sample(u: Tensor, start: Tensor, taken: Tensor) -> Tensor:
    """Weights [N, tiles] for inclusion probabilities u; 1 and outside the draw where `taken`."""
    draw = ~taken & (u < 1)
    step = (u.float().double() * 2.0**32).long().clamp(min=1)
    step = torch.where(draw & (u > 0), step, torch.zeros_like(step))
    after = start[:, None] + step.cumsum(1)
    passed = (after >> 32) > (after - step >> 32)
    weight = torch.where(passed, 2.0**32 / step.clamp(min=1), 0.0)
    return torch.where(draw, weight, torch.ones_like(weight))


def sampled_gradients(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    d_nll: Tensor,
    d_lse: Tensor | None = None,
    d_mean_logit: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    tau: float,
    seed: int = 0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    ignore_index: int = -100,
    scale: Tensor | None = None,
    lse: Tensor | None = None,
) -> SampledGradients:
    """Gradients of sum_n d_nll nll + d_lse lse + d_mean_logit mean_logit, sampled by strips.

    Args:
        e: [N, D]; c: [V, D]; targets: [N], outside [0, V) means no target here; bias: [V] or None.
        d_nll, d_lse, d_mean_logit: [N] upstream gradients.
        tau: mass, relative to the upstream, from which a strip is always kept; 0 keeps every strip
            of a row with an upstream gradient.
        scale: [N] in place of max(|a|, |b|, |q|), for columns that are part of a vocabulary.
        lse: [N], of which the float32 bits enter the draw; the twin's own if None.
    """
    valid = targets != ignore_index
    strips = _strips(e, c, targets, bias, ignore_index, softcap, logit_scale, temperature)
    s, p = strips.s, strips.p
    zero = s.new_zeros(len(s))

    def rows(values: Tensor | None) -> Tensor:
        return zero if values is None else torch.where(valid, values.to(s.dtype), zero)

    owned = strips.label.any(1)
    q, b = rows(d_mean_logit), torch.where(owned, rows(d_nll), zero)
    a = rows(d_nll) + rows(d_lse) + q
    scale = torch.stack((a.abs(), b.abs(), q.abs())).amax(0) if scale is None else rows(scale)
    ref = torch.minimum(scale, scale.sum() / (scale != 0).sum().clamp(min=1))

    mean = (p * torch.where(p > 0, s, 0.0)).sum(1)
    reach = (strips.top - mean[:, None]).abs().clamp(min=1.0)
    reach = torch.where(strips.mass > 0, reach, 1.0)  # of a strip of masked columns
    size = (a.abs()[:, None] + q.abs()[:, None] * reach) * strips.mass
    weight = torch.ones_like(size)
    if tau:
        own = torch.logsumexp(s, 1) if lse is None else lse
        index = torch.arange(len(s), device=s.device)
        u = size / (tau * ref)[:, None]
        weight = sample(u, draws(index, own, seed), strips.label)
    weight = torch.where((scale > 0)[:, None], weight, 0.0)

    away = torch.where(p > 0, s - mean[:, None], 0.0)
    whole = weight.repeat_interleave(TILE, 1)[:, : s.shape[1]]
    g = whole * p * (a[:, None] + q[:, None] * away)
    label = torch.where(owned, targets, 0).long()[:, None]
    # p_y a - b = a (p_y - 1) + (a - b), without the digits that p_y - 1 loses near 1
    at_label = a * torch.expm1(-strips.nll) + (a - b)
    at_label = at_label + (q[:, None] * p * away).gather(1, label).squeeze(1)
    at_label = torch.where(owned & (scale > 0), at_label, g.gather(1, label).squeeze(1))
    g = g.scatter(1, label, at_label[:, None]) * strips.slope / temperature

    e = torch.where(valid[:, None], e, torch.zeros_like(e)).to(s.dtype)
    active = scale > 0
    kept = (weight[active] > 0).double().mean()
    return SampledGradients(
        logit_scale * (g @ c.to(s.dtype)),
        logit_scale * (g.T @ e),
        g.sum(0),
        weight,
        size,
        strips.label,
        float(kept) if bool(active.any()) else 0.0,
    )


def forecast(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    tau: float,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    ignore_index: int = -100,
) -> Forecast:
    """What `tau` keeps of rows of equal upstream gradient, and at what error."""
    strips = _strips(e, c, targets, bias, ignore_index, softcap, logit_scale, temperature)
    return _forecast(strips, targets != ignore_index, tau)


def auto_tau(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    ignore_index: int = -100,
) -> float:
    """The largest of `TAUS` whose predicted error is at most `AUTO_ERROR`.

    0, the exact backward, where there is none or where it would keep more than `BREAK_EVEN`.
    """
    strips = _strips(e, c, targets, bias, ignore_index, softcap, logit_scale, temperature)
    for tau in TAUS:
        found = _forecast(strips, targets != ignore_index, tau)
        if found.error <= AUTO_ERROR:
            return tau if found.kept <= BREAK_EVEN else 0.0
    return 0.0


def _strips(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
) -> _Strips:
    vocab = c.shape[0]
    valid = targets != ignore_index
    e = torch.where(valid[:, None], e, torch.zeros_like(e))
    s = logits(e, c, bias, softcap=softcap, logit_scale=logit_scale, temperature=temperature)
    slope = torch.ones_like(s)
    if softcap is not None:
        slope = 1.0 - (s * temperature / softcap) ** 2
    owned = valid & (targets >= 0) & (targets < vocab)
    label = torch.where(owned, targets, torch.zeros_like(targets)).long()
    nll, lse = losses(s, label, owned)
    p = torch.exp(s - lse[:, None])
    tiles = [slice(i, i + TILE) for i in range(0, vocab, TILE)]
    mass = torch.stack([(p * slope)[:, tile].sum(1) for tile in tiles], 1)
    top = torch.stack([s[:, tile].amax(1) for tile in tiles], 1)
    index = torch.arange(len(tiles), device=s.device)
    here = owned[:, None] & (label[:, None] // TILE == index)
    return _Strips(mass, top, here, s, p, slope, torch.where(owned, nll, 0.0))


def _forecast(strips: _Strips, valid: Tensor, tau: float) -> Forecast:
    if not bool(valid.any()):
        return Forecast(1.0, 0.0)
    mass, label = strips.mass[valid], strips.label[valid]
    tiles = strips.p[valid].square().split(TILE, 1)
    square = torch.where(label, 0.0, torch.stack([p2.sum(1) for p2 in tiles], 1))
    chance = torch.ones_like(mass) if not tau else (mass / tau).clamp(max=1.0)
    kept = torch.where(label, 1.0, chance).mean()
    # a strip of sum p^2 that weighs tau / m with chance m / tau
    noise = torch.where(mass > 0, square * (tau / mass - 1).clamp(min=0.0), 0.0).sum()
    energy = torch.expm1(-strips.nll[valid]).square().sum() + square.sum()
    error = torch.where(energy > 0, (noise / energy).sqrt(), 0.0)
    return Forecast(float(kept), float(error))
