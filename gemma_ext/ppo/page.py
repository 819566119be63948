"""Page of a run: curves, responses before and after, numbers, settings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_ext import report
from gemma_ext.report import plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ORANGE = "#e08a3c"
Line = Mapping[str, float]
# label of the axis; curves of a panel by their names in a history
_PANELS = (
    ("score", {"objective/scores": "scores", "objective/rlhf_reward": "with the KL's penalty"}),
    ("KL of a response, nats", {"objective/kl": "estimate", "objective/kl_k3": "k3"}),
    ("KL of a token, nats", {"objective/kl_per_token": ""}),
    ("entropy of a token, nats", {"policy/entropy_avg": ""}),
    ("clipped tokens", {"policy/clipfrac_avg": "policy", "val/clipfrac_avg": "value"}),
    ("approximate KL of an update", {"policy/approxkl_avg": ""}),
    ("loss of the value", {"loss/value_avg": ""}),
    ("explained variance", {"val/explained_variance": ""}),
    ("tokens of a response", {"response/length": ""}),
    ("responses with an end", {"response/eos_rate": ""}),
)


def curves(history: Sequence[Line]) -> Figure:
    """A panel for each quantity that the history has."""
    known = {name for line in history for name in line}
    panels = [(label, names) for label, names in _PANELS if known & names.keys()]
    tall = -(-len(panels) // 2)
    drawn, grid = plots.axes(tall, 2, (9.5, 2.5 * tall), squeeze=False)
    for panel, (label, names) in zip(grid.flat, panels, strict=False):
        for (name, legend), colour in zip(names.items(), (plots.BLUE, ORANGE), strict=False):
            points = [(line["step"], line[name]) for line in history if name in line]
            if points:
                panel.plot(*zip(*points, strict=True), color=colour, lw=1.3, label=legend or None)
        panel.set(xlabel="step", ylabel=label)
        panel.grid(alpha=0.3)
        if any(names.values()):
            panel.legend(fontsize=8)
    for panel in grid.flat[len(panels) :]:
        panel.set_visible(False)
    return drawn


def ends(history: Sequence[Line]) -> list[tuple[str, float, float]]:
    """(name, mean of the first tenth, mean of the last) of all but the clocks."""
    size = max(1, len(history) // 10)
    names = [n for n in history[0] if not n.startswith("time/") and n not in ("step", "episode")]
    return [(name, _mean(history[:size], name), _mean(history[-size:], name)) for name in names]


def write(
    path: Path,
    history: Sequence[Line],
    *,
    title: str,
    facts: Mapping[str, str],
    before: Sequence[Mapping[str, Any]] = (),
    after: Sequence[Mapping[str, Any]] = (),
) -> None:
    """The page of a run.

    Args:
        facts: rows of the table of settings.
        before, after: prompts with completions and scores, as `PPOTrainer.samples` gives them.

    Raises:
        ValueError: a history without a line.
    """
    if not history:
        raise ValueError("history: expected at least one line, got none")
    rows = {name: (first, last) for name, first, last in ends(history)}
    score, kl = rows["objective/scores"], rows["objective/kl"]
    report.write_page(
        path,
        "gemma_ext.ppo",
        "train.html.jinja",
        title=title,
        numbers=[
            ("score", f"{score[0]:.3f} → {score[1]:.3f}"),
            ("KL of a response at the end", f"{kl[1]:.2f} nats"),
            ("KL of a token at the end", f"{rows['objective/kl_per_token'][1]:.3f} nats"),
        ],
        machine=report.this_machine(),
        curves=plots.svg(curves(history), "score, divergence and diagnostics over the steps"),
        samples=_samples(before, after),
        rows=[(name, f"{a:.4g}", f"{b:.4g}") for name, (a, b) in rows.items()],
        facts=dict(facts),
    )


def _samples(
    before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]
) -> list[dict[str, str]]:
    return [
        {
            "prompt": _text(one["prompt"]),
            "before": _answer(one),
            "score_before": f"{one['score']:.3f}",
            "after": _answer(two),
            "score_after": f"{two['score']:.3f}",
        }
        for one, two in zip(before, after, strict=True)
    ]


def _answer(sample: Mapping[str, Any]) -> str:
    """The completion, and a line for each thing that reward functions told of it."""
    told = [f"{k}: {v}" for k, v in sample.items() if k not in ("prompt", "completion", "score")]
    return "\n".join([_text(sample["completion"]), *told])


def _text(value: Any) -> str:
    """A text, or the contents of messages."""
    if isinstance(value, str):
        return value
    return "\n".join(f"{message['role']}: {message['content']}" for message in value)


def _mean(lines: Sequence[Line], name: str) -> float:
    some = [line[name] for line in lines if name in line and math.isfinite(line[name])]
    return sum(some) / len(some) if some else float("nan")
