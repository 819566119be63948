"""Tables and figures of a run: performance against forgetting, and against time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gemma_ext.papers.mergebench.protocol import REFERENCES, Outcome
from gemma_ext.papers.mergebench.scores import Interval, interval, ranks

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Row:
    """An algorithm over all seeds.

    Attributes:
        rank: mean of its ranks by performance among the merges of a seed; None of a reference.
        by_domain: normalised performance.
        merge_seconds: preparation and one merge; tuning_seconds: everything that was tried.
    """

    algorithm: str
    performance: Interval
    retention: Interval
    rank: Interval | None
    by_domain: Mapping[str, float]
    merge_seconds: float
    tuning_seconds: float
    seeds: int


def rows(outcomes: Sequence[Outcome]) -> list[Row]:
    """One row per algorithm, references first, then by rank."""
    by_name: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        by_name.setdefault(outcome.algorithm, []).append(outcome)
    placed: dict[str, list[float]] = {}
    for seed in sorted({o.seed for o in outcomes}):
        merges = {
            o.algorithm: o.performance
            for o in outcomes
            if o.seed == seed and o.algorithm not in REFERENCES
        }
        for name, rank in ranks(merges).items():
            placed.setdefault(name, []).append(rank)
    table = [_row(name, found, placed.get(name)) for name, found in by_name.items()]
    return sorted(table, key=lambda row: row.rank.mean if row.rank else 0.0)


def _row(name: str, found: Sequence[Outcome], placed: Sequence[float] | None) -> Row:
    n = len(found)
    once = [o.prepare_seconds + o.merge_seconds / max(1, o.configurations) for o in found]
    return Row(
        algorithm=name,
        performance=interval([o.performance for o in found]),
        retention=interval([o.retention for o in found]),
        rank=interval(placed) if placed else None,
        by_domain={d: sum(o.normalised[d] for o in found) / n for d in found[0].normalised},
        merge_seconds=sum(once) / n,
        tuning_seconds=sum(o.seconds for o in found) / n,
        seeds=n,
    )


def markdown(table: Sequence[Row]) -> str:
    """The table of a run; intervals are of 95 % over the seeds."""
    domains = list(table[0].by_domain)
    head = ["algorithm", "rank", "performance", "retention", *domains, "merge s", "with tuning s"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in table:
        cells = [
            row.algorithm,
            str(row.rank) if row.rank else "",
            str(row.performance),
            str(row.retention),
            *(f"{row.by_domain[d]:.3f}" for d in domains),
            f"{row.merge_seconds:.2f}",
            f"{row.tuning_seconds:.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def figure(table: Sequence[Row]) -> Figure:
    """Performance against retention and against the seconds of tuning, with intervals."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(11, 4.6), layout="constrained")
    forgetting, cost = drawn.subplots(1, 2, sharey=True)
    for number, row in enumerate(table):
        colour = "#9aa5b1" if row.rank is None else f"C{number % 10}"
        shape = "s" if row.rank is None else "o"
        y = {"y": row.performance.mean, "yerr": _bar(row.performance)}
        style = {"fmt": shape, "color": colour, "capsize": 3}
        forgetting.errorbar(
            row.retention.mean, xerr=_bar(row.retention), label=row.algorithm, **y, **style
        )
        if row.rank is not None:
            cost.errorbar(max(row.tuning_seconds, 1e-3), **y, **style)
    forgetting.set(xlabel="retention of general tasks (base = 1)")
    forgetting.set(ylabel="performance (expert = 1)")
    cost.set(xlabel="seconds with tuning", xscale="log")
    for axes in (forgetting, cost):
        axes.grid(alpha=0.3)
    drawn.legend(loc="outside right center", fontsize=8)
    return drawn


def _bar(of: Interval) -> float | None:
    return of.half if of.half < float("inf") else None
