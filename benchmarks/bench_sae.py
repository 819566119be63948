"""Encoders and training steps of sparse dictionaries, beside the bare product and other libraries.

    python benchmarks/bench_sae.py
    python benchmarks/bench_sae.py --features 16384 --dtype bf16 --part encode
    python benchmarks/bench_sae.py --tokens 8192 --features 1048576 --dtype bf16 --part encode
    python benchmarks/bench_sae.py --device cuda --part encode --save

encode: `F.linear` is the product alone; `F.linear, relu, topk` holds its result. An encoder is
first checked on a small problem against the formulas. step: encode, decode, loss, backward,
unit-norm constraint, without an optimizer; a step whose loss or gradient differs from eager
torch's has no time. Peers run where they are installed beside gemma_ext: sae-lens,
dictionary-learning, eai-sparsify. Peaks are of a process each that runs a subject once.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from sae_steps import STEPS, Batch
from torch import Tensor
from torch.nn import functional

from gemma_ext.bench import report
from gemma_ext.bench.options import parser_of
from gemma_ext.bench.subject import DTYPES
from gemma_ext.bench.timing import (
    Timing,
    interleave,
    measure_of,
    memory_environment,
    memory_of,
    paired_ratio,
    total_memory,
)
from gemma_ext.ops.sae import (
    Codes,
    encode_batch_topk,
    encode_group_max,
    encode_threshold,
    encode_topk,
)

HERE = Path(__file__).parent
LINEAR, EAGER = "F.linear", "F.linear, relu, topk"
AUX = 512
BARS = {"of_linear": 1.25, "step": 3.0, "peak": 16 << 30}
PARTS = ("encode", "step")
COLUMNS = {
    "encode": {
        "name": ("op", ""),
        "seconds": ("ms", ".1fms"),
        "spread": ("spread", ".0%"),
        "rate": ("GFLOP/s", ".0f"),
        "of_linear": ("x F.linear's time", ".2f"),
        "x_eager": ("x eager", ".2f"),
        "cpu": ("CPU s", ".2f"),
        "peak_mb": ("peak MB", ".0f"),
        "note": ("note", ""),
    },
    "step": {
        "name": ("step", ""),
        "seconds": ("ms", ".0fms"),
        "spread": ("spread", ".0%"),
        "x_ours": ("ours is x faster", ".2f"),
        "cpu": ("CPU s", ".1f"),
        "peak_mb": ("peak MB", ".0f"),
        "note": ("note", ""),
    },
}


def batch(tokens: int, features: int, width: int, k: int, dtype: torch.dtype, device: str) -> Batch:
    """Sums of 32 rows of the dictionary with exponential weights, and noise."""
    g = torch.Generator(device).manual_seed(0)
    options = {"generator": g, "device": device}
    weight = torch.empty(features, width, dtype=dtype, device=device)
    for rows in weight.split(1 << 14):  # in float32 a dictionary of a million rows is too large
        rows.copy_(functional.normalize(torch.randn(rows.shape, **options), dim=-1))
    x = 0.1 * torch.randn(tokens, width, **options)
    for _ in range(32):
        chosen = torch.randint(0, features, (tokens,), **options)
        amounts = torch.empty(tokens, 1, device=device).exponential_(generator=g)
        x += amounts * weight[chosen]
    return Batch(x.to(dtype), weight, k)


def encoders(b: Batch, threshold: float) -> dict[str, Callable[..., Tensor | Codes]]:
    """Every subject; ours take `impl`."""
    x, weight, k = b.x, b.weight, b.k
    mask = torch.arange(len(weight), device=x.device) % 8 == 0
    groups = next(g for g in (k, 32, 16, 8, 4, 2, 1) if len(weight) % g == 0)
    total = k * len(x)

    def aux(**o: str) -> Codes:
        return encode_topk(x, weight, k=k, aux=(mask, min(AUX, len(weight))), **o).codes

    return {
        LINEAR: lambda: functional.linear(x, weight),
        EAGER: lambda: torch.relu(functional.linear(x, weight)).topk(k, dim=-1).values,
        "encode_topk": lambda **o: encode_topk(x, weight, k=k, **o).codes,
        "encode_topk, aux": aux,
        "encode_batch_topk": lambda **o: encode_batch_topk(x, weight, total=total, **o).codes,
        "encode_threshold": lambda **o: encode_threshold(x, weight, threshold=threshold, **o).codes,
        "encode_group_max": lambda **o: encode_group_max(x, weight, groups=groups, **o),
    }


def wrong_encoder(name: str, dtype: torch.dtype, device: str) -> str:
    """What is wrong on a small problem of whole numbers, whose products are exact."""
    g = torch.Generator().manual_seed(1)
    x, weight = (torch.randint(-3, 4, shape, generator=g) for shape in ((40, 33), (600, 33)))
    small = Batch(x.to(device, dtype), weight.to(device, dtype), 7)
    call = encoders(small, 20.0)[name]
    got, want = call(), call(impl="reference")
    if not torch.equal(got.indices, want.indices) or not torch.equal(got.values, want.values):
        return "RED: other entries than the formulas choose"
    return ""


def encode_rows(options: argparse.Namespace, b: Batch) -> list[dict[str, object]]:
    threshold = level_of(b)
    subjects = encoders(b, threshold)
    notes = dict.fromkeys(subjects, "")
    for name in subjects:
        if name.startswith("encode"):
            notes[name] = wrong_encoder(name, b.x.dtype, options.device)
    dense = 4 * len(b.x) * len(b.weight)
    if dense > 0.4 * total_memory(options.device):
        notes[LINEAR] = notes[EAGER] = f"not run: [N, F] takes {dense / 1e9:.0f} GB"
    steps = {
        name: lambda mark, call=call: call() for name, call in subjects.items() if not notes[name]
    }
    timings = timed(options, steps)
    flops = 2 * len(b.x) * b.weight.numel()
    rows = []
    for name in subjects:
        row = blank(name, notes[name])
        if own := timings.get(name):
            row |= times(own) | {"rate": flops / own.total / 1e9}
            row["peak_mb"] = peak_of(options, "encode", name)
            if LINEAR in timings:
                row["of_linear"] = 1 / paired_ratio(timings[LINEAR], own)
                row["x_eager"] = paired_ratio(timings[EAGER], own)
        if name == "encode_topk":
            row["bars"] = "; ".join(encode_bars(row))
        rows.append(row)
    return rows


def level_of(b: Batch) -> float:
    """What about k features of a token exceed, from its first tokens."""
    some = functional.linear(b.x[:64], b.weight).float()
    return float(some.flatten().topk(b.k * len(some)).values[-1])


def encode_bars(row: Mapping[str, object]) -> list[str]:
    found = []
    if row["of_linear"]:
        met = "pass" if row["of_linear"] <= BARS["of_linear"] else "MISS"
        found.append(f"{row['of_linear']:.2f} <= {BARS['of_linear']} of F.linear {met}")
    if row["peak_mb"]:
        met = "pass" if row["peak_mb"] < BARS["peak"] / 1e6 else "MISS"
        found.append(f"{row['peak_mb'] / 1e3:.1f} GB < 16 GiB {met}")
    return found


def step_rows(options: argparse.Namespace, b: Batch) -> list[dict[str, object]]:
    notes, made = dict.fromkeys(STEPS, ""), {}
    truth = None
    for name in sorted(STEPS, key=lambda n: n != "eager"):
        try:
            step = STEPS[name](b)
            step.run()
            found = (step.loss(), step.gradient().float())
        except ImportError as error:
            notes[name] = f"not installed: {error.name or error}"
            continue
        except Exception as error:  # a peer's own failure is a row with the reason
            notes[name] = f"failed: {type(error).__name__}: {str(error).splitlines()[0][:100]}"
            continue
        truth = found if truth is None else truth
        notes[name] = wrong_step(*truth, *found, b.x.dtype)
        if not notes[name]:
            made[name] = lambda mark, run=step.run: run()
    timings = timed(options, {name: made[name] for name in STEPS if name in made})
    rows = []
    for name in STEPS:
        row = blank(name, notes[name])
        if own := timings.get(name):
            row |= times(own) | {"peak_mb": peak_of(options, "step", name)}
            if name != "gemma_ext" and "gemma_ext" in timings:
                row["x_ours"] = paired_ratio(own, timings["gemma_ext"])
                if name in ("sae-lens", "dictionary-learning"):
                    met = "pass" if row["x_ours"] >= BARS["step"] else "MISS"
                    row["bars"] = f"ours {row['x_ours']:.2f} >= {BARS['step']:.0f} x faster {met}"
        rows.append(row)
    return rows


def wrong_step(
    loss: float, gradient: Tensor, own_loss: float, own: Tensor, dtype: torch.dtype
) -> str:
    """Losses agree, and gradients up to the factor of a loss's own units."""
    limit = 1e-3 if dtype == torch.float32 else 2e-2
    if not abs(own_loss - loss) <= limit * loss:
        return f"RED: mean square {own_loss:.5g}, eager {loss:.5g}"
    a, b = gradient.flatten(), own.flatten()
    gap = 1 - float(a.dot(b) / (a.norm() * b.norm()))
    return "" if gap <= limit else f"RED: 1 - cosine of the encoder's gradient {gap:.1e}"


