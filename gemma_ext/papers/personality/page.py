"""Tables, plots and page of a personality study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gemma_ext import report
from gemma_ext.papers.personality.calibration import CLEAN, Trial
from gemma_ext.papers.personality.stability import Stability
from gemma_ext.papers.personality.study import Effect
from gemma_ext.report import plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Trials = Mapping[str, Mapping[int, Sequence[Trial]]]
"""By trait and layer."""
Responses = Mapping[str, Mapping[str, Mapping[str, float]]]
"""By method, trait that is given, and trait that is measured."""
Levels = Mapping[str, Mapping[tuple[str, ...], Stability]]
COLOURS = (plots.BLUE, "#e08a3c", "#188038", "#9334e6", "#d93025", plots.INK)
STABILITY_HEAD = ("level", "group", "consistency", "low disruption", "composite")


def effect_head(effects: Sequence[Effect]) -> list[str]:
    return ["method", "trait", "alignment", "clean", *effects[0].benchmarks]


def effect_table(effects: Sequence[Effect]) -> list[list[str]]:
    """Differences to the method's baseline with 95 % intervals; * where Holm's p < 0.05."""
    return [
        [
            e.method,
            e.trait,
            str(e.alignment),
            f"{e.clean:.2f}",
            *(f"{d}{_star(e.adjusted[name])}" for name, d in e.benchmarks.items()),
        ]
        for e in effects
    ]


def response_table(responses: Responses) -> list[list[str]]:
    """A row for each method and trait given; a column for each trait measured."""
    return [
        [method, given, *(f"{value:+.3f}" for value in row.values())]
        for method, rows in responses.items()
        for given, row in rows.items()
    ]


def stability_table(levels: Levels) -> list[list[str]]:
    return [
        [
            level,
            ", ".join(group),
            *(f"{x:.3f}" for x in (s.consistency, s.low_disruption, s.composite)),
        ]
        for level, groups in levels.items()
        for group, s in groups.items()
    ]


def markdown(effects: Sequence[Effect], responses: Responses, levels: Levels) -> str:
    """All tables."""
    parts = (
        (effect_head(effects), effect_table(effects)),
        (_response_head(responses), response_table(responses)),
        (STABILITY_HEAD, stability_table(levels)),
    )
    texts = []
    for head, rows in parts:
        lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        texts.append("\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n")
    return "\n".join(texts)


def figure(trials: Trials) -> Figure:
    """Alignment over strength, a panel for each trait and a curve for each layer.

    Strengths whose texts are not clean enough are hollow.
    """
    drawn, panels = plots.axes(1, len(trials), (4.8 * len(trials), 3.6), squeeze=False)
    for panel, (trait, layers) in zip(panels[0], trials.items(), strict=True):
        for (layer, points), colour in zip(layers.items(), _cycle(len(layers)), strict=True):
            x, y = [t.strength for t in points], [t.aligned for t in points]
            panel.plot(x, y, "-", color=colour, lw=1.2, label=f"layer {layer}")
            fills = [colour if t.clean >= CLEAN else "none" for t in points]
            panel.scatter(x, y, s=16, c=fills, edgecolors=colour, zorder=3)
        panel.set(xlabel="strength", ylabel=f"shows {trait}", ylim=(-0.04, 1.04))
    panels[0][0].legend(fontsize=8)
    return drawn


def pareto(effects: Sequence[Effect], levels: Levels) -> Figure:
    """Alignment against the composite stability of each combination, which idleness maximises."""
    drawn, panel = plots.axes(1, 1, (5.6, 3.8))
    methods = list(dict.fromkeys(e.method for e in effects))
    for method, colour in zip(methods, _cycle(len(methods)), strict=True):
        some = [e for e in effects if e.method == method]
        x = [levels["combination"][e.method, e.trait].composite for e in some]
        y = [e.alignment.mean for e in some]
        error = [
            [e.alignment.mean - e.alignment.low for e in some],
            [e.alignment.high - e.alignment.mean for e in some],
        ]
        panel.errorbar(x, y, yerr=error, fmt="o", color=colour, ms=5, lw=1, label=method)
        for e, across, up in zip(some, x, y, strict=True):
            panel.annotate(
                e.trait, (across, up), xytext=(5, 3), textcoords="offset points", fontsize=7
            )
    panel.set(xlabel="composite stability", ylabel="alignment over the baseline")
    panel.legend(fontsize=8)
    return drawn


def write(
    path: Path,
    trials: Trials,
    effects: Sequence[Effect],
    responses: Responses,
    levels: Levels,
    facts: Mapping[str, str],
) -> None:
    """The page of a study; `facts` are rows about the run."""
    best = max(effects, key=lambda e: e.alignment.mean)
    report.write_page(
        path,
        "gemma_ext.papers.personality",
        "page.html.jinja",
        numbers=[
            ("largest alignment", str(best.alignment)),
            ("by", f"{best.method}, {best.trait}"),
            (
                "benchmarks moved, Holm's p < 0.05",
                str(sum(bool(_star(p)) for e in effects for p in e.adjusted.values())),
            ),
        ],
        machine=report.this_machine(),
        head=effect_head(effects),
        rows=effect_table(effects),
        response_head=_response_head(responses),
        responses=response_table(responses),
        stability_head=STABILITY_HEAD,
        stability=stability_table(levels),
        facts=dict(facts),
        curves=plots.svg(figure(trials), "alignment over strength, layer by layer"),
        pareto=plots.svg(pareto(effects, levels), "alignment against stability"),
    )


def _response_head(responses: Responses) -> list[str]:
    rows = next(iter(responses.values()))
    return ["method", "given", *(f"shows {trait}" for trait in next(iter(rows.values())))]


def _star(p: float | None) -> str:
    return " *" if p is not None and p < 0.05 else ""


def _cycle(count: int) -> list[str]:
    return [COLOURS[at % len(COLOURS)] for at in range(count)]
