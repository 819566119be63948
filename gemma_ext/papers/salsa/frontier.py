"""Reward against divergence, compared at equal measured divergence.

Two methods at one beta end at different divergences, so that their rewards say nothing about each
other. Here the points of all runs of a method (every beta, every checkpoint) of one seed give its
frontier, the best reward reached within a divergence; methods are compared seed by seed at the same
divergence, over the range that every frontier reaches. Nothing is extrapolated.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gemma_ext import report

Point = tuple[float, float]
"""(divergence in nats per response, reward), both measured on held-out prompts."""


class Frontier:
    """The best reward within a divergence, straight in its square root between points.

    Args:
        points: of one method and seed; dominated ones are dropped.

    Raises:
        ValueError: no point, a negative divergence, or a number that is not finite.

    Attributes:
        points: that are left, both numbers ascending.
    """

    def __init__(self, points: Sequence[Point]) -> None:
        if not points:
            raise ValueError("expected at least one point, got none")
        for kl, reward in points:
            if not (math.isfinite(kl) and math.isfinite(reward) and kl >= 0):
                raise ValueError(f"expected finite points at kl >= 0, got {(kl, reward)}")
        self.points: list[Point] = []
        for kl, reward in sorted(points, key=lambda point: (point[0], -point[1])):
            if not self.points or reward > self.points[-1][1]:
                self.points.append((kl, reward))
        self.end = max(kl for kl, _ in points)

    @property
    def start(self) -> float:
        """The least divergence there is a point at."""
        return self.points[0][0]

    def at(self, kl: float) -> float:
        """The reward at a divergence.

        Raises:
            ValueError: outside of [start, end].
        """
        if not self.start <= kl <= self.end:
            raise ValueError(f"expected kl in [{self.start:g}, {self.end:g}], got {kl:g}")
        after = bisect.bisect_right(self.points, kl, key=lambda point: point[0])
        if after == len(self.points):
            return self.points[-1][1]
        (low, below), (high, above) = self.points[after - 1 : after + 1]
        share = (math.sqrt(kl) - math.sqrt(low)) / (math.sqrt(high) - math.sqrt(low))
        return below + share * (above - below)

    def needed(self, reward: float) -> float | None:
        """The least divergence of a reward, None where it is not reached."""
        if reward > self.points[-1][1]:
            return None
        if reward <= self.points[0][1]:
            return self.start
        after = bisect.bisect_left(self.points, reward, key=lambda point: point[1])
        (low, below), (high, above) = self.points[after - 1 : after + 1]
        share = (reward - below) / (above - below)
        return (math.sqrt(low) + share * (math.sqrt(high) - math.sqrt(low))) ** 2


@dataclass(frozen=True)
class Difference:
    """A method against another at one divergence.

    Attributes:
        kl: nats per response.
        mean: of the differences of reward, seed by seed.
        half: half of the 95 % interval of Student's t; infinite with one seed.
        seeds: how many.
    """

    kl: float
    mean: float
    half: float
    seeds: int

    @property
    def decided(self) -> bool:
        """Whether the interval leaves out 0."""
        return abs(self.mean) > self.half


def interval(values: Sequence[float]) -> tuple[float, float]:
    """(mean, half of its 95 % interval by Student's t); infinite for one value."""
    mean, half = report.interval(values)
    return mean, math.inf if half is None else half


def common_range(frontiers: Sequence[Frontier]) -> tuple[float, float] | None:
    """The divergences that all of them reach, or None."""
    low = max(frontier.start for frontier in frontiers)
    high = min(frontier.end for frontier in frontiers)
    return (low, high) if low <= high else None


def compare(
    method: Mapping[int, Frontier], baseline: Mapping[int, Frontier], places: int = 5
) -> list[Difference]:
    """Differences of reward at equal divergence, with intervals over seeds.

    Args:
        method, baseline: frontiers by seed; seeds that only one has are left out.
        places: divergences, even in the square root over the range that all frontiers reach.

    Returns:
        One `Difference` for each, none where the ranges do not meet.

    Raises:
        ValueError: no seed in both.
    """
    seeds = sorted(method.keys() & baseline.keys())
    if not seeds:
        raise ValueError("expected a seed that both methods have, got none")
    reached = common_range([f[seed] for f in (method, baseline) for seed in seeds])
    if reached is None:
        return []
    low, high = map(math.sqrt, reached)
    found = []
    for place in range(places):
        root = low + (high - low) * (place / (places - 1) if places > 1 else 1.0)
        kl = min(max(root * root, reached[0]), reached[1])
        mean, half = interval([method[s].at(kl) - baseline[s].at(kl) for s in seeds])
        found.append(Difference(kl, mean, half, len(seeds)))
    return found
