"""Exact loss and gradients of a softcapped head at full size, sampled so that they are affordable.

The loss needs every logit once: 2 N V D operations in float32, log-sum-exp joined in float64.
Gradients are taken on a sample: whole rows of dE, and rows of dC in two strata (ids that occur as
targets, ids that do not) with weights that make the relative error an unbiased estimate of the
full one. Where the sample covers everything the errors are exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_PANEL = 2048  # vocabulary rows of a panel
_ROWS = 2048  # tokens of a panel: 16 MB of float32 logits at a time


@dataclass(frozen=True)
class Sample:
    """Which gradients are compared.

    Attributes:
        rows: [R] token rows of dE.
        columns: [S] vocabulary rows of dC.
        weights: [S] how many vocabulary rows each of them stands for.
    """

    rows: Tensor
    columns: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Truth:
    """Mean loss over the batch and its sampled gradients, on unrounded inputs."""

    sample: Sample
    loss: float
    de: Tensor  # [R, D] float32
    dc: Tensor  # [S, D] float32


@dataclass(frozen=True)
class Errors:
    """Relative errors against the truth: |loss - truth| / |truth|, ||g - truth|| / ||truth||."""

    loss: float
    de: float
    dc: float


def sample_for(
    targets: Tensor, v: int, *, rows: int = 256, columns: int = 2048, seed: int = 7
) -> Sample:
    """At most ``rows`` rows of dE and ``columns`` ids of each stratum of dC."""
    device = targets.device
    generator = torch.Generator(device).manual_seed(seed)
    n = len(targets)
    hit = torch.zeros(v, dtype=torch.bool, device=device)
    hit[targets] = True
    picked, weights = [], []
    for stratum in (hit.nonzero().flatten(), (~hit).nonzero().flatten()):
        take = min(columns, len(stratum))
        shuffled = torch.randperm(len(stratum), generator=generator, device=device)
        picked.append(stratum[shuffled[:take]].sort().values)
        weight = len(stratum) / max(take, 1)
        weights.append(torch.full((take,), weight, dtype=torch.float64, device=device))
    shuffled = torch.randperm(n, generator=generator, device=device)
    chosen_rows = shuffled[:rows].sort().values
    return Sample(chosen_rows, torch.cat(picked), torch.cat(weights))


def row_lse(e: Tensor, c: Tensor, softcap: float | None) -> Tensor:
    """[N] float64 log-sum-exp of the capped logits of e [N, D] against c [V, D]."""
    lse = torch.full((len(e),), -math.inf, dtype=torch.float64, device=e.device)
    for r in range(0, len(e), _ROWS):
        for p in range(0, len(c), _PANEL):
            logits = _cap(e[r : r + _ROWS] @ c[p : p + _PANEL].T, softcap)
            part = lse[r : r + _ROWS]
            torch.logaddexp(part, torch.logsumexp(logits, 1).double(), out=part)
    return lse


def exact(
    e: Tensor, c: Tensor, targets: Tensor, lse: Tensor, sample: Sample, softcap: float | None
) -> Truth:
    """Mean loss and sampled gradients.

    Args:
        e: [N, D] float32. c: [V, D] float32. targets: [N]. lse: [N] from ``row_lse``.
        sample: what to take gradients of.
        softcap: the cap, or None.
    """
    n = len(e)
    target_logit = torch.cat(
        [
            _cap((e[r : r + _ROWS] * c[targets[r : r + _ROWS]]).sum(1), softcap)
            for r in range(0, n, _ROWS)
        ]
    )
    loss = (lse - target_logit.double()).mean().item()

    rows = sample.rows
    de = e.new_zeros(len(rows), e.shape[1])
    for p in range(0, len(c), _PANEL):
        panel = c[p : p + _PANEL]
        de += _gradient(e[rows], panel, targets[rows] - p, lse[rows], softcap) @ panel
    columns = sample.columns
    # Position of each target among the sampled columns; -1 (no one-hot) when it is not sampled.
    where = targets.new_full((len(c),), -1)
    where[columns] = torch.arange(len(columns), device=c.device)
    chosen = c[columns]
    dc = e.new_zeros(len(columns), e.shape[1])
    for r in range(0, n, _ROWS):
        stop = r + _ROWS
        part = e[r:stop]
        dc += _gradient(part, chosen, where[targets[r:stop]], lse[r:stop], softcap).T @ part
    return Truth(sample, loss, de / n, dc / n)


def errors(truth: Truth, loss: float, de: Tensor, dc: Tensor) -> Errors:
    """Errors of an implementation, given its loss and its gradients at the sampled places."""
    weights = truth.sample.weights
    dc_error = ((dc.double() - truth.dc).square().sum(1) * weights).sum()
    dc_norm = (truth.dc.double().square().sum(1) * weights).sum()
    de_error = (de.double() - truth.de).norm() / truth.de.double().norm()
    return Errors(
        loss=abs(loss - truth.loss) / max(abs(truth.loss), 1e-12),
        de=de_error.item(),
        dc=(dc_error / dc_norm).sqrt().item(),
    )


def _cap(logits: Tensor, softcap: float | None) -> Tensor:
    if softcap is None:
        return logits
    return logits.div_(softcap).tanh_().mul_(softcap)


def _gradient(
    e: Tensor, c: Tensor, local_target: Tensor, lse: Tensor, softcap: float | None
) -> Tensor:
    """(p - onehot) (1 - (s / cap)^2) as [rows of e, rows of c]; a target outside has no one-hot."""
    capped = _cap(e @ c.T, softcap)
    g = torch.exp(capped - lse.float().unsqueeze(1))
    inside = ((local_target >= 0) & (local_target < len(c))).nonzero().flatten()
    g[inside, local_target[inside]] -= 1.0
    if softcap is not None:
        g *= 1.0 - (capped / softcap).square_()
    return g
