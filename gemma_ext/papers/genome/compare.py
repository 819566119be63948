"""GENOME beside its baselines: one pool, one ledger, the same number of evaluations for each."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from gemma_ext.papers.genome.baselines import BASELINES
from gemma_ext.papers.genome.config import Search
from gemma_ext.papers.genome.ensemble import centre, ensemble_score, majority, oracle_score
from gemma_ext.papers.genome.evaluation import Account, Ledger, Outcome
from gemma_ext.papers.genome.population import ranked
from gemma_ext.papers.genome.recipe import Genome
from gemma_ext.papers.genome.search import Evolved


@dataclass(frozen=True)
class Row:
    """What a method chose, and how that does on samples it never saw.

    Attributes:
        method: its name.
        used: evaluations it asked for.
        validation, test: fitness of the choice on the two splits.
        scores: of each task on the test split.
        genome: the choice; None of an ensemble.
        history: (evaluations, best validation fitness so far).
    """

    method: str
    used: int
    validation: float
    test: float
    scores: dict[str, float]
    genome: Genome | None = None
    history: tuple[tuple[int, float], ...] = ()

    def record(self) -> dict[str, Any]:
        """JSON form."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return fields | {"genome": self.genome.key if self.genome else None}


def searched(ledger: Ledger, search: Search, evolved: Evolved) -> Row:
    """The row of a finished GENOME run."""
    genome = evolved.best
    if "chosen_by_test" in search.defects:
        genomes = [one.genome for one in evolved.population]
        outcomes = ledger.outcomes(genomes, "test")
        genome = genomes[ranked([ledger.fitness(o) for o in outcomes])[0]]
    used = evolved.history[-1][0] if evolved.history else 0
    return _row(ledger, search.method, genome, evolved.fitness, used, evolved.history)


def baseline(
    ledger: Ledger,
    name: str,
    experts: int,
    budget: int,
    search: Search,
    advance: Callable[[int], None] | None = None,
) -> Row:
    """The row of one of `BASELINES`.

    Args:
        advance: told how many more evaluations are done.

    Raises:
        ValueError: another name.
    """
    if name not in BASELINES:
        raise ValueError(f"baselines: expected one of {', '.join(BASELINES)}, got {name!r}")
    account = Account(ledger, budget, advance)
    options = {}
    if name == "lorahub" and "lorahub_sign" in search.defects:
        options["sign"] = 1.0
    BASELINES[name](account, experts, search.seed, **options)
    genome, fitness = account.best
    return _row(ledger, name, genome, fitness, account.used, tuple(account.history))


def ensemble(
    ledger: Ledger, search: Search, evolved: Evolved, size: int, free_text: Collection[str] = ()
) -> Row | None:
    """The row of the fittest `size` individuals together; None where a task has no answers.

    Args:
        free_text: tasks whose answers are sentences, decided by `centre`; the others by `majority`.
    """
    fitness = [one.fitness for one in evolved.population]
    genomes = [one.genome for one in evolved.population]
    if "chosen_by_test" in search.defects:
        fitness = [ledger.fitness(o) for o in ledger.outcomes(genomes, "test")]
    members = list(dict.fromkeys(genomes[i] for i in ranked(fitness)))[:size]
    outcomes = ledger.outcomes(members, "test")
    if not all(task in outcomes[0].answers for task in ledger.weights):
        return None
    scores = {
        task: oracle_score(outcomes, task)
        if "oracle_vote" in search.defects
        else ensemble_score(outcomes, task, centre if task in free_text else majority)
        for task in ledger.weights
    }
    used = evolved.history[-1][0] if evolved.history else 0
    name = f"{search.method}, vote of {len(members)}"
    return Row(name, used, evolved.fitness, ledger.fitness(Outcome(scores)), scores)


def _row(
    ledger: Ledger,
    name: str,
    genome: Genome,
    validation: float,
    used: int,
    history: tuple[tuple[int, float], ...],
) -> Row:
    outcome = ledger.outcomes([genome], "test")[0]
    return Row(name, used, validation, ledger.fitness(outcome), outcome.scores, genome, history)
