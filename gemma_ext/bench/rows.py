"""Rows of a benchmark: times, rates and ratios to peers, whatever the family of operators."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from gemma_ext.bench import timing

Rows = Mapping[str, dict[str, Any]]  # by the name of the subject


def add_times(
    rows: Rows,
    timed: Mapping[str, Any],
    *,
    flops: float,
    peers: Sequence[str],
    floor: str | None = None,
) -> None:
    """Fill times, rates, and ratios paired inside a round.

    Args:
        timed: {"ceilings", "timings"} as a stage writes them down.
        flops: dense work of a step, what rates count.
        peers: names that get a column x_<name>; the first is the reference of processor time.
        floor: name of the row of the least work, on a card.
    """
    timings = {
        name: timing.Timing(tuple(timing.Measurement(**run) for run in runs))
        for name, runs in timed["timings"].items()
    }
    ceiling = max(timed["ceilings"]["gemm_fp32"], timed["ceilings"]["gemm_bf16"])
    first = peers[0]
    for name, own in timings.items():
        row = rows[name]
        rate = flops / own.total / 1e9
        row |= timed["ceilings"]
        row |= {"forward": own.forward, "total": own.total, "cpu": own.cpu}
        row |= {"spread": own.spread, "rounds": len(own.runs)}
        row |= {"gflops": rate, "of_ceiling": rate / ceiling}
        for peer in peers:
            if peer in timings and peer != name:
                row[f"x_{peer}"] = timing.paired_ratio(timings[peer], own)
        if first in timings and name != first:
            row[f"x_{first}_cpu"] = timing.paired_ratio(timings[first], own, "cpu")
        if floor in timings and name != floor:
            row["of_floor_forward"] = timing.paired_ratio(timings[floor], own, "forward")
            row["of_floor"] = timing.paired_ratio(timings[floor], own)


def compare_with_best(rows: Rows, peers: Collection[str], floor: str) -> None:
    """Fill the ratio to the fastest of the peers that have a time."""
    times = [rows[name]["total"] for name in peers if rows[name]["total"] is not None]
    for name, row in rows.items():
        if times and name not in peers and name != floor and row["total"] is not None:
            row["x_best"] = min(times) / row["total"]


def verdict(text: str, passed: bool) -> str:
    return f"{text} {'pass' if passed else 'MISS'}"
