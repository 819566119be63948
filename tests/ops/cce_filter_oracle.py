"""float64 oracle of the gradient filter, strip by strip as it is defined.

Tiles are 256 consecutive positions of the vocabulary order; a strip is one valid row and one tile.
With A = d_nll + d_lse + d_m, B = d_nll, q = d_m (m the mean logit) and

    G_nv = [p_nv (A_n + q_n (s_nv - m_n)) - B_n 1{v = y_n}] ds/da

a strip survives iff max_v p_nv (|A| + |q| max(|s_max - m|, 1)) >= eps ref, or the target lies in it
and |A p_y - B| >= eps ref, where ref = min(scale, mean scale), scale = max(|A|, |B|, |q|). A
dropped strip returns its sum without the one-hot, spread over its columns by a profile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from cce_oracle import IGNORE, Problem, scores
from torch import Tensor

TILE = 256


@dataclass
class Filtered:
    """What a filtered backward must return, and what it may lose."""

    grads: dict[str, Tensor]
    exact: dict[str, Tensor]
    keep: Tensor  # [rows with an upstream, tiles]
    ratio: Tensor  # [rows with an upstream, tiles] of importance to threshold at eps = 1
    lost_mass: Tensor  # [rows with an upstream] probability in dropped strips
    lost_gradient: Tensor  # [rows with an upstream] sum of |G| over dropped strips

    @property
    def kept_fraction(self) -> float:
        return self.keep.double().mean().item()


def filtered(
    p: Problem,
    d_nll: Tensor,
    d_lse: Tensor | float = 0.0,
    d_mean: Tensor | float = 0.0,
    *,
    eps: float,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    ignore_index: int = IGNORE,
    order: Tensor | None = None,
    prob: Tensor | None = None,
    compensate: bool = True,
) -> Filtered:
    """Gradients of sum_n d_nll nll + d_lse lse + d_mean m under the filter, in float64.

    Rows are [N]; ``order`` is [V] ids by position, ``prob`` [V] the profile by id.
    """
    vocab = p.c.shape[0]
    valid = torch.nonzero(p.targets != ignore_index).squeeze(1)
    e, y = p.e.double()[valid], p.targets[valid].long()
    c = p.c.double()
    bias = None if p.bias is None else p.bias.double()
    options = {"softcap": softcap, "logit_scale": logit_scale, "temperature": temperature}
    s = scores(e, c, bias, **options)
    slope = torch.full_like(s, 1 / temperature)
    if softcap is not None:
        slope = (1 - (s * temperature / softcap) ** 2) / temperature
    prob_nv = torch.softmax(s, 1)
    m = (prob_nv * s).sum(1)

    def rows(u: Tensor | float) -> Tensor:
        return torch.as_tensor(u, dtype=torch.float64).expand(p.targets.shape)[valid]

    b, q = rows(d_nll), rows(d_mean)
    a = b + rows(d_lse) + q
    scale = torch.stack((a.abs(), b.abs(), q.abs())).amax(0)
    ref = torch.minimum(scale, scale.mean())
    hot = torch.nn.functional.one_hot(y, vocab).double()
    g = (prob_nv * (a[:, None] + q[:, None] * (s - m[:, None])) - b[:, None] * hot) * slope

    ids = torch.arange(vocab) if order is None else order
    out = g.clone()
    keep, ratio, lost_mass, lost_gradient = [], [], 0.0, 0.0
    for block in ids.split(TILE):
        top = s[:, block].amax(1)
        importance = prob_nv[:, block].amax(1)
        importance = importance * (a.abs() + q.abs() * (top - m).abs().clamp(min=1))
        here = hot[:, block].sum(1)
        p_y = (prob_nv * hot).sum(1)
        importance = torch.maximum(importance, here * (a * p_y - b).abs())
        kept = (importance >= eps * ref) & (scale > 0)
        dropped = (~kept).double()
        whole = (prob_nv * (a[:, None] + q[:, None] * (s - m[:, None])))[:, block]
        # W = sum p ds/da (A + q (zbar - m)), zbar the tile's mean logit under p.
        mass = prob_nv[:, block].sum(1)
        weighted = (prob_nv * slope)[:, block].sum(1)
        w = weighted * whole.sum(1) / mass.clamp(min=1e-300)
        share = torch.ones(len(block), dtype=torch.float64)
        if prob is not None and prob[block].sum() > 0:
            share = prob[block].double()
        spread = w[:, None] * (share / share.sum())
        out[:, block] = torch.where(kept[:, None], g[:, block], spread if compensate else 0.0)
        keep.append(kept)
        ratio.append(importance / ref.clamp(min=1e-300))
        lost_mass = lost_mass + dropped * mass
        lost_gradient = lost_gradient + dropped * g[:, block].abs().sum(1)

    def matrices(grad: Tensor) -> dict[str, Tensor]:
        de = torch.zeros(*p.targets.shape, p.e.shape[1], dtype=torch.float64)
        de[valid] = logit_scale * grad @ c
        named = {"e": de, "c": logit_scale * grad.T @ e}
        return named if bias is None else named | {"bias": grad.sum(0)}

    active = scale > 0
    return Filtered(
        matrices(out),
        matrices(g),
        torch.stack(keep, 1)[active],
        torch.stack(ratio, 1)[active],
        lost_mass[active],
        lost_gradient[active],
    )


def gap_eps(ratio: Tensor, near: float) -> float:
    """An eps around ``near`` in the widest gap of the ratios: fp32 cannot decide it otherwise."""
    logs = ratio[ratio > 0].log().flatten().sort().values
    window = logs[(logs > torch.tensor(near / 1.5).log()) & (logs < torch.tensor(near * 1.5).log())]
    if len(window) < 2:
        return near
    gaps = window.diff()
    i = int(gaps.argmax())
    assert gaps[i] > 1e-3, "no gap wide enough: take another seed"
    return float(((window[i] + window[i + 1]) / 2).exp())


def zipf_problem(
    n: int,
    d: int,
    v: int,
    *,
    alpha: float = 1.3,
    spread: float = 1.5,
    ignored: float = 0.0,
    shuffled: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Problem:
    """A head that has learned unigram counts: bias -alpha ln(rank), targets drawn from p."""
    g = torch.Generator().manual_seed(seed)
    e = torch.randn(n, d, generator=g).to(dtype)
    c = (torch.randn(v, d, generator=g) * spread / d**0.5).to(dtype)
    bias = -alpha * torch.arange(1, v + 1).double().log()
    if shuffled:
        bias = bias[torch.randperm(v, generator=g)]
    bias = bias.to(dtype)
    p = torch.softmax(scores(e.double(), c.double(), bias.double()), 1)
    y = torch.multinomial(p, 1, generator=g).squeeze(1)
    if ignored:
        y = y.masked_fill(torch.rand(n, generator=g) < ignored, IGNORE)
    return Problem(e, c, y, bias)
