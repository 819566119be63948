"""Time of the filtered loss against the exact one, over the share of gradient strips it keeps.

    python benchmarks/sweep_cce.py --device cuda --save

Each kind of data at the filter's own threshold, then one kind at thresholds searched so that shares
from 1 % to 100 % are kept. All points and the exact loss are timed in turn in one process.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

import gemma_ext
from gemma_ext.bench import data, report, timing
from gemma_ext.bench.options import parser_of, shape_of
from gemma_ext.bench.subject import DTYPES

RESULTS = Path(__file__).parent / "results"
SOFTCAP = 30.0
OWN_KINDS = ("plaw-4", "plaw-2.5", "plaw-1.6", "plaw-1.3", "random-init")
SWEPT = "plaw-1.6"
SHARES = (0.01, 0.02, 0.04, 0.065, 0.09, 0.13, 0.18, 0.25, 0.4, 0.7, 1.0)
SMALLEST = -40.0  # log2 of the least threshold
BISECTIONS = 10
SLACK = 1.02  # of a ratio of times taken in the same rounds
# Milliseconds on an H100 or H200 at BAR_SHAPE, by the name of the point.
BAR_SHAPE, BARS = (8192, 2304, 256000), {"plaw-2.5": 18.5, "4%": 25.0, "9%": 34.0}
KEY = ("n", "d", "v", "dtype")
COLUMNS = {
    "name": ("point", ""),
    "data": ("data", ""),
    "eps": ("filter_eps", ".2e"),
    "kept": ("kept", ".4f"),
    "forward": ("fwd ms", ".2fms"),
    "total": ("fwd+bwd ms", ".2fms"),
    "spread": ("spread", ".0%"),
    "x_exact": ("x exact", ".2f"),
    "note": ("note", ""),
}
EXACT = "exact"
NAMES = (EXACT, *OWN_KINDS, *(f"{100 * share:g}%" for share in SHARES))
LAYOUT = report.Layout(
    title="Linear cross-entropy: time over the share of strips that are kept",
    about="`python benchmarks/sweep_cce.py --device cuda --save`",
    case=KEY,
    label=lambda row: f"N={row['n']} D={row['d']} V={row['v']} {row['dtype']}",
    columns=COLUMNS,
    place=NAMES.index,
)


@dataclass(frozen=True)
class Point:
    """A batch of the swept head and how its gradient is made."""

    name: str
    kind: str
    e: Tensor  # [N, D]
    c: Tensor  # [V, D]
    targets: Tensor  # [N]
    impl: str = "cce"
    eps: float | str = "auto"

    def loss(self, eps: float | str | None = None) -> gemma_ext.LinearCrossEntropyOutput:
        return gemma_ext.linear_cross_entropy(
            self.e, self.c, self.targets, softcap=SOFTCAP, impl=self.impl,
            filter_eps=self.eps if eps is None else eps, return_stats=True,
        )  # fmt: skip

    def kept(self, eps: float | str | None = None) -> float:
        return float(self.loss(eps).stats.kept_fraction)

    def __call__(self, mark: timing.Mark) -> None:
        self.e.grad = self.c.grad = None
        loss = self.loss().loss
        mark()
        loss.backward()


def points(shape: tuple[int, int, int], dtype: str, device: str) -> Iterator[Point]:
    """The exact loss, every kind of data at its own threshold, and the shares of SWEPT."""
    n, d, v = shape
    heads = {
        unit: data.classifier(v, d, unit=unit, scale=0.02, seed=0, device=device)
        for unit in (True, False)
    }
    rounded = {
        unit: head.to(DTYPES[dtype], copy=True).requires_grad_() for unit, head in heads.items()
    }
    batches: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    for kind in OWN_KINDS:
        planted = kind != "random-init"
        e, targets = data.batch(heads[planted], kind, n, softcap=SOFTCAP, seed=1)
        batches[kind] = (e.to(DTYPES[dtype]).requires_grad_(), rounded[planted], targets)
    heads.clear()
    yield Point(EXACT, SWEPT, *batches[SWEPT], impl="exact")
    for kind, batch in batches.items():
        yield Point(kind, kind, *batch)
    for share in SHARES:
        swept = Point(f"{100 * share:g}%", SWEPT, *batches[SWEPT])
        yield replace(swept, eps=threshold(swept, share))


def threshold(point: Point, share: float) -> float:
    """The largest threshold, to a thousandth of its range, that keeps at least a share."""
    low, high = SMALLEST, 0.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if point.kept(2.0**middle) >= share else (low, middle)
    return 2.0**low


def main() -> None:
    options = parse_options()
    facts = report.machine(options.device)
    print(report.header(facts), flush=True)
    rows = measure(options.shape, options.dtype, options.device, options.seconds, options.rounds)
    print(f"\n## {LAYOUT.label(rows[0])}\n{report.table_and_bars(rows, COLUMNS)}")
    if options.save:
        report.save(RESULTS / facts["device"], "sweep", rows, facts, LAYOUT)


def measure(
    shape: tuple[int, int, int], dtype: str, device: str, seconds: float, least: int = 3
) -> list[dict[str, Any]]:
    """A row per point."""
    found = list(points(shape, dtype, device))
    timed = timing.interleave(
        {point.name: point for point in found},
        seconds=seconds,
        least=least,
        measure=timing.measure_on_card if device == "cuda" else timing.measure,
    )
    rows = []
    for point in found:
        own, out = timed[point.name], point.loss()
        row = dict(zip(KEY, (*shape, dtype), strict=True)) | {
            "name": point.name,
            "data": point.kind,
            "eps": None if out.stats.eps is None else float(out.stats.eps),
            "kept": float(out.stats.kept_fraction),
            "forward": own.forward,
            "total": own.total,
            "spread": own.spread,
            "rounds": len(own.runs),
            "x_exact": timing.paired_ratio(timed[EXACT], own),
            "note": "",
        }
        row["bars"] = "; ".join(bars(shape, device, row))
        rows.append(row)
    return rows


def bars(shape: Sequence[int], device: str, row: Mapping[str, Any]) -> Iterator[str]:
    """Each bar that applies to a point, with pass or MISS."""
    if row["name"] == EXACT or device != "cuda":
        return
    ratio, ms = row["x_exact"], 1e3 * row["total"]
    yield f"{ratio:.2f}x exact {'pass' if ratio * SLACK >= 1 else 'MISS'}"
    limit = BARS.get(row["name"])
    if limit is not None and tuple(shape) == BAR_SHAPE:
        yield f"{ms:.1f} <= {limit} ms {'pass' if ms <= limit else 'MISS'}"


def parse_options() -> argparse.Namespace:
    parser = parser_of(__doc__, device="cuda", dtype="bf16", seconds=8.0, rounds=3)
    parser.add_argument("--shape", type=shape_of, default=BAR_SHAPE, metavar="N,D,V")
    return parser.parse_args()


if __name__ == "__main__":
    main()
