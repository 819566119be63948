"""Encoders and products of sparse dictionaries on a card, beside the bare product and a copy.

    python benchmarks/bench_sae_card.py --save

`F.linear` is the product alone, `F.linear, relu, topk` what holds its result; `embedding_bag` and
eai-sparsify (where it is installed) decode the same lists. Every op of ours is first checked on a
small problem of whole numbers against the formulas; what differs has no time. All are then timed in
turn in one process.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from gemma_ext.bench import report, timing
from gemma_ext.bench.options import parser_of
from gemma_ext.ops.sae import (
    Codes,
    decode,
    encode_batch_topk,
    encode_group_max,
    encode_threshold,
    encode_topk,
)

RESULTS = Path(__file__).parent / "results"
LINEAR, EAGER, COPY = "F.linear", "F.linear, relu, topk", "copy"
BAG, SPARSIFY = "embedding_bag", "eai-sparsify, both passes"
DECODE, BOTH = "decode", "decode, both passes"
ENCODE_BAR, EAGER_BAR, SHARE_BAR, BACKWARD_BAR, SPARSIFY_BAR = 1.12, 1.8, 0.7, 2.5, 2.0
KEY = ("tokens", "width", "features", "k", "dtype")
COLUMNS = {
    "name": ("op", ""),
    "total": ("ms", ".3fms"),
    "spread": ("spread", ".0%"),
    "of_linear": ("x F.linear's time", ".2f"),
    "rate": ("GB/s gathered", ".0f"),
    "share": ("of copy", ".0%"),
    "note": ("note", ""),
}
Step = Callable[..., Any]


class Problem:
    """Sums of 32 rows of the dictionary with exponential weights, and noise; its codes."""

    def __init__(self, tokens: int, width: int, features: int, k: int, device: str) -> None:
        g = torch.Generator(device).manual_seed(0)
        options = {"generator": g, "device": device}
        weight = functional.normalize(torch.randn(features, width, **options), dim=-1)
        x = 0.1 * torch.randn(tokens, width, **options)
        for _ in range(32):
            chosen = torch.randint(0, features, (tokens,), **options)
            amounts = torch.empty(tokens, 1, device=device).exponential_(generator=g)
            x += amounts * weight[chosen]
        self.x, self.weight, self.k = x.bfloat16(), weight.bfloat16(), k
        self.codes = encode_topk(self.x, self.weight, k=k).codes
        self.threshold = float(self.codes.values[:, -1].median())
        self.grad = torch.randn(tokens, width, **options).bfloat16()

    def leaves(self) -> tuple[Codes, Tensor]:
        values = self.codes.values.detach().requires_grad_()
        return self.codes.with_values(values), self.weight.detach().requires_grad_()


def encoders(q: Problem) -> dict[str, Step]:
    x, weight, k = q.x, q.weight, q.k
    features = len(weight)
    groups = next(g for g in (k, 32, 16, 8, 4, 2, 1) if features % g == 0)
    mask = torch.arange(features, device=x.device) % 8 == 0
    return {
        LINEAR: lambda: functional.linear(x, weight),
        EAGER: lambda: torch.relu(functional.linear(x, weight)).topk(k, dim=-1),
        "encode_topk": lambda **o: encode_topk(x, weight, k=k, **o).codes,
        "encode_topk, aux": lambda **o: encode_topk(x, weight, k=k, aux=(mask, k), **o).aux,
        "encode_batch_topk": lambda **o: encode_batch_topk(x, weight, total=k * len(x), **o).codes,
        "encode_threshold": lambda **o: (
            encode_threshold(
                x, weight, threshold=q.threshold, capacity=min(32 * k, features), **o
            ).codes
        ),
        "encode_group_max": lambda **o: encode_group_max(x, weight, groups=groups, **o),
    }


def decoders(q: Problem) -> dict[str, Step]:
    def both() -> None:
        codes, weight = q.leaves()
        torch.autograd.backward(decode(codes, weight), q.grad)

    def bag() -> Tensor:
        values = q.codes.values.to(q.weight.dtype)
        return functional.embedding_bag(
            q.codes.indices, q.weight, per_sample_weights=values, mode="sum"
        )

    found = {DECODE: lambda: decode(q.codes, q.weight), BOTH: both, BAG: bag}
    if q.x.is_cuda and find_spec("sparsify"):
        found[SPARSIFY] = sparsify_step(q)
    return found


def sparsify_step(q: Problem) -> Step:
    from sparsify.utils import decoder_impl

    def step() -> None:
        codes, weight = q.leaves()
        values = codes.values.to(weight.dtype)
        torch.autograd.backward(decoder_impl(codes.indices.long(), values, weight.mT), q.grad)

    return step


def wrong_encoders(device: str) -> set[str]:
    """Those that choose other entries than the formulas, or return another p."""
    g = torch.Generator().manual_seed(1)
    small = Problem(40, 32, 1400, 7, device)
    small.x, small.weight = (
        torch.randint(-3, 4, t.shape, generator=g).to(device, t.dtype)
        for t in (small.x, small.weight)
    )
    small.threshold = 70.0
    found = set()
    for name, call in encoders(small).items():
        if name.startswith("encode"):
            got, want = call(), call(impl="reference")
            if not (
                torch.equal(got.indices, want.indices) and torch.equal(got.values, want.values)
            ):
                found.add(name)
    return found


def wrong_decode(device: str) -> bool:
    small = Problem(40, 96, 1400, 7, device)
    found = []
    for impl in ("auto", "reference"):
        codes, weight = small.leaves()
        out = decode(codes, weight, impl=impl)
        found.append((out, *torch.autograd.grad(out, (codes.values, weight), small.grad)))
    return any((a - b).abs().max() > 0.02 * b.abs().max() for a, b in zip(*found, strict=True))


def measure(q: Problem, device: str, seconds: float, least: int) -> list[dict[str, Any]]:
    """A row for each op and peer, and one of a copy of as many bytes as decode gathers."""
    n, width = q.x.shape
    gathered = 2 * n * q.k * width
    wrong = wrong_encoders(device) | ({DECODE, BOTH} if wrong_decode(device) else set())
    source = torch.empty(gathered // 2, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    steps = encoders(q) | decoders(q) | {COPY: lambda: target.copy_(source)}
    timed = timing.interleave(
        {name: timing.whole(step) for name, step in steps.items() if name not in wrong},
        seconds=seconds,
        least=least,
        measure=timing.measure_of(device),
    )
    rows = []
    for name in steps:
        row = dict(zip(KEY, (n, width, len(q.weight), q.k, "bf16"), strict=True))
        row |= dict.fromkeys(COLUMNS) | {"name": name, "note": "", "bars": ""}
        rows.append(row)
        if name in wrong:
            row |= {"note": "RED: not what the formulas say", "bars": "MISS"}
            continue
        row |= {"total": timed[name].total, "spread": timed[name].spread}
        if name in encoders(q):
            row["of_linear"] = 1 / timing.paired_ratio(timed[LINEAR], timed[name])
        if name in (DECODE, BAG, COPY):
            row["rate"] = gathered / timed[name].total / 1e9
            row["share"] = timing.paired_ratio(timed[COPY], timed[name])
        if device == "cuda":
            row["bars"] = "; ".join(bars(name, row, timed))
    return rows


def bars(name: str, row: Mapping[str, Any], timed: Mapping[str, timing.Timing]) -> list[str]:
    def verdict(met: bool) -> str:
        return "pass" if met else "MISS"

    found = []
    if name == "encode_topk":
        ratio, eager = row["of_linear"], timing.paired_ratio(timed[EAGER], timed[name])
        found.append(f"{ratio:.2f} <= {ENCODE_BAR} of F.linear {verdict(ratio <= ENCODE_BAR)}")
        found.append(f"{eager:.2f} >= {EAGER_BAR} x eager {verdict(eager >= EAGER_BAR)}")
    if name == DECODE:
        found.append(f"{row['share']:.0%} >= {SHARE_BAR:.0%} {verdict(row['share'] >= SHARE_BAR)}")
    if name == BOTH and DECODE in timed:
        backward = 1 / timing.paired_ratio(timed[DECODE], timed[name]) - 1
        found.append(
            f"backward {backward:.2f} <= {BACKWARD_BAR} {verdict(backward <= BACKWARD_BAR)}"
        )
    if name == SPARSIFY and BOTH in timed:
        ratio = timing.paired_ratio(timed[name], timed[BOTH])
        found.append(f"ours {ratio:.2f} >= {SPARSIFY_BAR} x {verdict(ratio >= SPARSIFY_BAR)}")
    return found


LAYOUT = report.Layout(
    title="Sparse dictionaries on a card",
    about="`python benchmarks/bench_sae_card.py --save`; a copy of the bytes decode gathers",
    case=KEY,
    label=lambda row: (
        f"N={row['tokens']} D={row['width']} F={row['features']} k={row['k']}, {row['dtype']}"
    ),
    columns=COLUMNS,
    place=[LINEAR, EAGER, "encode_topk", "encode_topk, aux", "encode_batch_topk",
           "encode_threshold", "encode_group_max", DECODE, BOTH, BAG, SPARSIFY, COPY].index,
)  # fmt: skip


def parse_options() -> argparse.Namespace:
    parser = parser_of(__doc__, device="cuda", seconds=12.0, rounds=5)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--width", type=int, default=2304)
    parser.add_argument("--features", type=int, nargs="+", default=[131_072, 16_384])
    parser.add_argument("--k", type=int, default=64)
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    facts = report.machine(options.device)
    print(report.header(facts), flush=True)
    for features in options.features:
        q = Problem(options.tokens, options.width, features, options.k, options.device)
        seconds = options.seconds / len(options.features)
        rows = measure(q, options.device, seconds, options.rounds)
        print(f"\n## {LAYOUT.label(rows[0])}\n{report.table_and_bars(rows, COLUMNS)}", flush=True)
        if options.save:
            report.save(RESULTS / facts["device"], "sae_card", rows, facts, LAYOUT)


if __name__ == "__main__":
    main()
