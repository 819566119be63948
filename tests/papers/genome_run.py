"""A search in a process of its own, to be killed: `genome_run.py FOLDER PAUSE`."""

from __future__ import annotations

import sys
from pathlib import Path

from genome_toy import WEIGHTS, Toy

from gemma_ext.distributed.fleet import open_fleet
from gemma_ext.papers.genome.config import Search, search_from
from gemma_ext.papers.genome.evaluation import Account, Ledger
from gemma_ext.papers.genome.lineage import FINISHED, Workspace
from gemma_ext.papers.genome.search import Evolved, evolve

SEARCH = search_from(
    {"method": "genome+", "size": 5, "capacity": 6, "generations": 4, "longest": 2, "sigma": 0.02}
)


def run(
    folder: Path,
    *,
    search: Search = SEARCH,
    pause: float = 0.0,
    workers: int = 0,
    ray: str | None = None,
    budget: int | None = None,
    dies: bool = False,
) -> tuple[Evolved, Account]:
    with open_fleet(Toy(folder / FINISHED, pause, dies), workers, ray=ray) as fleet:
        (folder / FINISHED).mkdir(parents=True, exist_ok=True)
        account = Account(Ledger(fleet, WEIGHTS, folder / "evaluations.jsonl"), budget)
        workspace = Workspace(folder, search, {"pool": "toy"})
        return evolve(search, account, 5, workspace=workspace), account


if __name__ == "__main__":
    run(Path(sys.argv[1]), pause=float(sys.argv[2]))
