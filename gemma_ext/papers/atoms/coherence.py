"""How close to orthogonal unit vectors are, tile by tile: the matrix of all pairs never exists.

mu      = max_{i != j} |w_i . w_j|                         coherence
mu_q    = q-quantile of |w_i . w_j| over pairs i < j
mu_1(K) = max_i sum of the K largest |w_i . w_j|, j != i   cumulative coherence (Babel)
mu     >= sqrt((F - D) / (D (F - 1)))                      Welch
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

BINS = 4096
DECADES = 6.0  # of the histogram, below 1; what is smaller falls into the first bin


@dataclass(frozen=True)
class Coherence:
    """Distribution of |cosine| over all pairs of F unit vectors [D].

    Attributes:
        counts: [BINS] int64, in bins of equal width in the logarithm, from 1e-6 to 1.
        largest: mu, exact.
        pair: (i, j), i < j, where it is attained.
        features, width: F and D.
    """

    counts: Tensor
    largest: float
    pair: tuple[int, int]
    features: int
    width: int

    @property
    def pairs(self) -> int:
        return self.features * (self.features - 1) // 2

    @property
    def welch(self) -> float:
        return welch(self.features, self.width)

    def quantile(self, q: float) -> float:
        """Upper edge of the bin of the q-quantile, at most `largest`."""
        return min(float(edges()[self._bin(q)[0] + 1]), self.largest)

    def share_below(self, bound: float) -> float:
        """Share of pairs in bins that end at or below `bound`; exactly 1 above `largest`."""
        if self.largest < bound:
            return 1.0
        full = int((edges()[1:] <= bound).sum())
        return int(self.counts[:full].sum()) / self.pairs

    def _bin(self, q: float) -> tuple[int, int]:
        """The bin of the quantile, and its rank among the values of the bin, from 1."""
        if not 0 < q <= 1:
            raise ValueError(f"q: expected a number in (0, 1], got {q}")
        rank = max(1, math.ceil(q * self.pairs))
        running = self.counts.cumsum(0)
        at = int(torch.searchsorted(running, rank))
        return at, rank - int(running[at] - self.counts[at])


def edges() -> Tensor:
    """[BINS + 1] float64 edges of the histogram."""
    made = 10.0 ** torch.linspace(-DECADES, 0.0, BINS + 1, dtype=torch.float64)
    made[0] = 0.0
    return made


def welch(features: int, width: int) -> float:
    """The least coherence that F unit vectors of R^D can have; 0 where F <= D."""
    if features <= width:
        return 0.0
    return math.sqrt((features - width) / (width * (features - 1)))


@torch.no_grad()
def coherence(unit: Tensor, tile: int = 1024) -> Coherence:
    """The distribution over rows of `unit` [F, D], in their dtype.

    Raises:
        ValueError: fewer than two rows.
    """
    features, width = unit.shape
    if features < 2:
        raise ValueError(f"unit: expected at least two rows, got {features}")
    counts = torch.zeros(BINS, dtype=torch.int64, device=unit.device)
    largest, pair = -1.0, (0, 1)
    for i, j, values in _tiles(unit, tile):
        counts += torch.bincount(_bins(values[values >= 0]), minlength=BINS)
        top, at = values.flatten().max(0)
        if float(top) > largest:
            largest, place = float(top), int(at)
            pair = (i + place // values.shape[1], j + place % values.shape[1])
    return Coherence(counts.cpu(), largest, pair, features, width)


@torch.no_grad()
def exact_quantile(unit: Tensor, found: Coherence, q: float, tile: int = 1024) -> float:
    """The q-quantile itself: a second pass collects the one bin it lies in."""
    at, rank = found._bin(q)
    inside = [
        values[(values >= 0)][_bins(values[values >= 0]) == at]
        for _, _, values in _tiles(unit, tile)
    ]
    return float(torch.cat(inside).kthvalue(rank).values)


@torch.no_grad()
def babel(unit: Tensor, k: int, tile: int = 1024) -> Tensor:
    """mu_1(1..k) [k] of rows of `unit` [F, D].

    Raises:
        ValueError: k is not in 1..F - 1.
    """
    features = unit.shape[0]
    if not 1 <= k < features:
        raise ValueError(f"k: expected 1 to {features - 1}, got {k}")
    worst = torch.zeros(k, dtype=unit.dtype, device=unit.device)
    for start in range(0, features, tile):
        rows = unit[start : start + tile]
        best = unit.new_empty(rows.shape[0], 0)
        for other in range(0, features, tile):
            g = (rows @ unit[other : other + tile].T).abs()
            if other == start:
                g.fill_diagonal_(0.0)
            best = torch.cat([best, g], 1)
            best = best.topk(min(k, best.shape[1]), dim=1).values
        worst = torch.maximum(worst, best.cumsum(1).amax(0))
    return worst


def unique_up_to(cumulative: Tensor) -> int:
    """Largest K with mu_1(K) + mu_1(K - 1) < 1: a K-sparse code is the only one (Tropp 2004)."""
    before = torch.cat([cumulative.new_zeros(1), cumulative[:-1]])
    failed = (cumulative + before >= 1).nonzero()
    return int(failed[0]) if failed.numel() else cumulative.numel()


def isometry_defect(
    unit: Tensor, k: int, draws: int, generator: torch.Generator | None = None
) -> float:
    """Largest |eigenvalue - 1| of Gram matrices of `draws` random supports of size k.

    A lower estimate of the restricted isometry constant, which is at most (k - 1) mu.
    """
    features = unit.shape[0]
    if not 1 <= k <= features:
        raise ValueError(f"k: expected 1 to {features}, got {k}")
    keys = torch.rand(draws, features, generator=generator)
    chosen = unit[keys.topk(k, dim=1).indices.to(unit.device)]
    spectrum = torch.linalg.eigvalsh(chosen @ chosen.mT)
    return float((spectrum - 1).abs().max())


def _tiles(unit: Tensor, tile: int) -> Iterator[tuple[int, int, Tensor]]:
    """|w_i . w_j| of pairs i < j with the place of each tile; -1 where a tile holds i >= j."""
    features = unit.shape[0]
    for i in range(0, features, tile):
        rows = unit[i : i + tile]
        for j in range(i, features, tile):
            values = (rows @ unit[j : j + tile].T).abs_()
            if i == j:
                values.masked_fill_(torch.ones_like(values, dtype=torch.bool).tril_(), -1.0)
            yield i, j, values


def _bins(values: Tensor) -> Tensor:
    place = (values.double().log10() / DECADES + 1.0) * BINS
    return place.clamp_(0, BINS - 1).long()
