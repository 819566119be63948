"""Which alpha: a sweep, the best by held-out loss, and one for every layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from gemma_ext.papers.salsa.checks import Batch, held_out_loss, nll
from gemma_ext.papers.salsa.soup import check_parents, soup, soup_into
from gemma_ext.souping.adaptive import Coefficients, minimise
from gemma_ext.souping.scoring import Scores

GRID = (0.0, 0.25, 0.5, 0.75, 1.0)
_GOLDEN = 0.6180339887498949  # of a section that keeps one of its inner points


@dataclass(frozen=True)
class Alphas:
    """Held-out losses along the line between two parents.

    Attributes:
        alphas, losses: every point that was looked at, in ascending order; nats a token.
    """

    alphas: tuple[float, ...]
    losses: tuple[float, ...]

    @property
    def best(self) -> float:
        """The alpha of the least loss, the one nearest to 1/2 of equals."""
        return min(
            zip(self.losses, self.alphas, strict=True), key=lambda at: (at[0], abs(at[1] - 0.5))
        )[1]


def alpha_sweep(
    parents: Sequence[nn.Module],
    batches: Sequence[Batch],
    *,
    grid: Sequence[float] = GRID,
    refine: int = 0,
) -> Alphas:
    """Held-out loss of alpha theta_1 + (1 - alpha) theta_2 along a grid.

    Memory: one model beside the parents.

    Args:
        parents: two.
        batches: as of `held_out_loss`.
        grid: of alphas, in ascending order.
        refine: further points, by golden section between the neighbours of the best one.

    Raises:
        ValueError: another number of parents, or a grid that does not ascend.
    """
    if len(parents) != 2:
        raise ValueError(f"expected two parents, got {len(parents)}")
    grid = [float(alpha) for alpha in grid]
    if not grid or grid != sorted(set(grid)):
        raise ValueError(f"expected a grid in ascending order, got {grid}")
    check_parents(parents)
    made = soup(parents[:1])

    def loss(alpha: float) -> float:
        soup_into(made, parents, [alpha, 1 - alpha])
        return held_out_loss(made, batches)

    found = {alpha: loss(alpha) for alpha in grid}
    at = min(range(len(grid)), key=lambda i: found[grid[i]])
    low, high = grid[max(at - 1, 0)], grid[min(at + 1, len(grid) - 1)]
    found.update(_golden(loss, low, high, refine))
    alphas = tuple(sorted(found))
    return Alphas(alphas, tuple(found[alpha] for alpha in alphas))


def layer_alphas(
    parents: Sequence[nn.Module],
    batches: Sequence[Batch],
    *,
    steps: int = 50,
    lr: float = 0.02,
    show_progress: bool = False,
) -> dict[str, list[float]]:
    """Layer-wise weights of two parents that lower the held-out loss, by Adam from 1/2.

    Gradients reach the alphas through `ops.souping.soup`. Choose on other data than is reported.
    Memory: the soup and its gradients beside the parents.

    Args:
        parents: two.
        batches: taken in turn.
        steps, lr: of Adam; alphas stay in [0, 1].

    Returns:
        Weights as `salsa.soup` takes them.

    Raises:
        ValueError: another number of parents, or no batch.
    """
    if len(parents) != 2:
        raise ValueError(f"expected two parents, got {len(parents)}")
    if not batches:
        raise ValueError("expected at least one batch, got none")
    check_parents(parents)
    first, second = parents
    coefficients = Coefficients(second, [first], per="layer", start=0.5)
    scores = Scores(soup([second]))

    def call(module: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        return coefficients.call(module, *inputs, prefix="model.")

    def loss(step: int) -> torch.Tensor:
        total, count = nll(scores, batches[step % len(batches)], call)
        return total / max(count, 1)

    minimise(coefficients, loss, steps=steps, lr=lr, show_progress=show_progress)
    found = zip(coefficients.groups, coefficients.values.detach()[:, 0].tolist(), strict=True)
    return {group: [alpha, 1 - alpha] for group, alpha in found}


def _golden(
    loss: Callable[[float], float], low: float, high: float, points: int
) -> dict[float, float]:
    """Losses at `points` places of a golden-section search, each new one in one more call."""
    found: dict[float, float] = {}
    left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    for alpha in (left, right)[:points]:
        found[alpha] = loss(alpha)
    for _ in range(points - 2):
        if found[left] <= found[right]:
            high, right = right, left
            left = high - _GOLDEN * (high - low)
            found[left] = loss(left)
        else:
            low, left = left, right
            right = low + _GOLDEN * (high - low)
            found[right] = loss(right)
    return found
