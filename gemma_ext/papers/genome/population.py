"""The members of a population and the five ways to choose among them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gemma_ext.papers.genome.recipe import Genome

TOURNAMENT = 3


@dataclass(frozen=True)
class Individual:
    """One member.

    Attributes:
        id: serial number in the run; kept over moves.
        genome: where it is.
        made: "expert", "pair", "crossover", "mutation"; a move keeps it.
        parents: ids, or indices of experts for "expert" and "pair".
        born: generation.
        fitness: of `genome`, or in a run with stale fitness of where it once was; NaN if unknown.
        velocity: of the succession step; None before the first.
        best, best_fitness: where it was fittest, and how fit.
    """

    id: int
    genome: Genome
    made: str
    parents: tuple[int, ...]
    born: int
    fitness: float = math.nan
    velocity: Genome | None = None
    best: Genome | None = None
    best_fitness: float = math.nan

    def genomes(self) -> list[Genome]:
        return [g for g in (self.genome, self.velocity, self.best) if g is not None]

    def record(self) -> dict[str, Any]:
        """JSON form; genomes by their keys."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        keys = {n: g.key for n, g in fields.items() if isinstance(g, Genome)}
        return fields | keys | {"parents": list(self.parents)}


def individual_from(record: dict[str, Any], genomes: dict[str, Genome]) -> Individual:
    """The inverse of `Individual.record`."""
    places = ("genome", "velocity", "best")
    known = {name: genomes[record[name]] if record[name] else None for name in places}
    return Individual(**record | known | {"parents": tuple(record["parents"])})


def better(a: float, b: float) -> bool:
    """a > b, where NaN is below everything."""
    return a > b or (math.isnan(b) and not math.isnan(a))


def ranked(fitness: Sequence[float]) -> list[int]:
    """Positions from the fittest down: NaN last, the first of equals first."""
    return sorted(range(len(fitness)), key=lambda i: (math.isnan(fitness[i]), -fitness[i], i))


def chances(fitness: Sequence[float]) -> np.ndarray:
    """[P] weights of a roulette: f / sum f.

    With a negative fitness all are taken above the least one; infinite and NaN get 0, and where
    nothing is left all that are finite (or simply all) are alike.
    """
    f = np.asarray(fitness, dtype=np.float64)
    finite = np.isfinite(f)
    if not finite.any():
        return np.full(len(f), 1.0 / max(len(f), 1))
    least = min(f[finite].min(), 0.0)
    weights = np.where(finite, np.where(finite, f, 0.0) - least, 0.0)
    if not weights.sum() > 0.0:
        weights = finite.astype(np.float64)
    return weights / weights.sum()


def released_chances(fitness: Sequence[float]) -> np.ndarray:
    """f / sum f as the release computes it.

    Raises:
        ValueError: the total is zero, or a fitness is negative or NaN.
    """
    f = np.asarray(fitness, dtype=np.float64)
    if not f.sum() > 0.0 or (f < 0.0).any():
        raise ValueError(
            "fitness: expected none negative and a total above 0 (roulette_by_total), "
            f"got {f.tolist()}"
        )
    return f / f.sum()


def drawn(weights: Sequence[float], count: int, random: np.random.Generator) -> list[int]:
    """`count` positions without replacement, each with probability weight / what is left; those of
    weight 0 come last, all alike."""
    left = np.asarray(weights, dtype=np.float64).copy()
    free = np.ones(len(left), dtype=bool)
    chosen: list[int] = []
    for _ in range(min(count, len(left))):
        now = left if left.sum() > 0.0 else free.astype(np.float64)
        bounds = now.cumsum()
        place = int(np.searchsorted(bounds, random.random() * bounds[-1], side="right"))
        place = min(place, int(np.flatnonzero(now)[-1]))  # the product may round up to the end
        chosen.append(place)
        left[place], free[place] = 0.0, False
    return chosen


def select(
    kind: str,
    fitness: Sequence[float],
    count: int,
    random: np.random.Generator,
    *,
    roulette=chances,
) -> list[int]:
    """`count` of the positions, by one of

    | kind | chosen |
    |---|---|
    | elite | the fittest |
    | tournament | again and again the fittest of 3 drawn from those left |
    | roulette | by fitness, without replacement |
    | rank | by P, P - 1 .. 1 from the fittest down, without replacement |
    | random | all alike, without replacement |

    Raises:
        ValueError: another kind.
    """
    order = ranked(fitness)
    if kind == "elite":
        return order[:count]
    if kind == "roulette":
        return drawn(roulette(fitness), count, random)
    if kind == "random":
        return drawn(np.ones(len(fitness)), count, random)
    if kind == "rank":
        weights = np.empty(len(fitness))
        weights[order] = np.arange(len(fitness), 0, -1)
        return drawn(weights, count, random)
    if kind != "tournament":
        raise ValueError(
            f"selection: expected tournament, roulette, rank, elite or random, got {kind!r}"
        )
    place = {position: at for at, position in enumerate(order)}
    left, chosen = list(range(len(fitness))), []
    while left and len(chosen) < count:
        met = drawn(np.ones(len(left)), TOURNAMENT, random)
        winner = min((left[m] for m in met), key=place.__getitem__)
        chosen.append(winner)
        left.remove(winner)
    return chosen
