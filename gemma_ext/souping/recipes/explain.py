"""`gemma-ext merge --explain`: a page about the models of a recipe, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

from gemma_ext import report
from gemma_ext.souping.recipes.measure import Measured, measure_all, weighted_mean
from gemma_ext.souping.recipes.prepare import Prepared

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TEMPLATE = "explain.html.jinja"
_COLOURS = (report.BLUE, "#d9730d", "#2e7d32", "#8e24aa", "#c2185b", "#00838f", report.GREY)


def explain_recipe(
    prepared: Prepared,
    path: Path,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Reads every model once and writes the page.

    It shows, by layer, the cosines of each two models' deltas, their norms beside the base's, the
    share of elements on whose sign they disagree, and the share that the recipe keeps. Without a
    base, cosines and norms are those of the models themselves.

    Args:
        path: of the page.
        progress: called as progress(bytes read, bytes to read).

    Raises:
        ImportError: matplotlib or jinja2 is missing.
        ValueError: the recipe merges nothing.
    """
    found = list(measure_all(prepared.targets, progress))
    if not found:
        raise ValueError("expected tensors that are merged, got none")
    values = {target.info.name: target.values for target in prepared.targets}
    kept = {one.name: _kept(one, values[one.name].models) for one in found}
    first = found[0].gram.shape[0]
    whole = [one for one in found if one.gram.shape[0] == first]
    names = _names(prepared, first)
    has_base = found[0].conflicts is not None
    report.write_page(
        path,
        "gemma_ext.souping.recipes",
        _TEMPLATE,
        numbers=_numbers(whole, kept, has_base),
        machine=report.this_machine(),
        method=prepared.method.name,
        models=names,
        has_base=has_base,
        cosines=_plot_cosines(whole, names) if first > 1 else "",
        norms=_plot_norms(whole, names, has_base),
        conflicts=_plot_conflicts(whole) if has_base and first > 1 else "",
        kept=_plot_kept(whole, kept, names) if any(kept.values()) else "",
        rows=[_row(one, kept[one.name]) for one in found],
        recipe=prepared.recipe.text.rstrip(),
    )


def _names(prepared: Prepared, count: int) -> list[str]:
    """Of the sources, short."""
    one = next(one for one in prepared.resolved if len(one.sources) == count)
    names = [str(prepared.models[source.model].reference) for source in one.sources]
    return [name.rstrip("/").rpartition("/")[2] for name in names]


def _kept(one: Measured, models: Sequence[dict]) -> list[float] | None:
    """Share of each model's elements that a density leaves."""
    if not models or "density" not in models[0]:
        return None
    return [min(max(int(model["density"] * one.numel) / one.numel, 0.0), 1.0) for model in models]


def _pairs(one: Measured) -> list[float]:
    count = one.gram.shape[0]
    return [float(one.cosines[i, j]) for i, j in combinations(range(count), 2)]


def _numbers(
    found: Sequence[Measured], kept: dict[str, list[float] | None], has_base: bool
) -> list[tuple[str, str]]:
    weights = [one.numel for one in found]
    numbers = [("tensors merged", f"{len(found):,}"), ("elements", f"{sum(weights):,}")]
    pairs = [_pairs(one) for one in found]
    if pairs[0]:
        mean = weighted_mean([weighted_mean(p, [1.0] * len(p)) for p in pairs], weights)
        numbers.append(("mean cosine of two " + ("deltas" if has_base else "models"), _short(mean)))
    if has_base:
        ratios = [_ratio(one) for one in found]
        numbers.append(
            ("mean norm of a delta, of the base's", _short(weighted_mean(ratios, weights)))
        )
        if pairs[0]:
            mean = weighted_mean([one.conflicts for one in found], weights)
            numbers.append(("elements with opposite signs", f"{100 * mean:.1f} %"))
    shares = [kept[one.name] for one in found if kept[one.name]]
    if shares:
        mean = weighted_mean([sum(s) / len(s) for s in shares], weights)
        numbers.append(("elements kept", f"{100 * mean:.1f} %"))
    return numbers