def timed(options: argparse.Namespace, steps: Mapping[str, Callable]) -> dict[str, Timing]:
    return interleave(
        steps,
        seconds=options.seconds,
        least=options.rounds,
        measure=measure_of(options.device),
    )


def blank(name: str, note: str) -> dict[str, object]:
    names = {key for columns in COLUMNS.values() for key in columns}
    return dict.fromkeys(sorted(names)) | {"name": name, "note": note, "bars": ""}


def times(t: Timing) -> dict[str, float]:
    return {"seconds": t.total, "spread": t.spread, "cpu": t.cpu}


def peak_of(options: argparse.Namespace, part: str, name: str) -> float | None:
    """MB above the inputs in a process of its own."""
    if not options.peaks:
        return None
    given = [x for x in sys.argv[1:] if x != "--save"]
    command = [sys.executable, __file__, *given, "--part", part, "--peak", name]
    environment = {**os.environ, **(memory_environment() if options.device == "cpu" else {})}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1]) / 1e6 if done.returncode == 0 else None


def print_peak(options: argparse.Namespace, b: Batch) -> None:
    if options.part == ["step"]:
        run = STEPS[options.peak](b).run
    else:
        run = encoders(b, level_of(b))[options.peak]
    with memory_of(options.device) as memory:
        run()
        print(memory.peak())


