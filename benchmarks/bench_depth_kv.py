"""Attention over pages at mixed depths, beside a copy of the same bytes and torch's SDPA.

    python benchmarks/bench_depth_kv.py
    python benchmarks/bench_depth_kv.py --rows 1 --context 4096 --dtype bf16
    python benchmarks/bench_depth_kv.py --rows 256 --chunk --context 512
    python benchmarks/bench_depth_kv.py --device cuda --save

Half of the rows are at each of two loops, their pages shuffled. With `--chunk` all rows are one
prompt's last positions, else each is the newest token of its own request. "SDPA" has K and V of
every row side by side beforehand, which no engine with pages has; "gather, SDPA" copies them first.
Attention is checked against the formulas before it is timed. GB/s counts K and V once for a row, or
once for a chunk.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from gemma_ext.bench import report
from gemma_ext.bench.options import parser_of
from gemma_ext.bench.subject import DTYPES
from gemma_ext.bench.timing import Timing, interleave, measure_of, paired_ratio, whole
from gemma_ext.ops.depth_batching import (
    PAGE,
    depth_compact,
    paged_attn_mixed_depth,
    rope_kv_write,
    rope_table,
)

HERE = Path(__file__).parent
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}
LOOPS, SOFTCAP = 2, 50.0
CARD_BAR = 0.75  # of the bandwidth of a copy
ATTENTION, CAPPED, COPY = "attention", "attention, soft-capped", "copy"
SDPA, GATHERED = "SDPA", "gather, SDPA"
WRITE, COMPACT = "rope_kv_write", "depth_compact"
NAMES = (ATTENTION, CAPPED, WRITE, COMPACT, SDPA, GATHERED, COPY)
COLUMNS = {
    "name": ("op", ""),
    "seconds": ("ms", ".3fms"),
    "spread": ("spread", ".0%"),
    "rate": ("GB/s", ".1f"),
    "of_copy": ("of copy", ".0%"),
    "x_gathered": ("x gather, SDPA", ".2f"),
    "note": ("note", ""),
}


class Problem:
    """Rows of queries over a pool of two depths."""

    def __init__(self, o: argparse.Namespace, rows: int, context: int) -> None:
        g = torch.Generator(o.device).manual_seed(0)
        options = {"generator": g, "device": o.device}
        dtype, self.chunk = DTYPES[o.dtype], o.chunk
        requests, pages = 1 if o.chunk else rows, -(-context // PAGE)
        shape = (LOOPS, requests * pages, 2, o.kv_heads, PAGE, o.width)
        self.pool = torch.randn(shape, **options).to(dtype)
        order = torch.randperm(requests * pages, **options).to(torch.int32)
        self.tables = order.reshape(requests, pages)
        at = torch.arange(rows, dtype=torch.int32, device=o.device)
        self.req = torch.zeros_like(at) if o.chunk else at
        self.pos = context - rows + at if o.chunk else torch.full_like(at, context - 1)
        self.loop = torch.zeros_like(at) if o.chunk else at * LOOPS // rows
        self.depth_of = torch.arange(LOOPS, dtype=torch.int32, device=o.device)
        self.q = torch.randn(rows, o.heads, o.width, **options).to(dtype)
        self.k, self.v = torch.randn(2, rows, o.kv_heads, o.width, **options).to(dtype)
        self.context = context
        frequencies = 10000.0 ** -torch.linspace(0, 1, o.width // 2 + 1, device=o.device)[:-1]
        self.rope = rope_table(frequencies, context)

    def places(self) -> tuple[Tensor, ...]:
        return self.tables, self.req, self.pos, self.loop, self.depth_of

    def attend(self, **options: object) -> Tensor:
        return paged_attn_mixed_depth(self.q, self.pool, *self.places(), **options)

    def write(self) -> Tensor:
        return rope_kv_write(self.q, self.k, self.v, self.pool, *self.places(), rope=self.rope)

    def compact(self) -> object:
        return depth_compact(self.loop, self.loop == 0, LOOPS)

    def gather(self) -> Tensor:
        """K and V [requests, 2, n_kv, context, hd] of each request at its row's depth."""
        depths = self.depth_of[self.loop[: len(self.tables)].long()].long()
        found = self.pool[depths.unsqueeze(-1), self.tables.long()]  # [requests, pages, 2, ...]
        return found.permute(0, 2, 3, 1, 4, 5).flatten(3, 4)[:, :, :, : self.context]

    def sdpa(self, kv: Tensor) -> Tensor:
        k, v = kv.unbind(1)
        if not self.chunk:
            q = self.q.unsqueeze(2)
            return functional.scaled_dot_product_attention(q, k, v, enable_gqa=True).squeeze(2)
        at = torch.arange(self.context, device=self.q.device)
        mask = at <= self.pos.unsqueeze(-1)
        q = self.q.transpose(0, 1).unsqueeze(0)
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return out[0].transpose(0, 1)

    def bytes(self) -> int:
        return self.pool[0, 0].numel() * self.tables.numel() * self.pool.element_size()


