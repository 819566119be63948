"""The filtered backward of cut cross-entropy, from its definition, with the logits materialised.

The vocabulary, in `order`, is cut into tiles of 256 columns; a strip is one row and one tile. With
G_nv = p_nv [A_n + q_n (s_nv - m_n)] - B_n 1{v = target_n} the gradient of the logits s, where

    A = d_nll + d_lse + d_m,  B = d_nll,  q = d_m   (upstream of nll, lse and the mean logit)

and M_nj, S_nj, F_nj, R_nj = max s, sum exp(s - M), sum exp(s - M) ds/da, sum exp(s - M) s of a
strip, a strip is computed in full iff

    exp(M_nj - lse_n) (|A_n| + |q_n| max(|M_nj - m_n|, 1)) >= eps ref_n,  or
    the target lies in it and |A_n p_t - B_n| >= eps ref_n,

with scale_n = max(|A_n|, |B_n|, |q_n|), ref_n = min(scale_n, mean of scale over valid rows), and
never for scale_n = 0. A dropped strip returns its mass through the tile's profile (prob normalised
inside the tile): G ds/da is replaced by W_nj profile_v with
W_nj = exp(M_nj - lse_n) F_nj (A_n + q_n (R_nj / S_nj - m_n)).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gemma_ext.reference.cce import logits

TILE = 256
AUTO_EPS = tuple(2.0**-k for k in range(10, 16))
AUTO_ERROR = 2.0**-9
AUTO_KEPT = 0.6


class FilteredGradients(NamedTuple):
    """Gradients of the filtered backward and what was dropped.

    Attributes:
        de: [N, D]. dc: [V, D]. dbias: [V] (of a zero bias when there is none).
        keep: [N, ceil(V / 256)] bool. dropped_mass: [N] probability in dropped strips, 0 in rows
            that are ignored or have no upstream gradient.
        kept_fraction: kept strips over the strips of rows that have an upstream gradient.
    """

    de: Tensor
    dc: Tensor
    dbias: Tensor
    keep: Tensor
    dropped_mass: Tensor
    kept_fraction: float


class _Strips(NamedTuple):
    top: Tensor
    mass: Tensor
    slope: Tensor
    first: Tensor


def filtered_gradients(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    d_nll: Tensor,
    d_lse: Tensor | None = None,
    d_mean_logit: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    ignore_index: int = -100,
    order: Tensor | None = None,
    prob: Tensor | None = None,
    compensate: bool = True,
    tile: int = TILE,
) -> FilteredGradients:
    """Gradients of sum_n d_nll nll + d_lse lse + d_mean_logit mean_logit under the filter.

    Args:
        e: [N, D]; c: [V, D]; targets: [N], outside [0, V) means no target here; bias: [V] or None.
        d_nll, d_lse, d_mean_logit: [N] upstream gradients.
        eps: threshold; 0 keeps every strip of a row with an upstream gradient.
        order: [V] int64, the vocabulary id at each position; identity if None.
        prob: [V] mean probability by id, the profile of compensation; uniform if None.
        compensate: return dropped mass through the profile (False: the published plain filter,
            by strips).
    """
    n, vocab = e.shape[0], c.shape[0]
    valid = targets != ignore_index
    e = torch.where(valid[:, None], e, torch.zeros_like(e))
    s = logits(e, c, bias, softcap=softcap, logit_scale=logit_scale, temperature=temperature)
    zero = s.new_zeros(n)
    d_nll = torch.where(valid, d_nll.to(s.dtype), zero)
    d_lse = zero if d_lse is None else torch.where(valid, d_lse.to(s.dtype), zero)
    q = zero if d_mean_logit is None else torch.where(valid, d_mean_logit.to(s.dtype), zero)
    a, b = d_nll + d_lse + q, d_nll

    dsda = torch.full_like(s, 1.0 / temperature)
    if softcap is not None:
        dsda = (1.0 - (s * temperature / softcap) ** 2) / temperature
    lse = torch.logsumexp(s, dim=1)
    p = torch.exp(s - lse[:, None])
    m = (p * torch.where(torch.isneginf(s), torch.zeros_like(s), s)).sum(1)
    owned = valid & (targets >= 0) & (targets < vocab)
    label = torch.where(owned, targets, torch.zeros_like(targets)).long()
    hot = torch.zeros_like(s).scatter_(1, label[:, None], owned.to(s.dtype)[:, None])

    ids = torch.arange(vocab, device=e.device) if order is None else order.long()
    tile_of = torch.empty_like(ids)
    tile_of[ids] = torch.arange(vocab, device=e.device) // tile
    strips = _strips(s, dsda, tile_of)

    scale = torch.stack((a.abs(), b.abs(), q.abs())).amax(0)
    mean_scale = scale.sum() / valid.sum().clamp(min=1)
    threshold = (eps * torch.minimum(scale, mean_scale))[:, None]
    reach = (strips.top - m[:, None]).abs().clamp(1.0, torch.finfo(s.dtype).max)
    bound = a.abs()[:, None] + q.abs()[:, None] * reach
    keep = torch.exp(strips.top - lse[:, None]) * bound >= threshold
    p_t = p.gather(1, label[:, None]).squeeze(1)
    hot_kept = owned & ((a * p_t - b).abs() >= threshold.squeeze(1))
    keep[hot_kept, tile_of[label[hot_kept]]] = True
    keep &= (scale > 0)[:, None]

    away = torch.where(p > 0, s - m[:, None], torch.zeros_like(s))
    g = (p * (a[:, None] + q[:, None] * away) - b[:, None] * hot) * dsda
    g = torch.where(keep[:, tile_of], g, torch.zeros_like(g))
    strip_mass = torch.exp(strips.top - lse[:, None]) * strips.mass
    if compensate:
        mean = strips.first / strips.mass.clamp(min=torch.finfo(s.dtype).tiny)
        tilt = a[:, None] + q[:, None] * (mean - m[:, None])
        w = torch.exp(strips.top - lse[:, None]) * strips.slope * tilt
        w = torch.where(keep, torch.zeros_like(w), w)
        g = g + w[:, tile_of] * _profile(vocab, prob, tile_of, s)
    active = scale > 0
    dropped = torch.where(active[:, None] & ~keep, strip_mass, torch.zeros_like(strip_mass)).sum(1)
    kept = float(keep[active].double().mean()) if bool(active.any()) else 0.0
    return FilteredGradients(
        logit_scale * (g @ c.to(g.dtype)),
        logit_scale * (g.T @ e.to(g.dtype)),
        g.sum(0),
        keep,
        dropped,
        kept,
    )


def auto_eps(s: Tensor, targets: Tensor, order: Tensor | None = None) -> float | None:
    """eps that filter_eps="auto" takes for logits s [N, V] and targets [N]; None means exact.

    The largest candidate whose predicted gradient error sqrt(sum peak * mass over dropped strips /
    (sum (1 - p_target)^2 + sum peak^2)) is at most 2^-9, unless it keeps more than 0.6.
    """
    probs = torch.softmax(s, dim=1)
    ids = torch.arange(s.shape[1]) if order is None else order
    blocks = ids.split(TILE)
    peak = torch.stack([probs[:, b].amax(1) for b in blocks], 1)
    mass = torch.stack([probs[:, b].sum(1) for b in blocks], 1)
    here = torch.stack([(targets[:, None] == b).any(1) for b in blocks], 1)
    miss = 1 - probs.gather(1, targets[:, None])
    energy = torch.where(here, miss**2, peak**2).sum()
    for eps in AUTO_EPS:
        dropped = (peak < eps) & ~(here & (miss >= eps))
        if (peak * mass)[dropped].sum() <= AUTO_ERROR**2 * energy:
            return None if (~dropped).double().mean() > AUTO_KEPT else eps
    return None


def _strips(s: Tensor, dsda: Tensor, tile_of: Tensor) -> _Strips:
    """max s, sum exp(s - max), the same times ds/da and times s, each [N, tiles]."""
    tiles = int(tile_of.max()) + 1
    index = tile_of.expand_as(s)
    top = s.new_full((s.shape[0], tiles), -torch.inf).scatter_reduce(1, index, s, "amax")
    masked = torch.isneginf(s)
    weight = torch.where(masked, torch.zeros_like(s), torch.exp(s - top[:, tile_of]))
    s = torch.where(masked, torch.zeros_like(s), s)
    empty = s.new_zeros(s.shape[0], tiles)
    mass = empty.scatter_add(1, index, weight)
    slope = empty.scatter_add(1, index, weight * dsda)
    first = empty.scatter_add(1, index, weight * s)
    return _Strips(top, mass, slope, first)


def _profile(vocab: int, prob: Tensor | None, tile_of: Tensor, like: Tensor) -> Tensor:
    """[V] share of each id inside its tile; uniform where the tile's `prob` sums to zero."""
    ones = like.new_ones(vocab)
    share = ones if prob is None else prob.to(like.dtype)
    tiles = int(tile_of.max()) + 1
    total = like.new_zeros(tiles).scatter_add(0, tile_of, share)
    size = like.new_zeros(tiles).scatter_add(0, tile_of, ones)
    empty = (total <= 0)[tile_of]
    safe = torch.where(total <= 0, torch.ones_like(total), total)
    return torch.where(empty, ones / size[tile_of], share / safe[tile_of])
