"""Tables, plots and page of a study."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_ext import report
from gemma_ext.papers.salsa.frontier import Difference
from gemma_ext.papers.salsa.study import (
    BASELINE,
    Record,
    anchors_of,
    comparison,
    ends,
    frontiers,
)
from gemma_ext.report import plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = (plots.INK, plots.BLUE, "#e08a3c", "#2e9e6b", "#b05cc4")
ANCHORS = {"theta_0": "the pretrained model", "sft_1": "the first parent", "soup": "the soup"}
CHECK_HEAD = ("seed", "before", "first parent", "second parent", "soup", "best alpha")
ZERO_HEAD = ("method", "KL of a response at step 0", "of a token", "tokens", "with an end")
COLLAPSE_HEAD = (
    "run", "KL of a token at step 0", "held-out median tokens at step 0", "at the end",
    "with an end", "reward", "steps", "collapsed",
)  # fmt: skip
DIFFERENCE_HEAD = ("method", "divergence from", "at", "reward over the baseline", "decided")
Table = tuple[tuple[str, ...], list[list[str]]]


def end_table(records: Sequence[Record]) -> Table:
    """Last points, mean ± half of the 95 % interval over seeds."""
    anchors = anchors_of(records)
    names = ("reward", *(f"kl_{name}" for name in anchors), "length_mean", "eos_rate")
    head = (
        *("method", "beta", "reward"),
        *(f"KL to {ANCHORS[name]}" for name in anchors),
        *("tokens", "with an end"),
    )
    return head, [
        [row["method"], f"{row['beta']:g}", *(_pm(row[name]) for name in names)]
        for row in ends(records, names)
    ]


def check_table(checks: Sequence[Record]) -> list[list[str]]:
    """Held-out losses of parents and soups, and the alpha of the least."""
    return [
        [
            str(check["seed"]),
            *(f"{x:.3f}" for x in (check["start"], *check["parents"], check["soup"])),
            f"{min(zip(check['losses'], check['alphas'], strict=True))[1]:g}",
        ]
        for check in checks
    ]


def zero_table(records: Sequence[Record]) -> list[list[str]]:
    """What each method pays before its first step; mean over its runs."""
    names = ("kl_reference", "kl_reference_per_token", "length_mean", "eos_rate")
    found = []
    for method in dict.fromkeys(record["method"] for record in records):
        some = [record["zero"] for record in records if record["method"] == method]
        means = [sum(zero[name] for zero in some) / len(some) for name in names]
        found.append([method, *(f"{mean:.3f}" for mean in means)])
    return found


def difference_table(records: Sequence[Record], baseline: str = BASELINE) -> list[list[str]]:
    """Methods against a baseline at equal divergence: start, middle and end of what all reach."""
    rows = []
    for anchor in anchors_of(records)[:2]:
        name = ANCHORS[anchor]
        for method, found in comparison(records, anchor, baseline=baseline, places=3).items():
            if not found:
                rows.append([method, name, "", "no divergence that all runs reach", ""])
            rows += [
                [method, name, f"{d.kl:.2f} nats", _pm((d.mean, d.half), signed=True), _verdict(d)]
                for d in found
            ]
    return rows


def collapse_table(records: Sequence[Record]) -> list[list[str]]:
    """Runs at a weight that makes silence pay."""
    return [
        [
            record["name"],
            f"{record['zero']['kl_reference_per_token']:.3f}",
            f"{record['points'][0]['length_median']:g}",
            f"{record['points'][-1]['length_median']:g}",
            f"{record['points'][-1]['eos_rate']:.2f}",
            f"{record['points'][-1]['reward']:.2f}",
            str(record["points"][-1]["step"]),
            "yes" if record["stopped"] else "no",
        ]
        for record in records
    ]


def markdown(
    records: Sequence[Record],
    checks: Sequence[Record] = (),
    collapsing: Sequence[Record] = (),
    baseline: str = BASELINE,
) -> str:
    """All tables."""
    texts = []
    for head, rows in _tables(records, checks, collapsing, baseline).values():
        if rows:
            lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
            texts.append("\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]))
    return "\n\n".join(texts) + "\n"


def frontier_figure(records: Sequence[Record], baseline: str = BASELINE) -> Figure:
    """Every point and frontier over the root of the divergence; the difference to the baseline."""
    drawn, panels = plots.axes(1, 2, (10, 4))
    anchor = anchors_of(records)[0]
    label = f"root of the KL to {ANCHORS[anchor]}, nats"
    found = frontiers(records, anchor)
    colours = dict(zip(found, itertools.cycle(COLOURS), strict=False))
    for method, by_seed in found.items():
        colour = colours[method]
        points = [
            (math.sqrt(max(0.0, p[f"kl_{anchor}"])), p["reward"])
            for record in records
            if record["method"] == method
            for p in record["points"]
        ]
        panels[0].plot(*zip(*points, strict=True), ".", color=colour, ms=4, alpha=0.6)
        for seed, frontier in by_seed.items():
            path = [*frontier.points, (frontier.end, frontier.points[-1][1])]
            panels[0].plot(
                [math.sqrt(kl) for kl, _ in path],
                [reward for _, reward in path],
                color=colour,
                lw=1.1,
                label=method if seed == min(by_seed) else None,
            )
    panels[0].set(xlabel=label, ylabel="held-out reward")
    panels[0].legend(fontsize=8)
    compared = comparison(records, anchor, baseline=baseline)
    for place, (method, several) in enumerate(compared.items()):
        for difference in several:
            half = difference.half if math.isfinite(difference.half) else 0.0
            panels[1].errorbar(
                math.sqrt(difference.kl) + 0.01 * place,
                difference.mean,
                yerr=half,
                fmt="o",
                ms=3.5,
                lw=1,
                capsize=2,
                color=colours[method],
                label=method if difference is several[0] else None,
            )
    panels[1].axhline(0, color=plots.GREY, lw=0.8)
    panels[1].set(xlabel=label, ylabel=f"reward over {baseline}, 95 % over seeds")
    if panels[1].get_legend_handles_labels()[0]:
        panels[1].legend(fontsize=8)
    return drawn


def alpha_figure(checks: Sequence[Record]) -> Figure:
    """Held-out loss on the line between the parents; more seeds than colours have no legend."""
    drawn, panel = plots.axes(1, 1, (10, 3.2))
    for check in checks:
        panel.plot(check["alphas"], check["losses"], "o-", ms=3.5, lw=1.1, label=check["seed"])
    panel.set(xlabel="alpha, share of the first parent", ylabel="held-out loss, nats a token")
    if len(checks) <= 10:
        panel.legend(title="seed", fontsize=8)
    return drawn


def write(
    path: Path,
    records: Sequence[Record],
    checks: Sequence[Record] = (),
    collapsing: Sequence[Record] = (),
    *,
    facts: Mapping[str, str],
    baseline: str = BASELINE,
) -> None:
    """The page of a study.

    Args:
        records: of `study.study`.
        checks: of each seed: held-out losses "start", "parents", "soup", and a sweep "alphas",
            "losses".
        collapsing: records of runs at a large weight, with a "name".
        facts: rows about the run.
        baseline: method that the others are compared with.
    """
    anchor = anchors_of(records)[0]
    numbers = []
    for method, found in comparison(records, anchor, baseline=baseline, places=3).items():
        if found:
            middle = found[len(found) // 2]
            gain = _pm((middle.mean, middle.half), True)
            numbers.append((f"{method} over {baseline} at {middle.kl:.1f} nats", gain))
    if collapsing:
        gone = sum(record["stopped"] is not None for record in collapsing)
        numbers.append(("collapsed at a large beta", f"{gone} of {len(collapsing)}"))
    if checks:
        gains = [check["soup"] - min(check["parents"]) for check in checks]
        numbers.append(("soup over the better parent, nats", f"{sum(gains) / len(gains):+.3f}"))
    report.write_page(
        path,
        "gemma_ext.papers.salsa",
        "page.html.jinja",
        numbers=numbers,
        machine=report.this_machine(),
        baseline=baseline,
        tables=_tables(records, checks, collapsing, baseline),
        frontier=plots.svg(frontier_figure(records, baseline), "reward against divergence"),
        alphas=plots.svg(alpha_figure(checks), "held-out loss between parents") if checks else "",
        samples=_samples(records),
        facts=dict(facts),
    )


def _tables(
    records: Sequence[Record],
    checks: Sequence[Record],
    collapsing: Sequence[Record],
    baseline: str,
) -> dict[str, Table]:
    return {
        "differences": (DIFFERENCE_HEAD, difference_table(records, baseline)),
        "ends": end_table(records),
        "zeros": (ZERO_HEAD, zero_table(records)),
        "checks": (CHECK_HEAD, check_table(checks)),
        "collapses": (COLLAPSE_HEAD, collapse_table(collapsing)),
    }


def _samples(records: Sequence[Record]) -> list[dict[str, Any]]:
    """The first response of one run of each method."""
    found = {}
    for record in records:
        if record["samples"]:
            found.setdefault(record["method"], (record["beta"], record["samples"][0]))
    return [
        {
            "method": f"{method}, beta {beta:g}",
            "prompt": sample["prompt"],
            "completion": sample["completion"],
            "score": "none" if sample["score"] is None else f"{sample['score']:.2f}",
        }
        for method, (beta, sample) in found.items()
    ]


def _pm(value: tuple[float, float], signed: bool = False) -> str:
    mean, half = value
    text = f"{mean:+.2f}" if signed else f"{mean:.2f}"
    return f"{text} ± {half:.2f}" if math.isfinite(half) else text


def _verdict(difference: Difference) -> str:
    if not difference.decided:
        return "no"
    return "better" if difference.mean > 0 else "worse"
