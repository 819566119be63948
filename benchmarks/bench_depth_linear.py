"""Linear layers and heads of rows at mixed depths, beside what torch needs for the same.

    python benchmarks/bench_depth_linear.py
    python benchmarks/bench_depth_linear.py --part head --rows 1 8 32
    python benchmarks/bench_depth_linear.py --shape 2304 9216 --rank 64 --dtype bf16
    python benchmarks/bench_depth_linear.py --device cuda --dtype bf16 --save

Half of the rows are at each of two loops. Weights are several copies in turn, more than caches
hold, as a model's layers are. Results are checked against the formulas before they are timed. GB/s
counts the weight once for all rows. "F.linear, LoRA by loop" is a base product and two more for
every loop; "logits" is F.linear in the dtype of the head, and log-softmax and top 2 in float32.
Rows of "shortlist_head, certified" are near a token each; its GB/s are of codes, its peer is
head_exit.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from gemma_ext.bench import report
from gemma_ext.bench.options import parser_of
from gemma_ext.bench.subject import DTYPES
from gemma_ext.bench.timing import Timing, interleave, measure, measure_on_card, paired_ratio
from gemma_ext.ops.depth_batching import (
    Projection,
    head_exit,
    make_shortlist,
    seg_depth_lora,
    shortlist_head,
)

HERE = Path(__file__).parent
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
COLD = {"cpu": 128 << 20, "cuda": 512 << 20}
"""Bytes of weights that take turns, beyond the caches."""
OURS, BASE, LINEAR, BY_LOOP = (
    "seg_depth_lora",
    "seg_depth_lora, r = 0",
    "F.linear",
    "F.linear, LoRA by loop",
)
EXIT, SAMPLED, LISTED, SHORT, LOGITS = (
    "head_exit",
    "head_exit, samples",
    "head_exit, 64 candidates",
    "shortlist_head, certified",
    "logits",
)
NAMES = {"linear": (OURS, BASE, BY_LOOP, LINEAR), "head": (EXIT, SAMPLED, LISTED, SHORT, LOGITS)}
PEERS = {OURS: BY_LOOP, BASE: LINEAR, EXIT: LOGITS, SHORT: EXIT}
SHAPES = {
    "cpu": {"linear": (640, 2048), "head": (640, 262144)},
    "cuda": {"linear": (2304, 9216), "head": (2304, 256000)},
}
"""D and F, or V: of Gemma 3 270M and Gemma 2 2B."""
HEAD_BAR = 0.85  # of the bandwidth of a copy, up to 128 rows on a card
COPY = "copy"
COLUMNS = {
    "name": ("op", ""),
    "seconds": ("ms", ".3fms"),
    "spread": ("spread", ".0%"),
    "rate": ("GB/s", ".1f"),
    "flops": ("GFLOP/s", ".0f"),
    "of_copy": ("of copy", ".0%"),
    "x_peer": ("x peer", ".2f"),
    "note": ("note", ""),
}
Steps = dict[str, Callable[[], object]]


def randn(o: argparse.Namespace, *shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device=o.device) * scale).to(DTYPES[o.dtype])


def in_turn(makers: list[Callable[[], object]]) -> Callable[[], object]:
    """One after the other at every call."""
    order = itertools.cycle(makers)
    return lambda: next(order)()


def linear_steps(o: argparse.Namespace, n: int) -> tuple[Steps, str]:
    width, features = o.shape
    own = DTYPES[o.dtype].itemsize * width * features
    count = max(1, COLD[o.device] // own)
    scale = width**-0.5
    x = randn(o, n, width)
    cut = torch.tensor([0, (n + 1) // 2, n], dtype=torch.int32, device=o.device)
    full = [
        Projection(
            randn(o, features, width, scale=scale),
            None,
            randn(o, 2, o.rank, width, scale=scale),
            randn(o, 2, features, o.rank, scale=o.rank**-0.5),
        )
        for _ in range(count)
    ]
    bare = [Projection(p.weight) for p in full]
    bounds = cut.tolist()

    def by_loop(p: Projection) -> Tensor:
        y = functional.linear(x, p.weight)
        for j, (begin, end) in enumerate(itertools.pairwise(bounds)):
            if begin < end:
                y[begin:end] += (x[begin:end] @ p.lora_a[j].T) @ p.lora_b[j].T
        return y

    want = seg_depth_lora(x, [full[0]], cut, impl="reference")[0].double()
    got = seg_depth_lora(x, [full[0]], cut)[0].double()
    error = float((got - want).norm() / want.norm())
    note = "" if error <= LIMITS[DTYPES[o.dtype]] else f"relative error {error:.1e}"
    return {
        OURS: in_turn([lambda p=p: seg_depth_lora(x, [p], cut) for p in full]),
        BASE: in_turn([lambda p=p: seg_depth_lora(x, [p]) for p in bare]),
        LINEAR: in_turn([lambda p=p: functional.linear(x, p.weight) for p in full]),
        BY_LOOP: in_turn([lambda p=p: by_loop(p) for p in full]),
    }, note


def head_steps(o: argparse.Namespace, n: int) -> tuple[Steps, str]:
    width, vocabulary = o.shape
    weight, h = randn(o, vocabulary, width, scale=width**-0.5), randn(o, n, width)
    keys = torch.arange(3 * n, device=o.device).reshape(n, 3)
    options = {"softcap": 30.0, "mode": "margin", "threshold": 0.2}

    def logits() -> object:
        s = 30.0 * torch.tanh(functional.linear(h, weight).float() / 30.0)
        p = s.log_softmax(-1)
        top = p.topk(2, -1)
        return top, (p.exp() * p).sum(-1)

    want = head_exit(h, weight, **options, impl="reference")
    got = head_exit(h, weight, **options)
    error = float((got.lse - want.lse).abs().max())
    note = "" if error <= 1e-2 else f"lse off by {error:.1e}"
    short = make_shortlist(weight)
    near = h + (16 * weight[torch.arange(n, device=o.device) * 7 % vocabulary])
    found, whole = shortlist_head(near, short, **options), head_exit(near, weight, **options)
    if not (found.certified.all() and torch.equal(found.ids, whole.ids)):
        note = note or f"{int(found.certified.sum())} of {n} rows certified"
    return {
        EXIT: lambda: head_exit(h, weight, **options),
        SAMPLED: lambda: head_exit(h, weight, **options, temperature=0.8, keys=keys),
        LISTED: lambda: head_exit(h, weight, **options, candidates=64),
        SHORT: lambda: shortlist_head(near, short, **options),
        LOGITS: logits,
    }, note


def rows_of(o: argparse.Namespace, n: int) -> list[dict[str, object]]:
    steps, note = (linear_steps if o.part == "linear" else head_steps)(o, n)
    if note:
        return [dict.fromkeys(COLUMNS) | {"name": NAMES[o.part][0], "note": note, "bars": "MISS"}]
    own = DTYPES[o.dtype].itemsize * o.shape[0] * o.shape[1]
    sources = [
        torch.ones(own // 2, dtype=torch.uint8, device=o.device)
        for _ in range(max(1, COLD[o.device] // own))
    ]
    target = torch.empty_like(sources[0])
    steps[COPY] = in_turn([lambda s=s: target.copy_(s) for s in sources])

    def marked(step: Callable[[], object]) -> Callable[..., None]:
        def run(mark: Callable[[], None]) -> None:
            mark()
            step()

        return run

    timings = interleave(
        {name: marked(step) for name, step in steps.items()},
        seconds=o.seconds,
        measure=measure_on_card if o.device == "cuda" else measure,
    )
    return [_row(o, n, name, own, timings) for name in NAMES[o.part]]


def _row(
    o: argparse.Namespace, n: int, name: str, own: int, timings: dict[str, Timing]
) -> dict[str, object]:
    t = timings[name]
    row = dict.fromkeys(COLUMNS) | {"name": name, "note": "", "bars": ""}
    row |= {
        "seconds": t.total,
        "spread": t.spread,
        "rate": own / t.total / 1e9,
        "flops": 2 * n * o.shape[0] * o.shape[1] / t.total / 1e9,
        "of_copy": paired_ratio(timings[COPY], t),
    }
    if name == SHORT:  # reads a byte an element, and what it reads of W
        row |= {"rate": o.shape[0] * o.shape[1] / t.total / 1e9, "of_copy": None}
    if name in PEERS:
        row["x_peer"] = paired_ratio(timings[PEERS[name]], t)
    if name == EXIT and o.device == "cuda" and n <= 128:
        met = "pass" if row["of_copy"] >= HEAD_BAR else "MISS"
        row["bars"] = f"{row['of_copy']:.0%} >= {HEAD_BAR:.0%} of a copy {met}"
    return row


def parse_options() -> argparse.Namespace:
    parser = parser_of(
        __doc__, device="cpu", dtype="fp32", threads=torch.get_num_threads(), seconds=6.0
    )
    parser.add_argument("--part", nargs="+", default=list(NAMES), choices=tuple(NAMES))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8, 16, 32, 128])
    parser.add_argument(
        "--shape", type=int, nargs=2, help="D and F, or D and V; by default those of SHAPES"
    )
    parser.add_argument("--rank", type=int, default=64)
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    facts = report.machine(options.device)
    print(report.header(facts), flush=True)
    rows = []
    with torch.no_grad():
        for part, n in itertools.product(options.part, options.rows):
            o = copy.copy(options)
            o.part, o.shape = part, tuple(options.shape or SHAPES[o.device][part])
            found = rows_of(o, n)
            case = {"part": part, "rank": o.rank, "dtype": o.dtype, "threads": o.threads}
            case |= {"D": o.shape[0], "F": o.shape[1], "rows": n}
            print(f"{part}, {n} rows\n" + report.table_and_bars(found, COLUMNS), flush=True)
            rows += [{**row, **case} for row in found]
    if options.save:
        layout = report.Layout(
            title="Linear layers and heads of rows at mixed depths",
            about=f"`python benchmarks/bench_depth_linear.py --device {options.device} --save`",
            case=("part", "rank", "dtype", "threads", "D", "F", "rows"),
            label=lambda row: (
                f"{row['rows']} rows, {row['D']} x {row['F']}, {row['dtype']}, "
                f"{row['threads']} threads"
                + (f", r = {row['rank']}" if row["part"] == "linear" else "")
            ),
            columns=COLUMNS,
            place=[name for names in NAMES.values() for name in names].index,
        )
        folder = HERE / "results" / facts["device"]
        report.save(folder, "depth_linear", rows, facts, layout)
    sys.exit(any(row["note"] for row in rows))


if __name__ == "__main__":
    main()
