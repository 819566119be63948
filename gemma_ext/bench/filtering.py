"""What a gradient filter keeps and errs, by granularity, vocabulary order and threshold.

Plain torch on materialised probabilities: an analysis, not an implementation. With G_nv =
(p_nv - 1{v = target}) phi'_nv, blocks of `rows` x `columns` (columns in a vocabulary order) whose
max |p - onehot| is below eps are dropped. Compensation returns the dropped mass of a row in a tile,
sum_v p phi', spread over the tile by a profile that sums to one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Blocks:
    """Granularity of the decision: ``rows`` consecutive tokens by ``columns`` of the order."""

    rows: int
    columns: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}"


@dataclass(frozen=True)
class Outcome:
    """Fraction of blocks kept, mean dropped mass, relative gradient errors."""

    kept: float
    dropped: float
    de_plain: float
    dc_plain: float
    de: float
    dc: float


@dataclass(frozen=True)
class Errors:
    """Relative errors of dE and dC."""

    de: float
    dc: float


class ExactRows:
    """A batch of a head with its probabilities.

    Args:
        e: [N, D] hidden states. c: [V, D] classifier. targets: [N] labels.
        softcap: the cap of the logits, or None.

    Memory: four float32 [N, V] matrices.
    """

    def __init__(self, e: Tensor, c: Tensor, targets: Tensor, softcap: float | None) -> None:
        self.e, self.c, self.targets = e.float(), c.float(), targets
        self.logits = self.e @ self.c.T
        if softcap is not None:
            self.logits = softcap * torch.tanh(self.logits / softcap)
        self.p = self.logits.softmax(1)
        self.g = self.p.clone()
        self.g[torch.arange(len(targets)), targets] -= 1.0
        self.distance = self.g.abs()
        self.slope = None
        if softcap is not None:
            self.slope = 1.0 - (self.logits / softcap) ** 2
            self.g *= self.slope
        self.de = self.g @ self.c
        self.dc = self.g.T @ self.e

    def kept_count(self, eps: float) -> Tensor:
        """[V] number of rows in which a column passes eps."""
        return (self.distance >= eps).sum(0)

    def entropy(self) -> float:
        """Mean entropy of the rows in nats."""
        return torch.special.entr(self.p).sum(1).mean().item()

    def errors(self, g: Tensor) -> Errors:
        """Errors of the gradients that another G [N, V] gives."""
        return Errors(_relative(g @ self.c, self.de), _relative(g.T @ self.e, self.dc))


def descending(key: Tensor) -> Tensor:
    """[V] column order by a key, largest first, ties by id."""
    return torch.argsort(key, descending=True, stable=True)


def keep_blocks(distance: Tensor, order: Tensor, blocks: Blocks, eps: float) -> Tensor:
    """Which blocks pass, as bool [ceil(N / rows), ceil(V / columns)]."""
    tiles = _tiles(distance[:, order], blocks.columns).amax(2)
    short = -len(tiles) % blocks.rows
    return F.pad(tiles, (0, 0, 0, short)).unflatten(0, (-1, blocks.rows)).amax(1) >= eps


def outcome(
    batch: ExactRows,
    order: Tensor,
    blocks: Blocks,
    eps: float,
    profile: Tensor | None = None,
) -> Outcome:
    """Keep, drop and compensate.

    Args:
        profile: [V] weight of each id in its tile (not normalised), uniform if None.
    """
    n, v = batch.p.shape
    kept_blocks = keep_blocks(batch.distance, order, blocks, eps)
    strip = kept_blocks.repeat_interleave(blocks.rows, 0)[:n]  # [N, tiles]
    tile_of = torch.empty_like(order)
    tile_of[order] = torch.arange(v) // blocks.columns
    keep = strip[:, tile_of]
    plain = torch.where(keep, batch.g, 0.0)
    lost = torch.where(keep, 0.0, batch.p)
    dropped = lost.sum(1).mean().item()
    if batch.slope is not None:
        lost *= batch.slope
    mass = _tiles(lost[:, order], blocks.columns).sum(2)  # [N, tiles]
    weight = torch.ones(v) if profile is None else profile.float().clamp(min=1e-30)
    share = weight / torch.zeros(mass.shape[1]).index_add_(0, tile_of, weight)[tile_of]
    without = batch.errors(plain)
    within = batch.errors(plain.add_(mass[:, tile_of].mul_(share)))
    return Outcome(
        kept_blocks.float().mean().item(), dropped, without.de, without.dc, within.de, within.dc
    )


def _tiles(values: Tensor, columns: int) -> Tensor:
    """[N, V] as [N, ceil(V / columns), columns], zero-filled."""
    return F.pad(values, (0, -values.shape[1] % columns)).unflatten(1, (-1, columns))


def _relative(found: Tensor, exact: Tensor) -> float:
    return ((found - exact).norm() / exact.norm()).item()
