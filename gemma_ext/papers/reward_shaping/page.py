"""Table, plots and page of a study of reward shaping."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch

from gemma_ext import report
from gemma_ext.papers.reward_shaping import bandit
from gemma_ext.papers.reward_shaping.monitors import ALARM
from gemma_ext.papers.reward_shaping.shaper import RewardShaper
from gemma_ext.papers.reward_shaping.shaping import RULES
from gemma_ext.papers.reward_shaping.study import summary
from gemma_ext.report import interval, plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Run = Mapping[str, Any]
HEAD = (
    "rule", "collapsed", "gold at start", "gold peak", "gold at end", "kept of the peak",
    "proxy at end", "win rate at end", "KL at end", "critic loss at end", "largest shaped mean",
)  # fmt: skip
MODEL_HEAD = ("reward model", "accuracy by gold", "corr. with length", "corr. with gold", "spread")
_CELLS = (
    ("gold_start", ".2f"), ("gold_peak", ".2f"), ("gold_final", ".2f"), ("kept", ".2f"),
    ("proxy_final", ".2f"), ("win_final", ".2f"), ("kl_final", ".1f"), ("critic_final", ".3g"),
    ("shaped_high", ".2f"),
)  # fmt: skip
ORANGE = "#e08a3c"


def grouped(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs by rule, in the order of the first of each."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run["rule"], []).append(run)
    return found


def table(runs: Sequence[Run]) -> list[list[str]]:
    """A row of cells for each rule; ± is half of the 95 % interval over seeds."""
    rows = []
    for rule, some in grouped(runs).items():
        found = summary(some)
        lost = f"{found['collapsed']} of {found['seeds']}"
        rows.append([rule, lost, *(_cell(found[key], how) for key, how in _CELLS)])
    return rows


def _cell(value: tuple[float, float | None], how: str) -> str:
    mean, half = value
    return f"{mean:{how}}" + ("" if half is None else f" ± {half:{how}}")


def model_table(models: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A row of cells for each kind of reward model; ± is half of the 95 % interval over seeds."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in models:
        found.setdefault(row["model"], []).append(row)
    keys = ("accuracy", "length", "gold", "spread")
    return [
        [name, *(_cell(interval([row[key] for row in some]), ".2f") for key in keys)]
        for name, some in found.items()
    ]


def markdown(runs: Sequence[Run], models: Sequence[Mapping[str, Any]] = ()) -> str:
    texts = []
    for head, cells in ((HEAD, table(runs)), (MODEL_HEAD, model_table(models))):
        if cells:
            lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
            texts.append("\n".join([*lines, *("| " + " | ".join(row) + " |" for row in cells)]))
    return "\n\n".join(texts) + "\n"


def verdict_of(runs: Sequence[Run]) -> list[str]:
    """What came out, in sentences, whatever it was."""
    found = {rule: summary(some) for rule, some in grouped(runs).items()}
    lines = []
    for rule in ("vanilla", "par"):
        if rule in found:
            one = found[rule]
            lines.append(
                f"{rule}: gold collapsed in {one['collapsed']} of {one['seeds']} runs; on the mean "
                f"{one['gold_start'][0]:.2f} at the start, {one['gold_peak'][0]:.2f} at "
                f"its peak, {one['gold_final'][0]:.2f} at the end "
                f"({one['kept'][0]:.0%} of the peak), the proxy at "
                f"{one['proxy_final'][0]:.2f}."
            )
    if {"vanilla", "par"} <= found.keys():
        vanilla, par = (found[rule]["critic_final"][0] for rule in ("vanilla", "par"))
        lines.append(
            f"The critic's loss at the end is {vanilla:.3g} under vanilla and {par:.3g} under PAR, "
            f"a factor of {vanilla / par:.0f}."
        )
    return lines


def curves(runs: Sequence[Run]) -> Figure:
    """Gold and proxy of every rule, a panel each; thin lines are seeds."""
    rules = grouped(runs)
    columns = min(5, len(rules))
    lines = ceil(len(rules) / columns)
    drawn, panels = plots.axes(
        lines, columns, (2.2 * columns, 2.1 * lines), squeeze=False, sharex=True, sharey=True
    )
    flat = [panel for row in panels for panel in row]
    top = max(max(run["curves"]["gold"]) for run in runs)
    for panel, (rule, some) in zip(flat, rules.items(), strict=False):
        for key, colour in (("proxy", ORANGE), ("gold", plots.BLUE)):
            series = [run["curves"][key] for run in some]
            for one in series:
                panel.plot(_smooth(one), color=colour, lw=0.6, alpha=0.5)
            means = [fmean(values) for values in zip(*series, strict=True)]
            panel.plot(_smooth(means), color=colour, lw=1.8, label=key)
        panel.set_title(rule, fontsize=10)
        panel.set_ylim(0, 2.5 * top)
    for panel in flat[len(rules) :]:
        panel.set_visible(False)
    for row in panels:
        row[0].set_ylabel("reward")
    for panel in flat[max(0, len(rules) - columns) : len(rules)]:
        panel.set_xlabel("step")
        panel.tick_params(labelbottom=True)
    flat[0].legend(fontsize=8)
    return drawn


def compared(runs: Sequence[Run]) -> Figure:
    """Gold, distance and critic loss of all rules in one panel each."""
    drawn, panels = plots.axes(1, 3, (11, 3.4))
    for at, (rule, some) in enumerate(grouped(runs).items()):
        style = {"color": _colour(rule, at), "lw": 2 if rule in ("par", "vanilla") else 1}
        gold, kl, critic, proxy = (
            _smooth([fmean(v) for v in zip(*(r["curves"][key] for r in some), strict=True)])
            for key in ("gold", "kl", "critic", "proxy")
        )
        panels[0].plot(kl, gold, label=rule, **style)
        panels[1].plot(proxy, gold, **style)
        panels[2].plot(critic, **style)
    panels[0].set(xlabel="KL from the start, nats of a response", ylabel="gold reward")
    panels[1].set(xlabel="proxy reward", ylabel="gold reward")
    panels[2].set(xlabel="step", ylabel="critic loss", yscale="log")
    panels[0].legend(fontsize=7, ncols=2)
    return drawn


def bounds(runs: Sequence[Run]) -> Figure:
    """What the rules make of a centred reward, and what PAR's batches were given."""
    drawn, (left, right) = plots.axes(1, 2, (9, 3.2))
    x = torch.linspace(-6, 8, 281, dtype=torch.float64)
    q = torch.zeros(len(x), 2, dtype=torch.float64)
    for at, rule in enumerate(("par", "tanh", "polynomial", "lsc", "sgfc", "quantile")):
        y = RewardShaper(rule)(x, q)
        style = {"color": _colour(rule, at + 3), "lw": 2 if rule == "par" else 1}
        left.plot(x, y, label=rule, **style)
    left.axhspan(0, 1, color=plots.BLUE, alpha=0.07)
    left.axvline(ALARM, color=plots.GREY, lw=0.8, ls=":")
    left.set(xlabel="reward over its references", ylabel="shaped", ylim=(-3, 1.3))
    left.legend(fontsize=8)
    for rule, colour in (("vanilla", ORANGE), ("par", plots.BLUE)):
        for run in grouped(runs).get(rule, []):
            right.plot(run["curves"]["centred"], run["curves"]["shaped"], ".", color=colour, ms=3)
    right.axhline(1, color=plots.BLUE, lw=0.8, ls="--")
    right.set(xlabel="mean reward over its references, of a batch", ylabel="mean shaped reward")
    return drawn


