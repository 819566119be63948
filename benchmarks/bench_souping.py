"""Merging weights that are resident: the souping ops against a copy of as many bytes, in one run.

    python benchmarks/bench_souping.py
    python benchmarks/bench_souping.py --parameters 64000000 --models 5 --threads 1
    python benchmarks/bench_souping.py --device cuda --save

Each op is first checked on a small problem against the formulas in float64; one that fails has no
time. Bytes are what a call has to read and write, all passes counted; "of copy" is bytes per second
over those of `copy_` in the same rounds. Peers are the same merge written in eager torch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gemma_ext.bench import report
from gemma_ext.bench.options import parser_of
from gemma_ext.bench.timing import interleave, measure_of, paired_ratio
from gemma_ext.ops.souping import (
    Gram,
    Magnitudes,
    Mask,
    Norms,
    Part,
    RowMask,
    Rule,
    crossover_,
    gather_rows_,
    merge_,
    mutate_,
    soup_,
)

HERE = Path(__file__).parent
WIDTH = 2304
VOCABULARY, REMAP_SECONDS = 256_000, 2.0
BARS = {"linear": 0.85, "ties": 0.35}
COLUMNS = {
    "name": ("op", ""),
    "bytes": ("bytes/el", ".0f"),
    "seconds": ("ms", ".2fms"),
    "spread": ("spread", ".0%"),
    "rate": ("GB/s", ".1f"),
    "of_copy": ("of copy", ".0%"),
    "x_eager": ("x eager", ".1f"),
    "cpu": ("CPU s", ".3f"),
    "note": ("note", ""),
}
TIES = Rule("sum", combine="weighted_mean")


@dataclass(frozen=True)
class Problem:
    """M fine-tunes of one base in bfloat16, and where results go."""

    sources: list[Tensor]
    base: Tensor
    out: Tensor

    @property
    def part(self) -> list[Part]:
        return [Part(self.sources, self.base, self.out, "w")]

    @property
    def plain(self) -> list[Part]:
        return [Part(self.sources, None, self.out, "w")]


def problem(rows: int, models: int, device: str) -> Problem:
    g = torch.Generator(device).manual_seed(0)
    options = {"generator": g, "device": device}
    base = (0.02 * torch.randn(rows, WIDTH, **options)).bfloat16()
    sources = [
        (base + 4e-4 * torch.randn(rows, WIDTH, **options).bfloat16()) for _ in range(models)
    ]
    return Problem(sources, base, torch.empty_like(base))


def linear(p: Problem, impl: str = "auto") -> None:
    soup_(p.plain, 1.0 / len(p.sources), impl=impl)


def task_arithmetic(p: Problem, impl: str = "auto") -> None:
    soup_(p.part, 0.3, impl=impl)


def stochastic(p: Problem, impl: str = "auto") -> None:
    soup_(p.plain, 1.0 / len(p.sources), rounding="stochastic", impl=impl)


def ties(p: Problem, impl: str = "auto") -> None:
    cut = surveyed(p, p.base.numel() // 5, impl=impl)
    merge_(p.part, TIES, mask=Mask(keep=cut), impl=impl)


def surveyed(p: Problem, keep: int, impl: str, quantity: str = "delta"):
    magnitudes = Magnitudes(len(p.sources), quantity=quantity, impl=impl)
    magnitudes.find(p.part, keep)
    return magnitudes.cut()


def dare(p: Problem, impl: str = "auto") -> None:
    merge_(p.part, Rule(), 0.3, mask=Mask(density=0.1), divide=0.1, impl=impl)


def sce(p: Problem, impl: str = "auto") -> None:
    cut = surveyed(p, p.base.numel() // 5, impl=impl, quantity="variance")
    norms = Norms(len(p.sources), impl=impl)
    norms.add(p.part, mask=Mask(keep=cut))
    energy = norms.value[0, :, 1, 1].cpu()
    rule = Rule("sum", weighted=False, combine="weighted_mean")
    merge_(p.part, rule, energy / energy.sum(), impl=impl)


def della(p: Problem, impl: str = "auto") -> None:
    merge_(p.part, TIES, mask=RowMask(density=0.5, epsilon=0.1, rescale=True), impl=impl)


def gram(p: Problem, impl: str = "auto") -> None:
    running = Gram(len(p.sources), impl=impl)
    running.add(p.part)
    p.out.view(-1)[: len(p.sources)] = running.value[0, 0].to(p.out)


def mutate(p: Problem, impl: str = "auto") -> None:
    mutate_([Part([p.base], None, p.out, "w")], 0.1, 0.01, impl=impl)


def crossover(p: Problem, impl: str = "auto") -> None:
    crossover_(p.plain, 1.0, impl=impl)


def eager_linear(p: Problem) -> None:
    p.out.copy_(torch.stack(p.sources).mean(0))


def eager_task_arithmetic(p: Problem) -> None:
    p.out.copy_(p.base + 0.3 * torch.stack([x - p.base for x in p.sources]).sum(0))


def eager_dare(p: Problem) -> None:
    kept = [(x - p.base) * (torch.rand_like(x) < 0.1) / 0.1 for x in p.sources]
    p.out.copy_(p.base + 0.3 * torch.stack(kept).sum(0))


def eager_ties(p: Problem) -> None:
    keep = p.base.numel() // 5
    deltas = torch.stack([(x - p.base).view(-1) for x in p.sources])
    for delta in deltas:
        small = delta.abs().float().topk(keep).indices
        delta.copy_(torch.zeros_like(delta).index_copy(0, small, delta[small]))
    sign = torch.where(deltas.sum(0) >= 0, 1.0, -1.0)
    agree = deltas.sign() == sign
    merged = (deltas * agree).sum(0) / agree.sum(0).clamp(min=1)
    p.out.copy_(p.base + merged.view_as(p.base))


@dataclass(frozen=True)
class Subject:
    """An op: bytes per element of M models that it reads and writes, and eager torch's way."""

    call: Callable[..., None]
    bytes: Callable[[int], int]
    eager: Callable[[Problem], None] | None = None


