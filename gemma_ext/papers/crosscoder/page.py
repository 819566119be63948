"""Tables and page of a study; every cell is a mean over seeds with its 95 % interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_ext import report
from gemma_ext.papers.crosscoder.study import interval
from gemma_ext.report import plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Runs = Mapping[str, Sequence[Mapping[str, Any]]]
"""Records of each kind of crosscoder, a seed each."""
KIND = {"batchtopk": "BatchTopK", "l1": "L1"}
WORLD = {
    "found": "concepts found",
    "weak called chat only": "weak, called chat only",
    "of these flagged": "of these flagged by ν",
    "exclusive called chat only": "chat's own, called chat only",
    "of these confirmed": "of these confirmed by ν",
    "active": "L0",
}
DIFF = {
    "explained": "variance explained",
    "active": "L0",
    "dead": "dead",
    "base only": "base only",
    "shared": "shared",
    "chat only": "chat only",
    "flagged": "flagged by ν",
    "confirmed": "confirmed by ν",
    "confirmed at home": "confirmed, in the behaviour",
    "flagged at home": "flagged, in the behaviour",
    "random control": "confirmed by random directions",
    "most leaning at home": "32 most leaning to chat, share in the behaviour",
    "least leaning at home": "32 least leaning",
    "all at home": "all live latents",
    "overlap": "chat only within shared ν",
    "correlation": "corr(Δ, 1 - ν)",
    "detector share": "best detector of the cue: share of its activation there",
    "detector recall": "share of the cues it fires on",
    "detector delta": "its Δ",
    "detector rank": "its rank by Δ",
    "detector nu error": "its ν of the error",
    "detector nu reconstruction": "its ν of the reconstruction",
}


def table(runs: Runs, columns: Mapping[str, str]) -> list[list[str]]:
    """Rows: a figure, then a cell for each kind."""
    return [
        [title, *(interval([record[key] for record in runs[kind]]) for kind in runs)]
        for key, title in columns.items()
    ]


def arm_table(arms: Runs) -> list[list[str]]:
    """Rows: an arm, then KL over all reply tokens and over the first ones, for each kind."""
    names = next(iter(arms.values()))[0]
    return [
        [
            name,
            *(
                interval([run[name][part] for run in arms[kind]])
                for kind in arms
                for part in ("all", "first")
            ),
        ]
        for name in names
    ]


def markdown(worlds: Runs, diffs: Runs, arms: Runs) -> str:
    """All tables."""
    kinds = [KIND[kind] for kind in diffs]
    twice = [f"{kind}, {part}" for kind in kinds for part in ("all", "first")]
    parts = (
        (["planted worlds", *kinds], table(worlds, WORLD)),
        (["base against chat", *kinds], table(diffs, DIFF)),
        (["KL(chat, patched)", *twice], arm_table(arms)),
    )
    texts = []
    for head, rows in parts:
        lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        texts.append("\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n")
    return "\n".join(texts)


def figure(diffs: Runs, arms: Runs) -> Figure:
    """Chat-only latents by kind, and the share of KL that each arm takes away."""
    drawn, (left, right) = plots.axes(1, 2, (9.5, 3.8))
    kinds = list(diffs)
    confirmed = [_mean(diffs[kind], "confirmed") for kind in kinds]
    left.bar([KIND[k] for k in kinds], confirmed, color=plots.BLUE, label="confirmed by ν")
    left.bar(
        [KIND[k] for k in kinds],
        [_mean(diffs[kind], "flagged") for kind in kinds],
        bottom=confirmed,
        color=plots.GREY,
        label="flagged by ν",
    )
    left.set(ylabel="latents called chat only by the norms")
    left.legend(fontsize=8)
    names = [name for name in next(iter(arms.values()))[0] if name != "none"]
    for number, kind in enumerate(kinds):
        shares = [_reduction(arms[kind], name) for name in names]
        at = [place + 0.38 * number for place in range(len(names))]
        colour = plots.BLUE if kind == "batchtopk" else plots.GREY
        right.barh(at, shares, height=0.36, color=colour, label=KIND[kind])
    right.set(xlabel="share of KL(chat, base state) taken away, first tokens")
    right.set_yticks([place + 0.19 for place in range(len(names))], names)
    right.invert_yaxis()
    right.legend(fontsize=8)
    return drawn


def write(
    path: Path,
    worlds: Runs,
    diffs: Runs,
    arms: Runs,
    null: Mapping[str, float],
    facts: Mapping[str, str],
) -> None:
    """The page of a study; `facts` are rows about the run: models, layer, sizes."""
    kinds = [KIND[kind] for kind in diffs]
    report.write_page(
        path,
        "gemma_ext.papers.crosscoder",
        "page.html.jinja",
        numbers=[
            (f"latents called chat only by {KIND[k]}", interval([r["chat only"] for r in diffs[k]]))
            for k in diffs
        ]
        + [
            (f"of these flagged by ν, {KIND[k]}", interval([r["flagged"] for r in diffs[k]]))
            for k in diffs
        ],
        machine=report.this_machine(),
        kinds=kinds,
        worlds=table(worlds, WORLD),
        diffs=table(diffs, DIFF),
        arms=arm_table(arms),
        null={name: f"{value:.6g}" for name, value in null.items()},
        seeds=len(next(iter(diffs.values()))),
        facts=dict(facts),
        figure=plots.svg(figure(diffs, arms), "chat-only latents and what each arm explains"),
    )


def _mean(runs: Sequence[Mapping[str, Any]], key: str) -> float:
    return sum(run[key] for run in runs) / len(runs)


def _reduction(runs: Sequence[Mapping[str, Any]], name: str) -> float:
    """1 - KL(arm) / KL(none) over the first tokens."""
    return sum(1 - run[name]["first"] / run["none"]["first"] for run in runs) / len(runs)
