"""Table, plots and page of a study of hardened models."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_ext import report
from gemma_ext.report import interval, plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Record = Mapping[str, Any]
"""Of one model: `name`, `seed`, the numbers of an `Audit`."""
NAMES = {
    "clean": "no attack",
    "attacked": "K as trained",
    "strong": "K = 100, restarts",
    "gcg": "GCG",
    "loss_clean": "loss",
    "loss_attacked": "loss, attacked",
    "loss_strong": "loss, K = 100",
    "loss_gcg": "loss, GCG",
    "useful": "useful answers",
    "over_refusal": "refused: useful",
    "borderline": "refused: borderline",
}
RATES = ("clean", "attacked", "strong", "gcg")
COLOURS = (plots.INK, plots.BLUE, "#e08a3c", "#3c9a6b", "#8a4fbf", plots.GREY)


def grouped(rows: Sequence[Record]) -> dict[str, list[Record]]:
    """Records by name, in order."""
    found: dict[str, list[Record]] = {}
    for row in rows:
        found.setdefault(row["name"], []).append(row)
    return found


def columns(rows: Sequence[Record]) -> list[str]:
    """Numbers that all records have, the known ones first."""
    known = [name for name in NAMES if all(name in row for row in rows)]
    more = [name for name in rows[0] if name not in (*NAMES, "name", "seed", "seconds")]
    return known + [name for name in more if all(name in row for row in rows)]


def table(rows: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """Head and a row of cells for each name."""
    names = columns(rows)
    head = ["model", "seeds", *(NAMES.get(name, name) for name in names)]
    cells = []
    for name, some in grouped(rows).items():
        line = [name, str(len(some))]
        for column in names:
            mean, half = interval([row[column] for row in some])
            line.append(f"{mean:.2f}" if half is None else f"{mean:.2f} ± {half:.2f}")
        cells.append(line)
    return head, cells


def markdown(rows: Sequence[Record]) -> str:
    head, cells = table(rows)
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in cells)]) + "\n"


def rates(rows: Sequence[Record]) -> Figure:
    """Success of every attack on every model."""
    drawn, panel = plots.axes(1, 1, (8.2, 3.2))
    groups = grouped(rows)
    shown = [name for name in RATES if all(name in row for row in rows)]
    width = 0.8 / len(shown)
    for at, (rate, colour) in enumerate(zip(shown, COLOURS[1:], strict=False)):
        found = [interval([row[rate] for row in some]) for some in groups.values()]
        x = [place + (at - (len(shown) - 1) / 2) * width for place in range(len(groups))]
        panel.bar(
            x,
            [mean for mean, _ in found],
            width,
            yerr=[half or 0.0 for _, half in found],
            color=colour,
            label=NAMES[rate],
            error_kw={"lw": 0.8},
        )
    panel.set_xticks(range(len(groups)), list(groups))
    panel.set(ylabel="attacks that succeed", ylim=(0, 1.05))
    panel.legend(fontsize=8, ncols=len(shown), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return drawn


def agreement(rows: Sequence[Record]) -> float | None:
    """Pearson's r over models of the losses under the strong attack and under GCG.

    None of fewer than three models, or where one of the losses is the same for all.
    """
    if len(rows) < 3 or any("loss_gcg" not in row for row in rows):
        return None
    pairs = [[row[key] for row in rows] for key in ("loss_strong", "loss_gcg")]
    try:
        return statistics.correlation(*pairs)
    except statistics.StatisticsError:
        return None


def trade(rows: Sequence[Record]) -> Figure:
    """Robustness against useful answers, a point for each seed."""
    drawn, panels = plots.axes(1, 2, (8.2, 3.2))
    for panel, (key, label) in zip(
        panels, (("useful", "useful answers"), ("borderline", "borderline refused")), strict=True
    ):
        for (name, some), colour in zip(grouped(rows).items(), COLOURS, strict=False):
            x, y = ([row[k] for row in some] for k in (key, "strong"))
            panel.plot(x, y, "o", color=colour, ms=5, label=name)
        panel.set(xlabel=label, ylabel="strong attack succeeds", xlim=(-0.05, 1.05))
        panel.set_ylim(-0.05, 1.05)
    panels[0].legend(fontsize=8)
    return drawn


def curves(histories: Mapping[str, Sequence[Record]]) -> Figure:
    """Loss of harmful targets under the training and the held-out attack, over steps."""
    drawn, panels = plots.axes(1, 2, (8.2, 3.0))
    chosen = (("away", "training, attacked"), ("heldout_harmful_attacked", "held out, attacked"))
    for panel, (key, label) in zip(panels, chosen, strict=True):
        for (name, lines), colour in zip(histories.items(), COLOURS[1:], strict=False):
            points = [(line["step"], line[key]) for line in lines if key in line]
            if points:
                panel.plot(*zip(*points, strict=True), "-", color=colour, lw=1.2, label=name)
        panel.set(xlabel="step", ylabel=f"loss of harmful targets, {label}")
        panel.yaxis.label.set_size(8)
    panels[0].legend(fontsize=8)
    return drawn


def write(
    path: Path,
    rows: Sequence[Record],
    histories: Mapping[str, Sequence[Record]],
    facts: Mapping[str, str],
    *,
    command: str,
) -> None:
    """The page of a study.

    Args:
        rows: records, the model as it was first.
        histories: lines of a trainer's metrics, by name.
        facts: rows about the run.
        command: that made it.
    """
    groups = grouped(rows)
    before = next(iter(groups.values()))[0]
    head, cells = table(rows)
    cards = [("strong attack succeeds, before", f"{before['strong']:.2f}")]
    for name in ("C-AdvUL", "no attack"):
        if name in groups:
            mean, _ = interval([row["strong"] for row in groups[name]])
            cards.append((f"after {name}", f"{mean:.2f}"))
    if (r := agreement(rows)) is not None:
        cards.append(("correlation of losses under K = 100 and GCG", f"{r:.2f}"))
    report.write_page(
        path,
        "gemma_ext.papers.continuous_at",
        "page.html.jinja",
        numbers=cards,
        machine=report.this_machine(),
        head=head,
        rows=cells,
        facts=dict(facts),
        command=command,
        rates=plots.svg(rates(rows), "success of attacks on each model"),
        trade=plots.svg(trade(rows), "robustness against utility"),
        curves=plots.svg(curves(histories), "losses of harmful targets over training"),
    )
