"""Gradients of a head under rules that leave out parts of them, as plain formulas.

An analysis, not an implementation: G = (softmax - onehot) phi' is made for PANEL rows at a time, a
rule changes it in place, and dE = G C / N, dC = G^T E / N follow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

PANEL = 128
STRIP = 256

Rule = Callable[[Tensor, Tensor], float]  # changes G [M, V] given labels [M]; the share it keeps


@dataclass(frozen=True)
class Gradients:
    """Mean gradients of a head: de [N, D], dc [V, D], and the share of G that made them."""

    de: Tensor
    dc: Tensor
    kept: float


def everything(g: Tensor, labels: Tensor) -> float:
    return 1.0


def large_blocks(eps: float, columns: int = 128) -> Rule:
    """cut-cross-entropy's published rule: a block of PANEL x columns counts if any |G| >= eps."""

    def rule(g: Tensor, labels: Tensor) -> float:
        keep = tiles(g.abs(), columns).amax((0, 2)) >= eps
        g *= keep.repeat_interleave(columns)[: g.shape[1]]
        return keep.float().mean().item()

    return rule


def sampled_strips(tau: float, seed: int = 0) -> Rule:
    """Strips drawn systematically along the row with probability mass / tau, weighted by 1 / that;
    the label's strip and those of mass tau always."""
    generator = torch.Generator().manual_seed(seed)

    def rule(g: Tensor, labels: Tensor) -> float:
        q = (tiles(g.abs(), STRIP).sum(2) / tau).clamp_(max=1.0)
        q.scatter_(1, labels[:, None] // STRIP, 1.0)
        u = torch.rand(len(q), 1, generator=generator, dtype=torch.float64)
        steps = torch.cat([u, u + torch.cumsum(q, 1, dtype=torch.float64)], 1).floor_()
        keep = (steps.diff() > 0) | (q >= 1)
        weight = torch.where(keep, 1 / q.clamp(min=1e-30), 0.0).float()
        g *= weight.repeat_interleave(STRIP, 1)[:, : g.shape[1]]
        return keep.float().mean().item()

    return rule


@torch.no_grad()
def gradients(
    e: Tensor, c: Tensor, labels: Tensor, softcap: float | None = None, rule: Rule = everything
) -> Gradients:
    """Mean gradients under a rule: e [N, D] and c [V, D] float32, labels [N].

    Memory: a few float32 [PANEL, V] matrices beside the result.
    """
    de, dc, kept = torch.empty_like(e), torch.zeros_like(c), 0.0
    for start in range(0, len(e), PANEL):
        part = slice(start, start + PANEL)
        logits = e[part] @ c.T
        if softcap is not None:
            logits.div_(softcap).tanh_().mul_(softcap)
        g = logits.softmax(1)
        g[torch.arange(len(g)), labels[part]] -= 1.0
        if softcap is not None:
            g *= 1.0 - (logits / softcap).square_()
        kept += rule(g, labels[part]) * len(g) / len(e)
        de[part] = g @ c
        dc.addmm_(g.T, e[part])
    return Gradients(de.div_(len(e)), dc.div_(len(e)), kept)


def tiles(values: Tensor, columns: int) -> Tensor:
    """[M, V] as [M, ceil(V / columns), columns], zero-filled."""
    return F.pad(values, (0, -values.shape[1] % columns)).unflatten(1, (-1, columns))