def wrong(o: argparse.Namespace) -> str:
    """What is wrong with attention on a small problem, nothing if it is right."""
    small = Problem(o, 3, 300)
    limit = LIMITS[DTYPES[o.dtype]]
    for options in ({}, {"softcap": SOFTCAP}):
        want = small.attend(impl="reference", **options).double()
        error = (small.attend(**options).double() - want).norm() / want.norm()
        if not error <= limit:
            return f"relative error {float(error):.1e}"
    return ""


def steps_of(p: Problem, peers: bool) -> dict[str, Callable[..., object]]:
    source = torch.ones(p.bytes() // 2, dtype=torch.uint8, device=p.q.device)
    target = torch.empty_like(source)
    steps = {
        ATTENTION: p.attend,
        CAPPED: lambda: p.attend(softcap=SOFTCAP),
        WRITE: p.write,
        COMPACT: p.compact,
        COPY: lambda: target.copy_(source),
    }
    if peers:
        kv = p.gather().contiguous()
        steps[SDPA] = lambda: p.sdpa(kv)
        steps[GATHERED] = lambda: p.sdpa(p.gather())
    return steps


def rows_of(o: argparse.Namespace) -> list[dict[str, object]]:
    note = wrong(o)
    p = Problem(o, o.rows, o.context)
    steps = steps_of(p, o.peers)
    if note:
        steps = {name: step for name, step in steps.items() if name not in (ATTENTION, CAPPED)}

    timings = interleave(
        {name: whole(step) for name, step in steps.items()},
        seconds=o.seconds,
        measure=measure_of(o.device),
    )
    return [_row(name, note, timings, p, o) for name in NAMES if name in timings or note]


def _row(
    name: str, note: str, timings: dict[str, Timing], p: Problem, o: argparse.Namespace
) -> dict[str, object]:
    row: dict[str, object] = dict.fromkeys(COLUMNS) | {"name": name, "note": "", "bars": ""}
    if name not in timings:
        return row | ({"note": note, "bars": "MISS"} if name in (ATTENTION, CAPPED) else {})
    own = timings[name]
    row |= {"seconds": own.total, "spread": own.spread}
    if name in (WRITE, COMPACT):
        return row
    row |= {"rate": p.bytes() / own.total / 1e9, "of_copy": paired_ratio(timings[COPY], own)}
    if GATHERED in timings:
        row["x_gathered"] = paired_ratio(timings[GATHERED], own)
    if name == CAPPED and o.device == "cuda" and o.rows * o.context >= 1 << 16:
        met = "pass" if row["of_copy"] >= CARD_BAR else "MISS"
        row["bars"] = f"{row['of_copy']:.0%} >= {CARD_BAR:.0%} of a copy {met}"
    return row


def parse_options() -> argparse.Namespace:
    parser = parser_of(
        __doc__, device="cpu", dtype="bf16", threads=torch.get_num_threads(), seconds=20.0
    )
    parser.add_argument("--rows", type=int, help="16, on a card 64")
    parser.add_argument("--context", type=int, help="tokens of a request: 1536, on a card 4096")
    parser.add_argument("--chunk", action="store_true", help="rows of one request")
    parser.add_argument("--heads", type=int, default=8, help="of q; Gemma 2 2B by default")
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--width", type=int, default=256, help="of a head")
    parser.add_argument("--no-peers", dest="peers", action="store_false")
    options = parser.parse_args()
    on_card = options.device == "cuda"
    options.rows = options.rows or (64 if on_card else 16)
    options.context = options.context or (4096 if on_card else 1536)
    return options


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    facts = report.machine(options.device)
    print(report.header(facts), flush=True)
    with torch.no_grad():
        rows = rows_of(options)
    print(report.table_and_bars(rows, COLUMNS))
    names = ("rows", "context", "chunk", "heads", "kv_heads", "width", "dtype", "threads")
    case = {name: getattr(options, name) for name in names}
    if options.save:
        layout = report.Layout(
            title="Attention over pages",
            about=f"`python benchmarks/bench_depth_kv.py --device {options.device} --save`",
            case=names,
            label=lambda row: (
                f"{row['rows']} rows{' of one chunk' if row['chunk'] else ''} of "
                f"{row['context']} tokens, {row['heads']} and {row['kv_heads']} heads of "
                f"{row['width']}, {row['dtype']}, {row['threads']} threads"
            ),
            columns=COLUMNS,
            place=list(NAMES).index,
        )
        folder = HERE / "results" / facts["device"]
        report.save(folder, "depth_kv", [{**row, **case} for row in rows], facts, layout)
    sys.exit(any(row["note"] for row in rows))


if __name__ == "__main__":
    main()