def _ratio(one: Measured) -> float:
    return float(one.norms.mean()) / one.base_norm if one.base_norm else math.nan


def _by_layer(found: Sequence[Measured], value: Callable[[Measured], float]) -> list[float]:
    """Mean over the tensors of each layer, by their elements."""
    layers = 1 + max(one.layer for one in found if one.layer is not None)
    groups = [[one for one in found if one.layer == layer] for layer in range(layers)]
    return [
        weighted_mean([value(one) for one in group], [one.numel for one in group])
        for group in groups
    ]


def _plot_cosines(found: Sequence[Measured], names: Sequence[str]) -> str:
    pairs = list(combinations(range(len(names)), 2))
    lines = {
        f"{names[i]}, {names[j]}": (lambda one, i=i, j=j: float(one.cosines[i, j]))
        for i, j in pairs
    }
    return _plot(found, lines, "cosine", "Cosine of each two models by layer")


def _plot_norms(found: Sequence[Measured], names: Sequence[str], has_base: bool) -> str:
    lines = {
        name: (lambda one, m=m: float(one.norms[m]) / one.base_norm if one.base_norm else math.nan)
        for m, name in enumerate(names)
    }
    label = "|delta| / |base|" if has_base else f"|model| / |{names[0]}|"
    return _plot(found, lines, label, "Norm of each model by layer")


def _plot_conflicts(found: Sequence[Measured]) -> str:
    lines = {"all models": lambda one: 100 * one.conflicts}
    return _plot(
        found, lines, "opposite signs, %", "Share of elements with opposite signs by layer"
    )


def _plot_kept(
    found: Sequence[Measured], kept: dict[str, list[float] | None], names: Sequence[str]
) -> str:
    lines = {
        name: (lambda one, m=m: 100 * kept[one.name][m] if kept[one.name] else math.nan)
        for m, name in enumerate(names)
    }
    return _plot(found, lines, "kept, %", "Share of elements that the recipe keeps by layer")


def _plot(
    found: Sequence[Measured],
    lines: dict[str, Callable[[Measured], float]],
    label: str,
    description: str,
) -> str:
    """Lines over the layers; bars over the tensors of a model that has none."""
    figure, axes = report.axes(1, 1, (7.6, 2.8))
    if any(one.layer is not None for one in found):
        for (name, value), colour in zip(lines.items(), _cycle(len(lines)), strict=True):
            heights = _by_layer(found, value)
            axes.plot(range(len(heights)), heights, color=colour, marker="o", ms=3, label=name)
        axes.set_xlabel("layer")
        axes.xaxis.get_major_locator().set_params(integer=True)
    else:
        _bars(axes, found, lines)
    axes.set_ylabel(label)
    axes.legend(frameon=False, fontsize=8, ncols=2)
    return report.svg(figure, description)


def _bars(
    axes: Axes, found: Sequence[Measured], lines: dict[str, Callable[[Measured], float]]
) -> None:
    width = 0.8 / len(lines)
    for index, ((name, value), colour) in enumerate(
        zip(lines.items(), _cycle(len(lines)), strict=True)
    ):
        places = [place + index * width for place in range(len(found))]
        axes.bar(places, [value(one) for one in found], width, color=colour, label=name)
    axes.set_xlabel("tensor, in the order of the table")


def _cycle(count: int) -> list[str]:
    return [_COLOURS[index % len(_COLOURS)] for index in range(count)]


def _row(one: Measured, kept: list[float] | None) -> dict[str, str]:
    pairs = _pairs(one)
    return {
        "name": one.name,
        "numel": f"{one.numel:,}",
        "cosine": _short(weighted_mean(pairs, [1.0] * len(pairs))) if pairs else "",
        "norm": _short(_ratio(one)) if one.conflicts is not None else "",
        "conflicts": f"{100 * one.conflicts:.1f} %" if one.conflicts is not None else "",
        "changed": f"{100 * float(one.changed.mean()):.1f} %" if one.changed is not None else "",
        "kept": " ".join(f"{100 * share:.1f} %" for share in kept) if kept else "",
    }


def _short(value: float) -> str:
    return "none" if math.isnan(value) else f"{value:.4g}"
