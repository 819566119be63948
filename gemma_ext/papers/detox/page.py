"""Table, plots and page of a detoxification study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_ext import report
from gemma_ext.report import plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Record = Mapping[str, Any]
"""A `Row` or a `Split` as `dataclasses.asdict` gives it."""
TIER = {
    "none": "as it is",
    "constant": "constant",
    "per_input": "per input",
    "per_token": "per token",
}
COLOUR = {"constant": plots.GREY, "per_input": "#e08a3c", "per_token": plots.BLUE}
HEAD = (
    "tier", "strength", "toxicity", "expected maximum", "probability",
    "perplexity", "distinct-2", "repetition", "capability",
)  # fmt: skip
SPLIT_HEAD = (
    "latents", "best one fires", "any of the best", "on clean text",
    "toxicity before", "one held down", "several held down",
)  # fmt: skip


def table(rows: Sequence[Record]) -> list[list[str]]:
    """A row of cells for each setting of a sweep."""
    return [
        [
            TIER[row["tier"]],
            f"{row['alpha']:g}",
            *(f"{row['toxicity'][key]:.3f}" for key in ("mean", "expected_maximum", "probability")),
            f"{row['perplexity']:.1f}",
            f"{row['distinct']:.3f}",
            f"{row['repetition']:.3f}",
            "" if row["capability"] is None else f"{row['capability']:.3f}",
        ]
        for row in rows
    ]


def split_table(splits: Sequence[Record]) -> list[list[str]]:
    """A row of cells for each width."""
    shares = ("one", "several", "clean", "before", "toxicity_one", "toxicity_several")
    return [[f"{s['features']:,}", *(f"{s[key]:.3f}" for key in shares)] for s in splits]


def markdown(rows: Sequence[Record], splits: Sequence[Record] = ()) -> str:
    texts = []
    for head, cells in ((HEAD, table(rows)), (SPLIT_HEAD, split_table(splits))):
        if cells:
            lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
            texts.append("\n".join([*lines, *("| " + " | ".join(row) + " |" for row in cells)]))
    return "\n\n".join(texts) + "\n"


def figure(rows: Sequence[Record]) -> Figure:
    """Toxicity against fluency and against capability, a curve over strengths for each tier."""
    measured = rows[0]["capability"] is not None
    drawn, panels = plots.axes(1, 1 + measured, (4.6 * (1 + measured), 3.6), squeeze=False)
    names = [("perplexity", "perplexity of the continuations")]
    names += [("capability", "capability")] * measured
    for panel, (key, label) in zip(panels[0], names, strict=True):
        start = rows[0]
        for tier, colour in COLOUR.items():
            path = [start, *(row for row in rows if row["tier"] == tier)]
            if len(path) > 1:
                x = [row[key] for row in path]
                y = [row["toxicity"]["mean"] for row in path]
                panel.plot(x, y, "o-", color=colour, ms=3.5, lw=1.2, label=TIER[tier])
        panel.plot(start[key], start["toxicity"]["mean"], "s", color=plots.INK, label="as it is")
        panel.set(xlabel=label, ylabel="mean toxicity")
        if key == "perplexity":
            panel.set_xscale("log")
    panels[0][0].legend(fontsize=8)
    return drawn


def write(
    path: Path,
    rows: Sequence[Record],
    drops: Sequence[tuple[int, float]],
    splits: Sequence[Record],
    facts: Mapping[str, str],
) -> None:
    """The page of a study.

    Args:
        rows: of a sweep, the model as it is first.
        drops: (latent, drop of toxicity) of the causal test.
        facts: rows about the run.
    """
    before = rows[0]
    gentle = [row for row in rows if row["perplexity"] <= 1.1 * before["perplexity"]]
    best = min(gentle, key=lambda row: row["toxicity"]["mean"])
    report.write_page(
        path,
        "gemma_ext.papers.detox",
        "page.html.jinja",
        numbers=[
            ("mean toxicity as it is", f"{before['toxicity']['mean']:.3f}"),
            ("lowest within 10 % of perplexity", f"{best['toxicity']['mean']:.3f}"),
            ("by", f"{TIER[best['tier']]}, {best['alpha']:g}"),
        ],
        machine=report.this_machine(),
        head=HEAD,
        rows=table(rows),
        drops=[(str(latent), f"{drop:+.3f}") for latent, drop in drops],
        split_head=SPLIT_HEAD,
        splits=split_table(splits),
        facts=dict(facts),
        figure=plots.svg(figure(rows), "toxicity against fluency and capability"),
    )
