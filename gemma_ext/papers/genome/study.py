"""A whole run in a folder: search, baselines, votes, and what each is worth on the test split.

run/            state, lineage and finished genomes of the search
outcomes.jsonl  every evaluation
results.json    the rows
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from gemma_ext.distributed.fleet import Fleet
from gemma_ext.files import write_json
from gemma_ext.papers.genome.compare import Row, baseline, ensemble, searched
from gemma_ext.papers.genome.config import Search
from gemma_ext.papers.genome.evaluation import Account, Ledger
from gemma_ext.papers.genome.lineage import Workspace
from gemma_ext.papers.genome.search import Evolved, evolve

Bar = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


def run_study(
    fleet: Fleet,
    search: Search,
    experts: int,
    weights: Mapping[str, float],
    folder: Path,
    *,
    identity: Mapping[str, str],
    baselines: Sequence[str] = (),
    members: int = 0,
    free_text: Collection[str] = (),
    bar: Bar = lambda title, total: nullcontext(lambda count: None),
) -> tuple[Evolved, list[Row]]:
    """Searches, gives every baseline as many evaluations, and scores all choices on the test split.

    A killed run, started again, goes on where it stopped.

    Args:
        fleet: workers of an `Evaluator`.
        experts: M of the pool.
        weights: of the tasks.
        folder: of this run.
        identity: what the fitness depends on beside the search; see `Workspace`.
        baselines: keys of `BASELINES`.
        members: individuals that vote; 0 for no vote.
        free_text: tasks with sentences for answers; see `ensemble`.
        bar: (title, total) to a context that gives `advance(count)`.
    """
    workspace = Workspace(folder / "run", search, identity)
    ledger = Ledger(fleet, weights, folder / "outcomes.jsonl")
    with bar(search.method, _expected(search, experts)) as advance:
        account = Account(ledger, advance=advance)
        evolved = evolve(search, account, experts, workspace=workspace)
    rows = [searched(ledger, search, evolved)]
    if members:
        vote = ensemble(ledger, search, evolved, members, free_text)
        rows += [vote] if vote is not None else []
    for name in baselines:
        fixed = {"best parent": experts, "uniform soup": 1}  # have no use for more
        with bar(name, min(fixed.get(name, account.used), account.used)) as advance:
            rows.append(baseline(ledger, name, experts, account.used, search, advance))
    write_json(folder / "results.json", [row.record() for row in rows])
    return evolved, rows


def _expected(search: Search, experts: int) -> int:
    """Evaluations of a whole search, roughly: a population at its capacity all the time."""
    start = experts if search.start == "experts" else search.size
    children = search.cross_rate * (search.capacity // 2)
    mutants = search.individual_mutation_rate * (search.capacity + children)
    moves = search.capacity if search.moves else 0
    most = start + search.generations * round(children + mutants + moves)
    return most if search.budget is None else min(most, search.budget)
