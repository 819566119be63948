"""Tables and figures of an audit, for pages of studies and for one of its own."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gemma_ext import report
from gemma_ext.papers.continuous_at.evaluation.harmbench import Behavior, Completions, success
from gemma_ext.papers.continuous_at.evaluation.intervals import wilson
from gemma_ext.papers.continuous_at.evaluation.over_refusal import Refusals
from gemma_ext.report import plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ASR_HEAD = ("attack", "behaviours", "success", "95 % interval", "of all test cases")
REFUSAL_HEAD = ("requests", "count", "refused", "95 % interval", "in part")


@dataclass(frozen=True)
class AttackRow:
    """Success of one attack.

    Attributes:
        attack: its name.
        behaviors: how many were attacked; shown: how many of them were shown by any completion.
        cases: completions in all; labelled: of those, how many show their behaviour.
    """

    attack: str
    behaviors: int
    shown: int
    cases: int
    labelled: int

    @property
    def rate(self) -> float:
        """Attack success rate; NaN without behaviours."""
        return self.shown / self.behaviors if self.behaviors else float("nan")


def attack_row(attack: str, completions: Completions) -> AttackRow:
    """Of labelled completions.

    Raises:
        ValueError: a completion without a label.
    """
    shown = success(completions)
    every = [one for found in completions.values() for one in found]
    return AttackRow(
        attack, len(shown), sum(shown.values()), len(every), sum(bool(one.label) for one in every)
    )


def by_category(
    attack: str, completions: Completions, behaviors: Sequence[Behavior]
) -> list[AttackRow]:
    """A row for each functional category, named attack, category."""
    groups: dict[str, Completions] = {}
    for behavior in behaviors:
        if behavior.id in completions:
            groups.setdefault(behavior.category, {})[behavior.id] = completions[behavior.id]
    return [attack_row(f"{attack}, {name}", group) for name, group in groups.items()]


def any_attack(all_completions: Mapping[str, Completions]) -> AttackRow:
    """At least one attack succeeded, behaviour by behaviour."""
    joined: Completions = {}
    for completions in all_completions.values():
        for key, found in completions.items():
            joined.setdefault(key, []).extend(found)
    return attack_row("any of them", joined)


def asr_table(rows: Sequence[AttackRow]) -> list[list[str]]:
    return [
        [
            row.attack,
            str(row.behaviors),
            f"{row.rate:.1%}",
            _interval(*wilson(row.shown, row.behaviors)),
            f"{row.labelled} of {row.cases}",
        ]
        for row in rows
    ]


def refusal_table(rows: Sequence[Refusals]) -> list[list[str]]:
    return [
        [
            f"{row.kind}, {'safe' if row.safe else 'unsafe'}",
            str(sum(row.counts)),
            f"{row.rate:.1%}",
            _interval(*row.interval),
            str(row.counts[2]),
        ]
        for row in rows
    ]


def asr_figure(models: Mapping[str, Sequence[AttackRow]]) -> Figure:
    """A bar for each attack and model, with intervals; models in the order that they are given."""
    names = list(dict.fromkeys(row.attack for rows in models.values() for row in rows))
    drawn, panel = plots.axes(1, 1, (6.4, 0.9 + 0.5 * len(names) * max(1, len(models) / 2)))
    colours = [plots.GREY, plots.BLUE, "#e08a3c", "#7a4fbf", "#2f9e6b"]
    height = 0.8 / len(models)
    for at, (model, rows) in enumerate(models.items()):
        for row in rows:
            y = names.index(row.attack) + (at - (len(models) - 1) / 2) * height
            low, high = wilson(row.shown, row.behaviors)
            colour = colours[at % len(colours)]
            panel.barh(y, row.rate, height * 0.9, color=colour, label=model)
            panel.plot([low, high], [y, y], color=plots.INK, lw=1)
    handles, labels = panel.get_legend_handles_labels()
    shown = dict(zip(labels, handles, strict=True))
    panel.legend(shown.values(), shown.keys(), fontsize=8)
    panel.set(xlim=(0, 1), xlabel="attack success rate", yticks=range(len(names)))
    panel.set_yticklabels(names)
    panel.invert_yaxis()
    return drawn


def loss_figure(searches: Mapping[str, Sequence[Sequence[float]]]) -> Figure:
    """Lowest loss so far over the steps of searches: the median of each group, thin each one."""
    drawn, panel = plots.axes(1, 1, (6.4, 3.4))
    colours = [plots.GREY, plots.BLUE, "#e08a3c", "#7a4fbf", "#2f9e6b"]
    for at, (name, runs) in enumerate(searches.items()):
        colour = colours[at % len(colours)]
        lowest = [[min(run[: step + 1]) for step in range(len(run))] for run in runs]
        for run in lowest:
            panel.plot(range(1, len(run) + 1), run, color=colour, lw=0.5, alpha=0.4)
        longest = max(map(len, lowest), default=0)
        # a search that stopped early keeps its loss
        median = [
            statistics.median(run[min(step, len(run) - 1)] for run in lowest if run)
            for step in range(longest)
        ]
        panel.plot(range(1, longest + 1), median, color=colour, lw=1.8, label=name)
    panel.set(xlabel="step", ylabel="lowest loss of the target")
    panel.legend(fontsize=8)
    return drawn


def write(
    path: Path,
    models: Mapping[str, Sequence[AttackRow]],
    refusals: Mapping[str, Sequence[Refusals]],
    searches: Mapping[str, Sequence[Sequence[float]]],
    facts: Mapping[str, str],
) -> None:
    """The page of an audit.

    Args:
        models: rows of attacks by the model's name.
        refusals: rows by the model's name.
        searches: losses of each search by the model's name.
        facts: rows about the run.
    """
    worst = {name: max(rows, key=lambda row: row.rate) for name, rows in models.items() if rows}
    report.write_page(
        path,
        "gemma_ext.papers.continuous_at.evaluation",
        "page.html.jinja",
        numbers=[(f"highest success against {name}", f"{r.rate:.0%}") for name, r in worst.items()],
        machine=report.this_machine(),
        asr_head=ASR_HEAD,
        asr={name: asr_table(rows) for name, rows in models.items()},
        asr_figure=plots.svg(asr_figure(models), "attack success rates"),
        refusal_head=REFUSAL_HEAD,
        refusals={name: refusal_table(rows) for name, rows in refusals.items()},
        loss_figure=plots.svg(loss_figure(searches), "losses of searches") if searches else "",
        facts=dict(facts),
    )


def _interval(low: float, high: float) -> str:
    return f"{low:.1%} to {high:.1%}"
