"""The report page: five numbers, two figures, the machine; one self-contained HTML file."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from gemma_ext import report
from gemma_ext.demo.head import DATA, Head
from gemma_ext.demo.training import Plan
from gemma_ext.pocket.model import pocket_size
from gemma_ext.report import BLUE, GREY, INK, axes, size, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TEMPLATE = "report.html.jinja"
_NAMES = {
    "eager": "eager",
    "ours": "gemma_ext",
    "exact": "gemma_ext, exact",
    "sampled": "gemma_ext, sampled",
}
_HEADS = ("eager", "exact", "sampled")


def write_page(
    path: Path,
    *,
    trainings: dict[str, dict[str, Any]],
    heads: dict[int, dict[str, dict[str, Any]]],
    plan: Plan,
    head: Head,
    machine: dict[str, str],
    seconds: float,
) -> dict[str, Any]:
    """Draws and writes the page.

    Args:
        trainings: results of `training.train` by loss.
        heads: results of `head.measure_here` by tokens and loss; the numbers are of `head.tokens`.
        plan, head: what was run.
        machine: rows of the machine table.
        seconds: wall time of this run.

    Returns:
        page: the path; numbers: the five (name, value) pairs at its top.
    """
    numbers = five_numbers(trainings, heads[head.tokens])
    recipe = pocket_size(plan.size)
    report.write_page(
        path,
        "gemma_ext.demo",
        _TEMPLATE,
        numbers=numbers,
        machine=machine,
        curves=_curves(trainings),
        bars={n: _bars(runs, n, head.vocabulary) for n, runs in heads.items()},
        trainings=trainings,
        heads=heads,
        plan=asdict(plan),
        recipe=asdict(recipe),
        tokens=plan.steps * plan.tokens,
        step_tokens=plan.tokens,
        head=asdict(head),
        names=_NAMES,
        head_losses=_HEADS,
        data=DATA,
        minutes=seconds / 60,
        median=median,
        size=size,
    )
    return {"page": str(path), "numbers": numbers}


def five_numbers(
    trainings: dict[str, dict[str, Any]], heads: dict[str, dict[str, Any]]
) -> list[tuple[str, str]]:
    """What the page is about, as (name, value)."""
    eager, ours = trainings["eager"], trainings["ours"]
    gap = max(abs(a - b) for a, b in zip(eager["losses"], ours["losses"], strict=True))
    step = [median(run["seconds"]) for run in (eager, ours)]
    a, b = heads["eager"], heads["sampled"]
    extra = [_extra(run) for run in (a, b)]
    return [
        ("largest gap between the curves", f"{gap:.2g} nats"),
        ("held-out perplexity", f"{eager['perplexity']:.1f} → {ours['perplexity']:.1f}"),
        ("training step", f"{step[0]:.2f} → {step[1]:.2f} s ({step[0] / step[1]:.2f}x)"),
        (
            "2B head, forward and backward",
            f"{a['seconds']:.1f} → {b['seconds']:.1f} s ({a['seconds'] / b['seconds']:.1f}x)",
        ),
        (
            "2B head, memory beside gradients",
            f"{size(extra[0])} → {size(extra[1])} ({100 * extra[1] / extra[0]:.1f} %)",
        ),
    ]


def _extra(run: dict[str, Any]) -> int:
    """Peak bytes that are neither inputs nor the gradients every loss returns."""
    return max(run["peak"] - run["gradients"], 0)


def _curves(trainings: dict[str, dict[str, Any]]) -> str:
    figure, (top, bottom) = axes(2, 1, (7.6, 4.6), height_ratios=[3, 1], sharex=True)
    eager, ours = trainings["eager"]["losses"], trainings["ours"]["losses"]
    steps = range(1, len(eager) + 1)
    top.plot(steps, eager, color=GREY, linewidth=5, solid_capstyle="round", label="eager")
    top.plot(steps, ours, color=BLUE, linewidth=1.4, label="gemma_ext")
    top.set_ylabel("loss (nats per token)")
    top.legend(frameon=False)
    bottom.axhline(0, color=GREY, linewidth=1)
    bottom.plot(steps, [b - a for a, b in zip(eager, ours, strict=True)], color=BLUE, linewidth=1)
    bottom.set_ylabel("ours − eager")
    bottom.set_xlabel("optimiser step")
    bottom.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    figure.align_ylabels()
    return svg(figure, "Training loss of both runs and their difference, step by step")


def _bars(heads: dict[str, dict[str, Any]], tokens: int, vocabulary: int) -> str:
    figure, (time, memory) = axes(1, 2, (7.6, 2.9), sharey=True)
    labels = [_NAMES[name] for name in _HEADS]
    runs = [heads[name] for name in _HEADS]
    forward = [run["forward"] for run in runs]
    backward = [run["seconds"] - run["forward"] for run in runs]
    _stacked(time, labels, forward, backward, "{:.1f} s")
    time.set_xlabel("seconds\nforward dark, backward light")
    gib = 2**30
    extra = [_extra(run) / gib for run in runs]
    gradients = [run["gradients"] / gib for run in runs]
    _stacked(memory, labels, extra, gradients, "{:.2f} GiB")
    memory.set_xlabel("peak GiB\ngradients light, all else dark")
    logits = runs[0]["logits"] / gib
    time.invert_yaxis()
    memory.axvline(logits, color=INK, linewidth=1, linestyle=":")
    memory.annotate(
        "fp32 logits once",
        (logits, 1),
        xycoords=("data", "axes fraction"),
        ha="center",
        va="bottom",
        fontsize=8,
    )
    return svg(figure, f"Time and peak memory of the head, N = {tokens}, V = {vocabulary}")


def _stacked(
    axes: Axes, labels: list[str], first: list[float], second: list[float], form: str
) -> None:
    colors = [GREY, BLUE, BLUE]
    axes.barh(labels, first, color=colors, height=0.55)
    axes.barh(labels, second, left=first, color=colors, alpha=0.4, height=0.55)
    for row, total in enumerate(a + b for a, b in zip(first, second, strict=True)):
        axes.annotate(
            form.format(total), (total, row), xytext=(5, 0), textcoords="offset points", va="center"
        )
    axes.margins(x=0.22)
    axes.set_xlim(left=0)
