"""Fitness: f = sum_t w_t score_t over tasks, measured by workers, counted, and never twice.

The search asks for genomes; workers, which hold pool and model, materialise and score them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from gemma_ext.distributed.fleet import Fleet
from gemma_ext.papers.genome.materialise import Materialiser
from gemma_ext.papers.genome.population import better
from gemma_ext.papers.genome.recipe import Genome


@dataclass(frozen=True)
class Outcome:
    """What one individual does on one split.

    Attributes:
        scores: of each task, larger is better.
        answers: of each task with answers, one per sample; for votes.
        right: of the same, the score of each sample.
    """

    scores: dict[str, float]
    answers: dict[str, list[Any]] = field(default_factory=dict)
    right: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """An individual to be scored on a split."""

    genome: Genome
    split: str = "validation"


class Evaluator:
    """Job to outcome, in a worker.

    Args:
        materialiser: of the pool.
        tensors: resident, written for each individual: usually a live model's parameters.
        score: outcome of what `tensors` hold on a split.
    """

    def __init__(
        self,
        materialiser: Materialiser,
        tensors: Mapping[str, Tensor],
        score: Callable[[str], Outcome],
    ) -> None:
        self.materialiser, self.tensors, self.score = materialiser, tensors, score
        self._resident: str | None = None

    def __call__(self, job: Job) -> Outcome:
        if job.genome.key != self._resident:
            self._resident = None
            self.materialiser.write(job.genome, self.tensors)
            self._resident = job.genome.key
        return self.score(job.split)


class Ledger:
    """Every outcome once: by the content hash of the recipe and the split, kept in a file.

    Args:
        fleet: workers of an `Evaluator`.
        weights: of the tasks, not negative; normalised to 1.
        path: JSON lines, written as outcomes come in; an interrupted run finds them again.

    Raises:
        ValueError: no task, a negative weight, or weights that are all 0.
    """

    def __init__(
        self, fleet: Fleet, weights: Mapping[str, float], path: Path | None = None
    ) -> None:
        total = sum(weights.values())
        if not weights or not total > 0 or min(weights.values()) < 0:
            raise ValueError(
                "weights: expected one per task, none negative, with a sum above 0, "
                f"got {dict(weights)}"
            )
        self.fleet, self.path = fleet, path
        self.weights = {task: w / total for task, w in weights.items()}
        self._known: dict[tuple[str, str], Outcome] = {}
        if path is not None and path.exists():
            self._read(path)

    def outcomes(
        self,
        genomes: Sequence[Genome],
        split: str = "validation",
        advance: Callable[[int], None] | None = None,
    ) -> list[Outcome]:
        """One per genome, in order; only those never seen are computed.

        Args:
            advance: told how many more are done.
        """
        advance = advance or (lambda count: None)
        places = [(genome.key, split) for genome in genomes]
        new = {p: g for p, g in zip(places, genomes, strict=True) if p not in self._known}
        advance(len(genomes) - len(new))
        order = list(new)

        def keep(index: int, outcome: Outcome) -> None:
            self._check(outcome)
            self._known[order[index]] = outcome
            self._write(order[index], outcome)
            advance(1)

        if new:
            self.fleet.map([Job(genome, split) for genome in new.values()], keep)
        return [self._known[place] for place in places]

    def fitness(self, outcome: Outcome) -> float:
        """sum_t w_t score_t; a task of weight 0 does not count even where its score is NaN."""
        return sum(w * outcome.scores[task] for task, w in self.weights.items() if w > 0)

    def _check(self, outcome: Outcome) -> None:
        missing = [task for task in self.weights if task not in outcome.scores]
        if missing:
            raise ValueError(f"scorer: expected a score of task {missing[0]!r}, got none")

    def _read(self, path: Path) -> None:
        """Every whole line; a torn last one, of a killed run, is cut off."""
        whole = 0
        with path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                record = json.loads(line)
                place = record.pop("genome"), record.pop("split")
                self._known[place] = Outcome(**record)
                whole += len(line)
        with path.open("r+b") as file:
            file.truncate(whole)

    def _write(self, place: tuple[str, str], outcome: Outcome) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        key, split = place
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"genome": key, "split": split, **asdict(outcome)}) + "\n")


class Account:
    """A method's share of the ledger: what it asked for counts, whoever computed it first.

    Args:
        ledger: shared by the methods of a comparison.
        budget: evaluations at most; None for no bound.
        advance: told how many more are done.

    Attributes:
        used: different individuals evaluated on the validation split.
        history: (used, best fitness so far, weighted) after each of them.
        best: genome and fitness of the best so far.
    """

    def __init__(
        self,
        ledger: Ledger,
        budget: int | None = None,
        advance: Callable[[int], None] | None = None,
    ) -> None:
        self.ledger, self.budget, self.advance = ledger, budget, advance or (lambda count: None)
        self.history: list[tuple[int, float]] = []
        self.best: tuple[Genome | None, float] = (None, math.nan)
        self._fitness: dict[str, float] = {}

    @property
    def used(self) -> int:
        return len(self._fitness)

    @property
    def left(self) -> float:
        return math.inf if self.budget is None else self.budget - self.used

    def fitness(self, genomes: Sequence[Genome]) -> list[float]:
        """Of each; NaN for those that the budget no longer covers."""
        new = list({g.key: g for g in genomes if g.key not in self._fitness}.values())
        if self.budget is not None:
            new = new[: self.budget - self.used]
        outcomes = self.ledger.outcomes(new, advance=self.advance)
        for genome, outcome in zip(new, outcomes, strict=True):
            value = self.ledger.fitness(outcome)
            self._fitness[genome.key] = value
            if self.best[0] is None or better(value, self.best[1]):
                self.best = (genome, value)
            self.history.append((self.used, self.best[1]))
        return [self._fitness.get(genome.key, math.nan) for genome in genomes]

    def record(self) -> dict[str, Any]:
        return {"fitness": self._fitness, "history": self.history}

    def restore(self, record: Mapping[str, Any], best: Genome | None) -> None:
        self._fitness = dict(record["fitness"])
        self.history = [(used, fit) for used, fit in record["history"]]
        self.best = (best, math.nan if best is None else self._fitness[best.key])
