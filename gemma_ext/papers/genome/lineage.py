"""A run on disk: state after each generation, and who came from whom.

state.json       what the next generation needs, written beside and renamed
lineage.jsonl    one line per individual made or moved, in order
finished/        genomes that others are built on, as weights: a cache
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gemma_ext.files import write_text
from gemma_ext.papers.genome.config import Search
from gemma_ext.papers.genome.evaluation import Account
from gemma_ext.papers.genome.population import Individual, individual_from
from gemma_ext.papers.genome.recipe import Genome, from_table, to_table

FINISHED = "finished"


@dataclass(frozen=True)
class State:
    """Between two generations.

    Attributes:
        generation: how many are done.
        population: individuals, evaluated.
        next_id: of the next individual.
        step: lambda of the next succession.
        best, worst: (genome, fitness) of all that were evaluated.
        stale: generations without a new best.
        events: lines of the lineage.
    """

    generation: int = 0
    population: tuple[Individual, ...] = ()
    next_id: int = 0
    step: float = 0.0
    best: tuple[Genome | None, float] = (None, math.nan)
    worst: tuple[Genome | None, float] = (None, math.nan)
    stale: int = 0
    events: tuple[dict[str, Any], ...] = ()

    def genomes(self) -> list[Genome]:
        ends = [genome for genome, _ in (self.best, self.worst) if genome is not None]
        return ends + [genome for one in self.population for genome in one.genomes()]


def event(generation: int, made: str, one: Individual) -> dict[str, Any]:
    """A line of the lineage."""
    return {
        "generation": generation,
        "made": made,
        "id": one.id,
        "parents": list(one.parents),
        "genome": one.genome.key,
        "fitness": one.fitness,
    }


class Workspace:
    """The folder of a run.

    Args:
        folder: made if it is not there.
        identity: what else the results depend on: digests of pool, tasks, model.

    Raises:
        ValueError: the folder holds a run with another search or identity.
    """

    def __init__(self, folder: Path, search: Search, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        # a run may go on for longer than it was first told
        told = asdict(replace(search, generations=0, budget=None, patience=None))
        told["defects"] = sorted(search.defects)
        self._identity = json.loads(json.dumps({"search": told, **identity}))
        folder.mkdir(parents=True, exist_ok=True)

    def load(self, account: Account) -> State | None:
        """The last state, with the account brought to it; None in a new folder."""
        path = self.folder / "state.json"
        if not path.exists():
            return None
        record = json.loads(path.read_text(encoding="utf-8"))
        for key, value in self._identity.items():
            if record["identity"].get(key) != value:
                raise ValueError(
                    f"workspace: expected a run with this {key} in {self.folder}, got one with "
                    "another; choose another folder"
                )
        genomes = from_table(record["genomes"])
        best, worst = (
            (genomes[key] if key else None, fitness)
            for key, fitness in (record["best"], record["worst"])
        )
        account.restore(record["account"], best[0])
        events = [json.loads(line) for line in self._lineage.read_text().splitlines()]
        return State(
            generation=record["generation"],
            population=tuple(individual_from(r, genomes) for r in record["population"]),
            next_id=record["next_id"],
            step=record["step"],
            best=best,
            worst=worst,
            stale=record["stale"],
            events=tuple(e for e in events if e["generation"] <= record["generation"]),
        )

    def save(self, state: State, account: Account) -> None:
        """State and lineage; finished genomes that nobody needs any more are removed."""
        record = {
            "identity": self._identity,
            "generation": state.generation,
            "population": [one.record() for one in state.population],
            "next_id": state.next_id,
            "step": state.step,
            "best": [state.best[0].key if state.best[0] else None, state.best[1]],
            "worst": [state.worst[0].key if state.worst[0] else None, state.worst[1]],
            "stale": state.stale,
            "genomes": to_table(state.genomes()),
            "account": account.record(),
        }
        # the state last: it says how much of the lineage counts
        write_text(self._lineage, "".join(json.dumps(line) + "\n" for line in state.events))
        write_text(self.folder / "state.json", json.dumps(record) + "\n")
        self._forget(state.genomes())

    @property
    def _lineage(self) -> Path:
        return self.folder / "lineage.jsonl"

    def _forget(self, genomes: Iterable[Genome]) -> None:
        finished = self.folder / FINISHED
        needed, left = set(), [parent for genome in genomes for parent in genome.parents]
        while left:
            genome = left.pop()
            path = finished / f"{genome.key}.safetensors"
            if path not in needed:
                needed.add(path)
                if not path.exists():
                    left += genome.parents
        for path in finished.glob("*.safetensors"):
            if path not in needed:
                path.unlink(missing_ok=True)
