"""Pages of a training run and of latents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from gemma_ext import report
from gemma_ext.report import plots
from gemma_ext.sae.contexts import Context, Latent
from gemma_ext.sae.evaluation import Evaluation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PACKAGE = "gemma_ext.sae"


def write_report(
    path: Path,
    *,
    title: str,
    evaluations: Sequence[Evaluation],
    history: Sequence[Mapping[str, float]] = (),
    facts: Mapping[str, str],
) -> None:
    """The page of a run or of an evaluation.

    Args:
        evaluations: of every source; the numbers at the top and the densities are of the first.
        history: lines of metrics; none for a dictionary that was not trained here.
        facts: rows of the table of settings.
    """
    evaluation = evaluations[0]
    report.write_page(
        path,
        _PACKAGE,
        "train.html.jinja",
        title=title,
        numbers=[
            ("variance explained", f"{1 - evaluation.fvu:.1%}"),
            ("active latents per token", f"{evaluation.l0:.1f}"),
            ("cross-entropy recovered", f"{evaluation.ce_recovered:.1%}"),
            ("latents that never fired", f"{evaluation.dead:.1%}"),
        ],
        machine=report.this_machine(),
        curves=plots.svg(curves(history), "error and active latents over the steps")
        if history
        else "",
        densities=plots.svg(density_plot(evaluation.density), "histogram of latent densities"),
        rows=_rows(evaluations),
        facts=facts,
    )


def write_latents(
    path: Path,
    latents: Sequence[Latent],
    densities: Tensor,
    decode: Callable[[int], str],
    *,
    title: str,
    facts: Mapping[str, str],
) -> None:
    """The page of latents and their contexts.

    Args:
        decode: text of one token id.
    """
    shown = [
        {
            "number": latent.number,
            "density": f"{latent.density:.3%}",
            "most": max((max(c.values) for c in latent.contexts), default=0.0),
            "contexts": [_spans(context, decode) for context in latent.contexts],
            "promoted": [(decode(i), f"{v:+.2f}") for i, v in latent.promoted],
            "suppressed": [(decode(i), f"{v:+.2f}") for i, v in latent.suppressed],
        }
        for latent in latents
    ]
    live = densities > 0
    report.write_page(
        path,
        _PACKAGE,
        "inspect.html.jinja",
        title=title,
        numbers=[
            ("latents", f"{len(densities):,}"),
            ("that fired", f"{live.double().mean():.1%}"),
            ("median density", f"{densities[live].median():.3%}" if live.any() else "none"),
        ],
        machine=report.this_machine(),
        densities=plots.svg(density_plot(densities), "histogram of latent densities"),
        latents=shown,
        facts=facts,
    )


def curves(history: Sequence[Mapping[str, float]]) -> Figure:
    """Unexplained variance, active latents and dead latents over the steps."""
    drawn, (error, active, dead) = plots.axes(1, 3, (10.5, 3.2))
    steps = [line["step"] for line in history]
    for panel, color, name, factor in (
        (error, plots.BLUE, "fvu", 1),
        (active, plots.BLUE, "l0", 1),
        (dead, plots.GREY, "dead", 100),
    ):
        panel.plot(steps, [factor * line[name] for line in history], color=color)
        panel.set(xlabel="step")
    error.set(ylabel="unexplained variance of the batch", yscale="log")
    active.set(ylabel="active latents per token", ylim=(0, None))
    dead.set(ylabel="dead latents, %", ylim=(0, 100))
    error.grid(alpha=0.3)
    return drawn


def density_plot(densities: Tensor) -> Figure:
    """Histogram of log10 of the densities of latents that fired."""
    drawn, axes = plots.axes(1, 1, (9.5, 2.8))
    live = densities[densities > 0].double()
    if len(live):
        axes.hist(live.log10().numpy(), bins=50, color=plots.BLUE)
    axes.set(xlabel="log10 of the share of tokens that a latent fires on", ylabel="latents")
    return drawn


def _spans(context: Context, decode: Callable[[int], str]) -> list[dict[str, object]]:
    most = max(context.values) or 1.0
    return [
        {
            "text": decode(token).replace("\n", "↵"),
            "strength": f"{max(0.0, value) / most:.2f}",
            "value": f"{value:.2f}",
            "peak": place == context.peak,
        }
        for place, (token, value) in enumerate(zip(context.ids, context.values, strict=True))
    ]


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def summary(evaluations: Sequence[Evaluation]) -> str:
    """The numbers, one to a line, a column for every source."""
    return "\n".join(
        f"{name:<14}" + "".join(f"{value:>12}" for value in values)
        for name, values in _rows(evaluations)
    )


def _rows(evaluations: Sequence[Evaluation]) -> list[tuple[str, list[str]]]:
    numbers = [evaluation.numbers() for evaluation in evaluations]
    return [(name, [_number(each[name]) for each in numbers]) for name in numbers[0]]