def of_bandit() -> Figure:
    """Gold against distance for every rule in the world of 64 actions."""
    drawn, panel = plots.axes(1, 1, (7, 3.6))
    world = bandit.world()
    for at, rule in enumerate(RULES):
        path = bandit.train(world, rule, steps=600)[0]
        style = {"color": _colour(rule, at), "lw": 2 if rule in ("par", "vanilla") else 1}
        panel.plot(path.kl, path.gold, label=rule, **style)
    panel.set(xlabel="KL from the start, nats", ylabel="gold reward")
    panel.legend(fontsize=7, ncols=2)
    return drawn


def write(
    path: Path,
    runs: Sequence[Run],
    models: Sequence[Mapping[str, Any]],
    facts: Mapping[str, str],
    *,
    command: str,
) -> None:
    """The page.

    Args:
        runs: of `study.train`, any number of rules and seeds.
        models: rows of `reward_study.compare`, or none.
        facts: rows about the run.
        command: that made it.
    """
    found = {rule: summary(some) for rule, some in grouped(runs).items()}
    best = max(found.values(), key=lambda row: row["gold_final"][0])
    numbers = [
        (f"gold of {rule} at the end", f"{found[rule]['gold_final'][0]:.2f}")
        for rule in ("vanilla", "par")
        if rule in found
    ]
    numbers.append((f"best at the end: {best['rule']}", f"{best['gold_final'][0]:.2f}"))
    report.write_page(
        path,
        "gemma_ext.papers.reward_shaping",
        "page.html.jinja",
        numbers=numbers,
        machine=report.this_machine(),
        verdict=verdict_of(runs),
        head=HEAD,
        rows=table(runs),
        model_head=MODEL_HEAD,
        models=model_table(models),
        alarms=[
            (rule, f"{sum(bool(run['alarms']) for run in some)} of {len(some)}", first[0])
            for rule, some in grouped(runs).items()
            if (first := [text for run in some for text in run["alarms"]])
        ],
        samples=[
            (run["rule"], sample["prompt"], sample["completion"])
            for run in runs
            if run["seed"] == runs[0]["seed"]
            for sample in run["samples"][:1]
        ],
        facts=dict(facts),
        command=command,
        curves=plots.svg(curves(runs), "gold and proxy reward of every rule over training"),
        compared=plots.svg(compared(runs), "gold against distance and proxy; critic loss"),
        bounds=plots.svg(bounds(runs), "rules as functions, and the rewards of batches"),
        bandit=plots.svg(of_bandit(), "gold against distance among 64 actions"),
    )


def _smooth(values: Sequence[float], width: int = 5) -> list[float]:
    """Trailing means."""
    return [fmean(values[max(0, at - width + 1) : at + 1]) for at in range(len(values))]


def _colour(rule: str, at: int) -> Any:
    fixed = {"vanilla": ORANGE, "par": plots.BLUE}
    others = (
        "#5b6672", "#7b5ea7", "#2a9d8f", "#c44e52", "#8a6d3b", "#9aa5b1", "#d48fb8", "#4f9dd9",
        "#6a994e", "#b08900", "#3d405b", "#a26769",
    )  # fmt: skip
    return fixed.get(rule, others[at % len(others)])
