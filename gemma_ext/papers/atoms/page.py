"""Table and page of a study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_ext import report
from gemma_ext.report import plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Record = Mapping[str, Any]
NAMES = {"atoms": "atoms", "random": "random dictionary", "axes": "principal axes"}
COLUMNS = {
    "r2": "R²",
    "r2_zero": "about 0",
    "r2_refit": "refitted",
    "r2_atomic": "under S",
    "active": "L0",
    "dead": "dead",
    "q_star": "q*",
    "unique": "K certain",
    "mu": "μ",
    "mu_99": "99 %",
    "welch": "Welch",
}


def rows(layers: Mapping[int, Record]) -> list[list[str]]:
    """Cells of the table of layers: layer, dictionary, then `COLUMNS`."""
    return [
        [str(layer), NAMES[kind], *(f"{found[kind][key]:.3g}" for key in COLUMNS)]
        for layer, found in layers.items()
        for kind in NAMES
    ]


def world_rows(worlds: Mapping[str, Record]) -> list[list[str]]:
    """Cells of the table of known worlds: world, product, share, cosine, R², refitted, L0."""
    keys = ("share", "cosine", "r2", "r2_refit", "active")
    return [
        [name, kind, *(f"{found[kind][key]:.3g}" for key in keys)]
        for name, found in worlds.items()
        for kind in ("atomic", "plain", "random")
    ]


def markdown(layers: Mapping[int, Record], worlds: Mapping[str, Record]) -> str:
    """Both tables."""
    heads = (
        ["layer", "dictionary", *COLUMNS.values()],
        ["world", "learned with", "share found", "cosine", "R²", "refitted", "L0"],
    )
    parts = []
    for head, cells in zip(heads, (rows(layers), world_rows(worlds)), strict=True):
        lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        lines += ["| " + " | ".join(row) + " |" for row in cells]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def layer_figure(layers: Mapping[int, Record]) -> Figure:
    """R^2 and q* over layers, atoms beside the controls."""
    drawn, (left, right) = plots.axes(1, 2, (9.5, 3.4))
    colours = {"atoms": plots.BLUE, "random": plots.GREY, "axes": plots.INK}
    at = list(layers)
    for kind, name in NAMES.items():
        style = {"color": colours[kind], "marker": "o", "label": name}
        left.plot(at, [layers[layer][kind]["r2"] for layer in at], **style)
        right.plot(at, [layers[layer][kind]["q_star"] for layer in at], **style)
    refitted = [layers[layer]["atoms"]["r2_refit"] for layer in at]
    left.plot(at, refitted, color=plots.BLUE, linestyle=":", label="atoms, refitted")
    left.set(xlabel="layer", ylabel="R² on held-out states", xticks=at)
    right.set(xlabel="layer", ylabel="q*", ylim=(-0.03, 1.03), xticks=at)
    left.legend(fontsize=8)
    return drawn


def scaling_figure(cells: Sequence[Record]) -> Figure:
    """R^2 over the number of states, a line for each dictionary size."""
    drawn, (left, right) = plots.axes(1, 2, (9.5, 3.4), sharey=True)
    features = sorted({cell["features"] for cell in cells})
    for number, size in enumerate(features):
        line = sorted((c for c in cells if c["features"] == size), key=lambda c: c["states"])
        x = [c["states"] for c in line]
        style = {"marker": "o", "color": f"C{number}", "label": f"{size} atoms"}
        left.plot(x, [c["r2_seen"] for c in line], **style)
        right.plot(x, [c["r2"] for c in line], **style)
    left.set(xlabel="states learned from", ylabel="R²", xscale="log", title="on those")
    right.set(xlabel="states learned from", xscale="log", title="on held-out states")
    right.legend(fontsize=8)
    return drawn


def write(
    path: Path,
    layers: Mapping[int, Record],
    cells: Sequence[Record],
    worlds: Mapping[str, Record],
    facts: Mapping[str, str],
) -> None:
    """The page of a study; `facts` are rows about the run: model, states, command."""
    best = max(layers, key=lambda layer: layers[layer]["atoms"]["r2_refit"])
    top = layers[best]
    report.write_page(
        path,
        "gemma_ext.papers.atoms",
        "page.html.jinja",
        numbers=[
            (f"R² of layer {best}, {top['atoms']['active']:.1f} atoms a state", _r2(top["atoms"])),
            ("R² of as many random atoms", _r2(top["random"])),
            ("q*: atoms, random, axes", ", ".join(f"{top[k]['q_star']:.2f}" for k in NAMES)),
        ],
        machine=report.this_machine(),
        columns=list(COLUMNS.values()),
        rows=rows(layers),
        worlds=world_rows(worlds),
        facts=dict(facts),
        layer_figure=plots.svg(layer_figure(layers), "R² and q* over layers"),
        scaling_figure=plots.svg(scaling_figure(cells), "R² over states and dictionary size")
        if cells
        else "",
    )


def _r2(found: Record) -> str:
    return f"{found['r2']:.3f}, refitted {found['r2_refit']:.3f}"
