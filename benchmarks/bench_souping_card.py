"""Merges of weights that lie on a card, beside a copy of the same bytes and eager compositions.

    python benchmarks/bench_souping_card.py --save

Layers of Gemma-2-2B, three fine-tunes of one base in bfloat16, all tensors in one call. Everything
is first checked against the CPU's kernels on a few of the tensors, bit by bit; what differs prints
no time. All are then timed in turn in one process. An eager composition merges tensor by tensor as
mergekit does: weights in the dtype of the tensors, a full sort of every delta.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from gemma_ext.bench import report, timing
from gemma_ext.bench.options import parser_of
from gemma_ext.ops.souping import (
    Gram,
    Magnitudes,
    Mask,
    Part,
    RowMask,
    Rule,
    consensus_,
    merge_,
    soup_,
)

RESULTS = Path(__file__).parent / "results"
MODELS, DENSITY = 3, 0.2
WEIGHTS = (0.5, 0.3, 0.2)
TIES = Rule("sum", combine="weighted_mean")
SHARE_BAR, TIES_BAR, EAGER_BAR = 0.85, 2.5, 10.0
KEY = ("parameters", "models", "dtype")
COLUMNS = {
    "name": ("merge", ""),
    "bytes": ("bytes", ""),
    "total": ("ms", ".3fms"),
    "spread": ("spread", ".0%"),
    "rate": ("GB/s", ".0f"),
    "share": ("of copy", ".0%"),
    "x_eager": ("x eager", ".1f"),
    "note": ("note", ""),
}


def plain(parts: Sequence[Part]) -> None:
    soup_([replace(part, base=None) for part in parts], WEIGHTS)


def arithmetic(parts: Sequence[Part]) -> None:
    soup_(parts, WEIGHTS)


def dare(parts: Sequence[Part]) -> None:
    merge_(parts, Rule(), WEIGHTS, mask=Mask(density=DENSITY), divide=DENSITY)


def consensus(parts: Sequence[Part]) -> None:
    consensus_(parts, 0.4, votes=2)


def ties(parts: Sequence[Part]) -> None:
    magnitudes = Magnitudes(MODELS, groups=len(parts))
    keep = torch.tensor([int(DENSITY * part.base.numel()) for part in parts])
    keep = keep.view(-1, 1, 1).expand(-1, MODELS, 1)
    magnitudes.find(parts, keep, list(range(len(parts))))
    merge_(parts, TIES, WEIGHTS, mask=Mask(magnitudes.cut()))


def della(parts: Sequence[Part]) -> None:
    merge_(parts, TIES, WEIGHTS, mask=RowMask(density=0.7, epsilon=0.07, rescale=True))


def gram(parts: Sequence[Part]) -> None:
    total = Gram(MODELS, groups=len(parts))
    total.add(parts, list(range(len(parts))))
    for part, value in zip(parts, total.value, strict=True):
        part.out.view(-1)[: MODELS * MODELS] = value.flatten()[: part.out.numel()]


def eager_plain(parts: Sequence[Part]) -> None:
    for part in parts:
        x = torch.stack(list(part.sources))
        w = torch.tensor(WEIGHTS, dtype=x.dtype, device=x.device).view(-1, *[1] * (x.dim() - 1))
        part.out.copy_((w * x).sum(0) / w.sum(0))


def eager_arithmetic(parts: Sequence[Part]) -> None:
    for part in parts:
        d = torch.stack([x - part.base for x in part.sources])
        w = torch.tensor(WEIGHTS, dtype=d.dtype, device=d.device).view(-1, *[1] * (d.dim() - 1))
        part.out.copy_(part.base + (w * d).sum(0))


def eager_ties(parts: Sequence[Part]) -> None:
    """Each delta trimmed by a sort, signs elected by the weighted sum, agreeing ones averaged."""
    for part in parts:
        trimmed = []
        for x in part.sources:
            d = x - part.base
            keep = int(DENSITY * d.numel())
            order = d.abs().float().view(-1).argsort(descending=True)
            mask = torch.zeros_like(d).view(-1)
            mask[order[:keep]] = 1
            trimmed.append(d * mask.view_as(d))
        d = torch.stack(trimmed)
        w = torch.tensor(WEIGHTS, dtype=d.dtype, device=d.device).view(-1, *[1] * (d.dim() - 1))
        moved = w * d
        sign = torch.where(moved.sum(0) >= 0, 1, -1).to(d.dtype)
        agree = (moved.sign() == sign).to(d.dtype)
        divisor = (w * agree).sum(0)
        divisor[divisor == 0] = 1
        part.out.copy_(part.base + (moved * agree).sum(0) / divisor)


@dataclass(frozen=True)
class Subject:
    """What is timed: `bytes` moved for an element of M models, None for an eager composition."""

    name: str
    run: Callable[[Sequence[Part]], None]
    bytes: int | None
    eager: str | None = None
    one_pass: bool = False


def subjects() -> list[Subject]:
    deltas = 2 * (MODELS + 1)
    return [
        Subject("linear", plain, 2 * MODELS + 2, "eager linear", one_pass=True),
        Subject("task arithmetic", arithmetic, deltas + 2, "eager task arithmetic", one_pass=True),
        Subject("dare", dare, deltas + 2, one_pass=True),
        Subject("consensus", consensus, deltas + 2, one_pass=True),
        Subject("ties", ties, 2 * deltas + 2, "eager ties"),
        Subject("della", della, deltas + 2),
        Subject("gram", gram, deltas),
        Subject("eager linear", eager_plain, None),
        Subject("eager task arithmetic", eager_arithmetic, None),
        Subject("eager ties", eager_ties, None),
    ]


COPY = "copy"
NAMES = (COPY, *(subject.name for subject in subjects()))
LAYOUT = report.Layout(
    title="Merges of resident weights",
    about="`python benchmarks/bench_souping_card.py --save`; bytes are of an element",
    case=KEY,
    label=lambda row: (
        f"{row['parameters'] / 1e6:.0f} M parameters, {row['models']} models, {row['dtype']}"
    ),
    columns=COLUMNS,
    place=NAMES.index,
)


def layers(count: int, width: int, device: str) -> list[Part]:
    """The matrices and norms of `count` layers of Gemma-2-2B, scaled to a model width."""
    scale = width / 2304
    inner, heads, keys = (int(scale * size) for size in (9216, 2048, 1024))
    shapes = [(heads, width), (keys, width), (keys, width), (width, heads)]
    shapes += [(inner, width), (inner, width), (width, inner), *[(width,)] * 4]
    g = torch.Generator(device).manual_seed(0)
    found = []
    for layer in range(count):
        for k, shape in enumerate(shapes):
            base = 0.02 * torch.randn(shape, generator=g, device=device)
            sources = [
                (base + 4e-4 * torch.randn(shape, generator=g, device=device)).bfloat16()
                for _ in range(MODELS)
            ]
            base = base.bfloat16()
            found.append(Part(sources, base, torch.zeros_like(base), f"layers.{layer}.{k}"))
    return found


def differs(subject: Subject, parts: Sequence[Part]) -> bool:
    """Whether some of the smallest parts come out otherwise on the CPU."""
    few = sorted(parts, key=lambda part: part.base.numel())[:6]
    here = [
        replace(
            part,
            sources=[x.cpu() for x in part.sources],
            base=part.base.cpu(),
            out=torch.zeros_like(part.base, device="cpu"),
        )
        for part in few
    ]
    for part in few:
        part.out.zero_()
    subject.run(few)
    subject.run(here)
    return any(
        not torch.equal(a.out.cpu().view(torch.int16), b.out.view(torch.int16))
        for a, b in zip(few, here, strict=True)
    )


def measure(parts: Sequence[Part], device: str, seconds: float, least: int) -> list[dict[str, Any]]:
    """A row per subject, and one of a copy."""
    count = sum(part.base.numel() for part in parts)
    wrong = {s.name for s in subjects() if s.bytes is not None and differs(s, parts)}
    steps = {s.name: on(s.run, parts) for s in subjects() if s.name not in wrong}
    source = torch.empty(count * (MODELS + 2), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    timed = timing.interleave(
        {COPY: on(lambda _: target.copy_(source), parts)} | steps,
        seconds=seconds,
        least=least,
        measure=timing.measure_of(device),
    )
    copy_rate = 2 * source.numel() / timed[COPY].total
    copied = Subject(COPY, target.copy_, 2 * (MODELS + 2))
    rows = [row_of(count, copied, timed, copy_rate)]
    for subject in subjects():
        if subject.name in wrong:
            note = {"name": subject.name, "note": "other bits than on the CPU", "bars": "MISS"}
            rows.append(case_of(count) | note)
        else:
            row = row_of(count, subject, timed, copy_rate)
            if device == "cuda":
                row["bars"] = "; ".join(bars(subject, row, timed))
            rows.append(row)
    return rows


def on(run: Callable[[Sequence[Part]], Any], parts: Sequence[Part]) -> Callable[..., None]:
    def step(mark: timing.Mark) -> None:
        mark()
        run(parts)

    return step


def case_of(count: int) -> dict[str, Any]:
    return {"parameters": count, "models": MODELS, "dtype": "bf16"}


def row_of(
    count: int, subject: Subject, timed: Mapping[str, timing.Timing], copy_rate: float
) -> dict[str, Any]:
    own = timed[subject.name]
    rate = None if subject.bytes is None else count * subject.bytes / own.total
    return case_of(count) | {
        "name": subject.name,
        "bytes": subject.bytes,
        "total": own.total,
        "spread": own.spread,
        "rate": None if rate is None else rate / 1e9,
        "share": None if rate is None else rate / copy_rate,
        "x_eager": None
        if subject.eager is None
        else timing.paired_ratio(timed[subject.eager], own),
        "note": "",
        "bars": "",
    }


def bars(subject: Subject, row: Mapping[str, Any], timed: Mapping[str, timing.Timing]) -> list[str]:
    def verdict(met: bool) -> str:
        return "pass" if met else "MISS"

    found = []
    if subject.one_pass:
        met = row["share"] >= SHARE_BAR
        found.append(f"{row['share']:.0%} of copy >= {SHARE_BAR:.0%} {verdict(met)}")
    if subject.name == "ties" and "task arithmetic" in timed:
        ratio = timing.paired_ratio(timed["ties"], timed["task arithmetic"])
        found.append(f"{ratio:.2f} <= {TIES_BAR} of one pass {verdict(ratio <= TIES_BAR)}")
    if row["x_eager"] is not None:
        met = row["x_eager"] >= EAGER_BAR
        found.append(f"{row['x_eager']:.1f} >= {EAGER_BAR:g} x eager {verdict(met)}")
    return found


def parse_options() -> argparse.Namespace:
    parser = parser_of(__doc__, device="cuda", seconds=12.0, rounds=5)
    parser.add_argument("--layers", type=int, default=4, help="of Gemma-2-2B, 78 M parameters each")
    parser.add_argument("--width", type=int, default=2304, help="of the model")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    facts = report.machine(options.device)
    print(report.header(facts), flush=True)
    parts = layers(options.layers, options.width, options.device)
    rows = measure(parts, options.device, options.seconds, options.rounds)
    print(f"\n## {LAYOUT.label(rows[0])}\n{report.table_and_bars(rows, COLUMNS)}")
    if options.save:
        report.save(RESULTS / facts["device"], "souping_card", rows, facts, LAYOUT)


if __name__ == "__main__":
    main()