# As in the table of docs/kernels/souping.md: 2 bytes for each reading of a source or the base.
SUBJECTS = {
    "linear": Subject(linear, lambda m: 2 * m + 2, eager_linear),
    "linear, stochastic": Subject(stochastic, lambda m: 2 * m + 2),
    "task_arithmetic": Subject(task_arithmetic, lambda m: 2 * (m + 1) + 2, eager_task_arithmetic),
    "dare": Subject(dare, lambda m: 2 * (m + 1) + 2, eager_dare),
    "ties": Subject(ties, lambda m: 4 * (m + 1) + 2, eager_ties),  # bf16: one survey settles
    "sce": Subject(sce, lambda m: 8 * (m + 1) + 2),
    "della": Subject(della, lambda m: 2 * (m + 1) + 2),
    "gram": Subject(gram, lambda m: 2 * (m + 1)),
    "mutate": Subject(mutate, lambda m: 4),
    "crossover": Subject(crossover, lambda m: 2 * m + 2),
}


def wrong(subject: Subject, device: str) -> str:
    """What is wrong with an op on a small problem, nothing if it is right."""
    small = problem(20, 3, device)
    subject.call(small)
    found = small.out.double()
    subject.call(small, impl="reference")
    step = found.abs().clamp(min=1e-3) * 2.0**-7
    far = ((found - small.out.double()).abs() > step).double().mean()
    return f"{float(far):.1%} of the elements differ" if far > 1e-3 else ""


def remap(device: str) -> dict[str, object]:
    """Two embeddings of 256k rows brought to one vocabulary."""
    rows = VOCABULARY
    tables = [torch.ones(rows, WIDTH, dtype=torch.bfloat16, device=device) for _ in range(2)]
    g = torch.Generator().manual_seed(1)
    index = torch.stack([torch.randperm(rows, generator=g) for _ in tables], 1)
    index[torch.rand(rows, 2, generator=g) < 0.1] = -1
    index, out = index.to(device), torch.empty_like(tables[0])
    gather_rows_(out, tables, index)
    time = measure_of(device)
    done = time(lambda mark: gather_rows_(out, tables, index))
    met = "pass" if done.cpu < REMAP_SECONDS else "MISS"
    bars = f"{done.cpu:.2f} < {REMAP_SECONDS:g} CPU s {met}" if device == "cpu" else ""
    taken = int((index >= 0).sum())
    return {
        "name": "gather_rows",
        "seconds": done.total,
        "rate": 2 * WIDTH * (taken + rows) / done.total / 1e9,
        "cpu": done.cpu,
        "note": f"{rows} rows of {WIDTH}, two tables",
        "bars": bars,
    }


