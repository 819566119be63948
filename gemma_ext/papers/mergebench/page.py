"""Table and page of a run: performance against forgetting, and against time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gemma_ext import report
from gemma_ext.papers.mergebench.protocol import REFERENCES, Outcome
from gemma_ext.papers.mergebench.scores import Interval, interval, ranks
from gemma_ext.report import plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKERS = "o^D"


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
    drawn, (forgetting, cost) = plots.axes(1, 2, (9.5, 4.6), sharey=True)
    for number, row in enumerate(table):
        reference = row.rank is None
        style = {
            "y": row.performance.mean,
            "yerr": _bar(row.performance),
            "fmt": "s" if reference else MARKERS[number // 10 % len(MARKERS)],
            "color": plots.GREY if reference else f"C{number % 10}",
            "capsize": 3,
        }
        forgetting.errorbar(
            row.retention.mean, xerr=_bar(row.retention), label=row.algorithm, **style
        )
        if not reference:
            cost.errorbar(max(row.tuning_seconds, 1e-3), **style)
    forgetting.set(xlabel="retention of general tasks (base = 1)")
    forgetting.set(ylabel="performance (expert = 1)")
    cost.set(xlabel="seconds with tuning", xscale="log")
    for axes in (forgetting, cost):
        axes.grid(alpha=0.3)
    drawn.legend(loc="outside lower center", ncols=3, fontsize=8)
    return drawn


def write(path: Path, table: Sequence[Row], question: str) -> None:
    """The page of a run; `question` says what was merged and how it was scored."""
    best = next(row for row in table if row.rank)
    report.write_page(
        path,
        "gemma_ext.papers.mergebench",
        "page.html.jinja",
        numbers=[
            ("best by rank", best.algorithm),
            ("its performance (experts = 1)", str(best.performance)),
            ("its retention (base = 1)", str(best.retention)),
        ],
        machine=report.this_machine(),
        question=question,
        seeds=best.seeds,
        figure=plots.svg(figure(table), "performance against retention and against seconds"),
        domains=list(best.by_domain),
        rows=table,
    )


def _bar(of: Interval) -> float | None:
    return of.half if of.half < float("inf") else None