def parse_options() -> argparse.Namespace:
    parser = parser_of(
        __doc__, device="cpu", dtype="fp32", threads=torch.get_num_threads(), seconds=60.0, rounds=3
    )
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--features", type=int, default=65536)
    parser.add_argument("--width", type=int, default=2304)
    parser.add_argument("--active", type=int, default=64, help="entries of a token")
    parser.add_argument("--no-peaks", dest="peaks", action="store_false")
    parser.add_argument("--peak", help="print the peak of one subject in bytes")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    dtype = DTYPES[options.dtype]
    b = batch(
        options.tokens, options.features, options.width, options.active, dtype, options.device
    )
    if options.peak:
        return print_peak(options, b)
    facts = report.machine(options.device)
    print(report.header(facts), flush=True)
    keys = ("tokens", "active", "features", "width", "dtype", "threads")
    case = {key: getattr(options, key) for key in keys}
    red = False
    for part in options.part:
        rows = (encode_rows if part == "encode" else step_rows)(options, b)
        print(f"\n{report.table_and_bars(rows, COLUMNS[part])}", flush=True)
        red |= any(row["note"].startswith("RED") for row in rows)
        if options.save:
            folder = HERE / "results" / facts["device"]
            saved = [{**row, **case} for row in rows]
            report.save(folder, f"sae_{part}", saved, facts, layout(part, options.device))
    sys.exit(red)


def layout(part: str, device: str) -> report.Layout:
    names = (
        list(STEPS)
        if part == "step"
        else list(encoders(batch(1, 8, 1, 1, torch.float32, "cpu"), 0))
    )
    title = {"encode": "Encoders of sparse dictionaries", "step": "Training steps of a dictionary"}
    return report.Layout(
        title=title[part],
        about=f"`python benchmarks/bench_sae.py --part {part} --device {device} --save`",
        case=("tokens", "active", "features", "width", "dtype", "threads"),
        label=lambda row: (
            f"N={row['tokens']} K={row['active']} F={row['features']} D={row['width']} "
            f"{row['dtype']}, {row['threads']} threads"
        ),
        columns=COLUMNS[part],
        place=names.index,
    )


if __name__ == "__main__":
    main()