def rows_of(options: argparse.Namespace) -> list[dict[str, object]]:
    p = problem(max(options.parameters // WIDTH, 1), options.models, options.device)
    elements = p.base.numel()
    chosen = {name: SUBJECTS[name] for name in options.op or SUBJECTS}
    notes = {name: wrong(subject, options.device) for name, subject in chosen.items()}
    copied = {}
    steps: dict[str, Callable] = {}
    for name, subject in chosen.items():
        if notes[name]:
            continue
        size = subject.bytes(options.models) * elements // 2
        if size not in copied:
            copied[size] = f"copy {size}"
            source = torch.ones(size, dtype=torch.uint8, device=options.device)
            target = torch.empty_like(source)
            steps[copied[size]] = lambda mark, a=source, b=target: b.copy_(a)
        steps[name] = lambda mark, call=subject.call: call(p)
        if subject.eager and options.peers:
            steps[f"eager {name}"] = lambda mark, call=subject.eager: call(p)
    timings = interleave(steps, seconds=options.seconds, measure=measure_of(options.device))
    found = []
    for name, subject in chosen.items():
        row = {
            "name": name,
            "bytes": subject.bytes(options.models),
            "note": notes[name],
            "bars": "",
        }
        if not notes[name]:
            mine = timings[name]
            size = subject.bytes(options.models) * elements
            share = paired_ratio(timings[copied[size // 2]], mine)
            eager = timings.get(f"eager {name}")
            row |= {
                "seconds": mine.total,
                "spread": mine.spread,
                "rate": size / mine.total / 1e9,
                "of_copy": share,
                "x_eager": paired_ratio(mine, eager) ** -1 if eager else None,
                "cpu": mine.cpu,
            }
            if name in BARS:
                met = "pass" if share >= BARS[name] else "MISS"
                row["bars"] = f"{share:.0%} >= {BARS[name]:.0%} of a copy {met}"
        found.append(row)
    return found


def parse_options() -> argparse.Namespace:
    parser = parser_of(__doc__, device="cpu", threads=torch.get_num_threads(), seconds=60.0)
    parser.add_argument("--parameters", type=int, default=64_000_000, help="elements of each model")
    parser.add_argument("--models", type=int, default=3)
    parser.add_argument("--op", nargs="+", choices=tuple(SUBJECTS), help="some of the ops")
    parser.add_argument("--no-peers", dest="peers", action="store_false")
    parser.add_argument("--no-remap", dest="remap", action="store_false")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    facts = report.machine(options.device)
    print(report.header(facts), flush=True)
    rows = rows_of(options)
    if options.remap:
        rows.append(remap(options.device))
    print(report.table_and_bars(rows, COLUMNS))
    case = {
        "models": options.models,
        "parameters": options.parameters,
        "threads": options.threads,
    }
    if options.save:
        order = [*SUBJECTS, "gather_rows"]
        layout = report.Layout(
            title="Merging resident weights",
            about=f"`python benchmarks/bench_souping.py --device {options.device} --save`",
            case=tuple(case),
            label=lambda row: (
                f"{row['models']} models of {row['parameters']} bfloat16 parameters, "
                f"{row['threads']} threads"
            ),
            columns=COLUMNS,
            place=order.index,
        )
        folder = HERE / "results" / facts["device"]
        report.save(folder, "souping", [{**row, **case} for row in rows], facts, layout)
    sys.exit(any(row["note"] and row["name"] in SUBJECTS for row in rows))


if __name__ == "__main__":
    main()
