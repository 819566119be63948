"""Products of sparse codes with a dictionary, beside the dense ones and torch's embedding_bag.

    python benchmarks/bench_sae_products.py
    python benchmarks/bench_sae_products.py --features 16384 --dtype bf16 --op decode backward
    python benchmarks/bench_sae_products.py --device cuda --save

Each op is first checked on a small problem against the formulas in float64; one that fails has no
time. GB/s counts the rows of the dictionary or of the tokens that entries name, as if none were in
a cache, and what is written. Codes are drawn uniformly: no feature is hot.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from gemma_ext.bench import report
from gemma_ext.bench.options import parser_of
from gemma_ext.bench.subject import DTYPES
from gemma_ext.bench.timing import interleave, measure_of, paired_ratio
from gemma_ext.ops.sae import Codes, decode, decode_error, dots, nested_errors, scatter

HERE = Path(__file__).parent
BARS = {"decode": 10.0}
BAR_FEATURES = 65536
COLUMNS = {
    "name": ("op", ""),
    "seconds": ("ms", ".2fms"),
    "spread": ("spread", ".0%"),
    "rate": ("GB/s", ".1f"),
    "x_dense": ("x dense", ".1f"),
    "x_bag": ("x embedding_bag", ".1f"),
    "cpu": ("CPU s", ".3f"),
    "note": ("note", ""),
}


@dataclass(frozen=True)
class Problem:
    codes: Codes
    weight: Tensor
    bias: Tensor
    rows: Tensor
    widths: tuple[int, ...]

    def dense(self) -> Tensor:
        """f [N, F] in the dtype of the dictionary."""
        c = self.codes
        f = torch.zeros(c.tokens, c.features, dtype=self.weight.dtype, device=self.weight.device)
        return f.scatter_add_(1, c.indices.long(), c.values.to(f.dtype))


def problem(n: int, k: int, features: int, width: int, dtype: torch.dtype, device: str) -> Problem:
    g = torch.Generator(device).manual_seed(0)
    options = {"generator": g, "device": device}
    indices = torch.randint(0, features, (n, k), dtype=torch.int32, **options)
    values = torch.rand(n, k, **options) + 0.1
    return Problem(
        Codes(values, indices, None, torch.Size((n,)), features),
        torch.randn(features, width, **options).to(dtype),
        torch.randn(width, **options),
        torch.randn(n, width, **options).to(dtype),
        tuple(features >> shift for shift in (4, 3, 2, 1, 0)),
    )


def backward(p: Problem, loss: Callable[[Codes, Tensor, Tensor], Tensor]) -> tuple[Tensor, ...]:
    """Gradients of values, weight and bias, the forward included."""
    leaves = [x.detach().requires_grad_() for x in (p.codes.values, p.weight, p.bias)]
    out = loss(p.codes.with_values(leaves[0]), leaves[1], leaves[2])
    return torch.autograd.grad(out, leaves)


def training_step(p: Problem, impl: str = "auto") -> tuple[Tensor, ...]:
    def loss(codes: Codes, weight: Tensor, bias: Tensor) -> Tensor:
        return decode_error(codes, weight, bias, p.rows, unit_norm=True, impl=impl)[1].sum()

    return backward(p, loss)


def nested_step(p: Problem, impl: str = "auto") -> tuple[Tensor, ...]:
    def loss(codes: Codes, weight: Tensor, bias: Tensor) -> Tensor:
        return nested_errors(codes, weight, bias, p.rows, widths=p.widths, impl=impl).sum()

    return backward(p, loss)


def dense_step(p: Problem) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in (p.dense(), p.weight, p.bias)]
    error = p.rows - leaves[0] @ leaves[1] - leaves[2].to(p.rows.dtype)
    return torch.autograd.grad(error.float().square().sum(), leaves)


def bag(p: Problem) -> Tensor:
    values = p.codes.values.to(p.weight.dtype)
    return functional.embedding_bag(
        p.codes.indices, p.weight, per_sample_weights=values, mode="sum"
    )


@dataclass(frozen=True)
class Subject:
    """An op; rows of D elements that it gathers per entry and moves per token and feature."""

    call: Callable[..., object]
    per_entry: int
    per_token: int
    per_feature: int
    dense: Callable[[Problem], object] | None = None
    bag: Callable[[Problem], object] | None = None


SUBJECTS = {
    "decode": Subject(
        lambda p, impl="auto": decode(p.codes, p.weight, p.bias, impl=impl),
        1,
        1,
        0,
        lambda p: p.dense() @ p.weight,
        bag,
    ),
    "decode_error": Subject(
        lambda p, impl="auto": decode_error(p.codes, p.weight, p.bias, p.rows, impl=impl), 1, 2, 0
    ),
    "dots": Subject(lambda p, impl="auto": dots(p.codes, p.weight, p.rows, impl=impl), 1, 1, 0),
    "scatter": Subject(lambda p, impl="auto": scatter(p.codes, p.rows, impl=impl), 1, 0, 1),
    "error and gradients": Subject(training_step, 2, 3, 2, dense_step),
    "nested errors and gradients, 5 widths": Subject(nested_step, 4, 12, 3),
}


def wrong(subject: Subject, dtype: torch.dtype, device: str) -> str:
    """What is wrong with an op on a small problem, nothing if it is right."""
    small = problem(40, 7, 64, 33, dtype, device)
    limit = {torch.float32: 1e-5, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}[dtype]
    for got, want in zip(
        _all(subject.call(small)), _all(subject.call(small, "reference")), strict=True
    ):
        error = (got.double() - want.double()).norm() / want.double().norm()
        if not error <= limit:
            return f"relative error {float(error):.1e}"
    return ""


def _all(found: object) -> tuple[Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


def rows_of(options: argparse.Namespace) -> list[dict[str, object]]:
    dtype = DTYPES[options.dtype]
    p = problem(
        options.tokens, options.active, options.features, options.width, dtype, options.device
    )
    chosen = {name: SUBJECTS[name] for name in options.op or SUBJECTS}
    notes = {name: wrong(subject, dtype, options.device) for name, subject in chosen.items()}
    steps: dict[str, Callable] = {}
    for name, subject in chosen.items():
        if notes[name]:
            continue
        steps[name] = lambda mark, call=subject.call: call(p)
        for kind in ("dense", "bag") if options.peers else ():
            if peer := getattr(subject, kind):
                steps[f"{kind} {name}"] = lambda mark, call=peer: call(p)
    timings = interleave(
        steps,
        seconds=options.seconds,
        measure=measure_of(options.device),
    )
    return [_row(name, subject, notes[name], timings, p) for name, subject in chosen.items()]


def _row(name: str, subject: Subject, note: str, timings: dict, p: Problem) -> dict[str, object]:
    row: dict[str, object] = {"name": name, "note": note, "bars": ""}
    if note:
        return row
    mine = timings[name]
    lines = (
        subject.per_entry * p.codes.values.numel()
        + subject.per_token * p.codes.tokens
        + subject.per_feature * p.codes.features
    )
    size = lines * p.weight.shape[1] * p.weight.element_size()
    peers = {kind: timings.get(f"{kind} {name}") for kind in ("dense", "bag")}
    ratios = {f"x_{kind}": paired_ratio(t, mine) if t else None for kind, t in peers.items()}
    row |= {
        "seconds": mine.total,
        "spread": mine.spread,
        "rate": size / mine.total / 1e9,
        "cpu": mine.cpu,
        **ratios,
    }
    if name in BARS and p.codes.features == BAR_FEATURES and ratios["x_dense"]:
        met = "pass" if ratios["x_dense"] >= BARS[name] else "MISS"
        row["bars"] = f"{ratios['x_dense']:.0f} x dense >= {BARS[name]:.0f} {met}"
    return row


def parse_options() -> argparse.Namespace:
    parser = parser_of(
        __doc__, device="cpu", dtype="fp32", threads=torch.get_num_threads(), seconds=60.0
    )
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--active", type=int, default=64, help="entries of a token")
    parser.add_argument("--features", type=int, default=BAR_FEATURES)
    parser.add_argument("--width", type=int, default=2304)
    parser.add_argument("--op", nargs="+", choices=tuple(SUBJECTS), help="some of the ops")
    parser.add_argument("--no-peers", dest="peers", action="store_false")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    facts = report.machine(options.device)
    print(report.header(facts), flush=True)
    rows = rows_of(options)
    print(report.table_and_bars(rows, COLUMNS))
    names = ("tokens", "active", "features", "width", "dtype", "threads")
    case = {name: getattr(options, name) for name in names}
    if options.save:
        layout = report.Layout(
            title="Products of sparse codes",
            about=f"`python benchmarks/bench_sae_products.py --device {options.device} --save`",
            case=names,
            label=lambda row: (
                f"N={row['tokens']} K={row['active']} F={row['features']} D={row['width']} "
                f"{row['dtype']}, {row['threads']} threads"
            ),
            columns=COLUMNS,
            place=list(SUBJECTS).index,
        )
        folder = HERE / "results" / facts["device"]
        report.save(folder, "sae_products", [{**row, **case} for row in rows], facts, layout)
    sys.exit(any(row["note"] for row in rows))


if __name__ == "__main__":
    main()
