"""The page of a comparison: fitness over evaluations, and a table with intervals over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_ext import report
from gemma_ext.papers.genome.compare import Row
from gemma_ext.report import BLUE, GREY, INK, axes, svg, this_machine, write_page

_COLOURS = (BLUE, "#e8710a", "#188038", "#9334e6", "#d93025", INK, "#00897b", "#b06000", GREY)


@dataclass(frozen=True)
class Summary:
    """A method over S seeds.

    Attributes:
        method: its name.
        used: mean number of evaluations.
        validation, test: (mean, half width of its 95 % interval) of the fitness; NaN half width
            with one seed.
        lead: (mean, half width) of the search's test fitness less this one's, paired by seed.
        scores: mean of each task's test score.
    """

    method: str
    used: float
    validation: tuple[float, float]
    test: tuple[float, float]
    lead: tuple[float, float]
    scores: dict[str, float]

    @property
    def verdict(self) -> str:
        """Whether the search is ahead of this method by more than the interval."""
        mean, width = self.lead
        if mean == 0.0 and width == 0.0:
            return "itself"
        if math.isnan(width) or abs(mean) <= width:
            return "not decided"
        return "ahead" if mean > 0 else "behind"


def summaries(runs: Sequence[Sequence[Row]]) -> list[Summary]:
    """One per method, from the rows of each seed; the first row of a run is the search.

    Raises:
        ValueError: runs with different methods.
    """
    methods = [[row.method for row in rows] for rows in runs]
    if not runs or any(names != methods[0] for names in methods):
        raise ValueError(f"runs: expected the same methods in each, got {methods}")
    made = []
    for at, method in enumerate(methods[0]):
        rows = [run[at] for run in runs]
        leads = [run[0].test - run[at].test for run in runs]
        tasks = rows[0].scores
        made.append(
            Summary(
                method,
                sum(row.used for row in rows) / len(rows),
                mean_interval([row.validation for row in rows]),
                mean_interval([row.test for row in rows]),
                mean_interval(leads),
                {task: sum(row.scores[task] for row in rows) / len(rows) for task in tasks},
            )
        )
    return made


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % interval by Student's t; NaN for one value."""
    mean, half = report.interval(values)
    return mean, math.nan if half is None else half


def number(value: tuple[float, float]) -> str:
    """A mean with its interval."""
    mean, width = value
    return f"{mean:.4g}" if math.isnan(width) else f"{mean:.4g} ± {width:.2g}"


def table(found: Sequence[Summary]) -> list[dict[str, str]]:
    """Cells of the table, as text."""
    return [
        {
            "method": one.method,
            "evaluations": f"{one.used:.0f}",
            "validation": number(one.validation),
            "test": number(one.test),
            "lead": number(one.lead),
            "verdict": one.verdict,
        }
        for one in found
    ]


def curves(runs: Sequence[Sequence[Row]]) -> str:
    """SVG of the best validation fitness over evaluations, mean and range over the seeds."""
    figure, panel = axes(1, 1, (8.0, 4.4))
    order = [at for at, row in enumerate(runs[0]) if len(row.history) > 1]
    for colour, at in zip(_COLOURS, order, strict=False):
        histories = [run[at].history for run in runs]
        length = min(len(history) for history in histories)
        known = [[fit for _, fit in history[:length]] for history in histories]
        steps = range(1, length + 1)
        mean = [sum(now) / len(now) for now in zip(*known, strict=True)]
        low, high = ([f(now) for now in zip(*known, strict=True)] for f in (min, max))
        panel.plot(steps, mean, color=colour, label=runs[0][at].method, lw=2.2 if at == 0 else 1.2)
        panel.fill_between(steps, low, high, color=colour, alpha=0.12, lw=0)
    panel.set_xlabel("evaluations")
    panel.set_ylabel("best validation fitness")
    panel.legend(frameon=False, fontsize=9)
    return svg(figure, "Best validation fitness over the number of evaluations, by method.")


def write_report(
    path: Path, runs: Sequence[Sequence[Row]], *, title: str, facts: Mapping[str, Any]
) -> list[Summary]:
    """Writes the page and returns what its table says.

    Args:
        runs: rows of each seed.
        title: headline.
        facts: rows about the run: pool, tasks, seeds, command.
    """
    found = summaries(runs)
    others = [one for one in found[1:] if "vote" not in one.method]
    numbers = [(f"test fitness of {found[0].method}", number(found[0].test))]
    if others:
        best = max(others, key=lambda one: one.test[0])
        numbers += [(f"of {best.method}, the best of the others", number(best.test))]
        numbers += [
            (f"lead, {best.verdict if best.verdict != 'itself' else 'none'}", number(best.lead))
        ]
    write_page(
        path,
        "gemma_ext.papers.genome",
        "evolve.html.jinja",
        numbers=numbers,
        machine=this_machine(),
        title=title,
        rows=table(found),
        tasks=list(found[0].scores),
        scores=[[one.method, *(f"{s:.4g}" for s in one.scores.values())] for one in found],
        curves=curves(runs),
        facts={name: str(value) for name, value in facts.items()},
        seeds=len(runs),
    )
    return found
