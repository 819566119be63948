"""Divergence of a student's head from a teacher's, forward and backward, beside its peers.

    python benchmarks/bench_divergence.py
    python benchmarks/bench_divergence.py --kind jsd --dtype bf16 --shape 2048,2304,32768
    python benchmarks/bench_divergence.py --device cuda --save

Every subject runs in a process of its own first: its loss and the gradients of 64 rows of hidden
states against float64, and its peak memory; one that is wrong has no time. The others are then
timed in turn in one process. The student is the teacher with a tenth of noise in its hidden states.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import gemma_ext
from gemma_ext.bench import report
from gemma_ext.bench.ceilings import measure_ceilings
from gemma_ext.bench.data import DATA_KINDS, head_data
from gemma_ext.bench.options import parser_of, shape_of
from gemma_ext.bench.subject import DTYPES
from gemma_ext.bench.timing import (
    interleave,
    measure_of,
    memory_environment,
    memory_of,
    paired_ratio,
)
from gemma_ext.ops.cce.divergence import KINDS
from gemma_ext.reference.cce_divergence import divergence

HERE = Path(__file__).parent
ROWS = 64  # whose gradient is checked
CHUNK = 512
COLUMNS = {
    "name": ("subject", ""),
    "forward": ("fwd ms", ".0fms"),
    "seconds": ("fwd+bwd ms", ".0fms"),
    "spread": ("spread", ".0%"),
    "of_gemm": ("of eager's products", ".0%"),
    "peak": ("peak less gradients MB", ".0f"),
    "x_eager": ("x eager", ".2f"),
    "kept": ("kept", ".1%"),
    "error": ("dE err", ".1e"),
    "note": ("note", ""),
}


@dataclass(frozen=True)
class Problem:
    """e [N, D] and c [V, D] of the student, the teacher's alike, in the dtype that is measured."""

    e: Tensor
    c: Tensor
    teacher_e: Tensor
    teacher_c: Tensor
    kind: str
    softcap: float | None

    def capped(self, logits: Tensor) -> Tensor:
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def logits(self) -> tuple[Tensor, Tensor]:
        """What a model returns: in the dtype of its head."""
        with torch.no_grad():
            teacher = self.capped(F.linear(self.teacher_e, self.teacher_c))
        return self.capped(F.linear(self.e, self.c)), teacher

    def wide(self, rows: slice, dtype: torch.dtype) -> Problem:
        heads = (self.e[rows], self.c, self.teacher_e[rows], self.teacher_c)
        return Problem(*(x.detach().to(dtype) for x in heads), self.kind, self.softcap)


def problem(options: argparse.Namespace) -> Problem:
    n, d, v = options.shape
    cap = options.softcap or None
    data = head_data(options.data, n, d, v, softcap=cap or 30.0, device=options.device)
    g = torch.Generator(options.device).manual_seed(5)
    noise = torch.empty_like(data.e).normal_(generator=g)
    noise *= 0.1 * data.e.norm(dim=1, keepdim=True) / d**0.5
    dtype = DTYPES[options.dtype]
    mine = [x.to(dtype).requires_grad_() for x in (data.e + noise, data.c)]
    return Problem(*mine, data.e.to(dtype), data.c.to(dtype), options.kind, cap)


def eager(p: Problem) -> Tensor:
    s, t = p.logits()
    return divergence(s.float(), t.float(), p.kind).mean()


def chunked(p: Problem) -> Tensor:
    def part(e: Tensor, c: Tensor, teacher_e: Tensor) -> Tensor:
        chunk = Problem(e, c, teacher_e, p.teacher_c, p.kind, p.softcap)
        s, t = chunk.logits()
        return divergence(s.float(), t.float(), p.kind).sum()

    total = torch.zeros((), device=p.e.device)
    for first in range(0, len(p.e), CHUNK):
        rows = slice(first, first + CHUNK)
        total = total + checkpoint(part, p.e[rows], p.c, p.teacher_e[rows], use_reentrant=False)
    return total / len(p.e)


def trl(p: Problem) -> Tensor:
    from trl.experimental.gkd import GKDTrainer

    beta = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}[p.kind]
    s, t = p.logits()
    labels = torch.zeros(s.shape[:-1], dtype=torch.long, device=s.device)
    return GKDTrainer.generalized_jsd_loss(s.float(), t.float(), labels, beta=beta)


def liger(p: Problem) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    beta = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}[p.kind]
    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta)
    labels = torch.zeros(len(p.e), dtype=torch.long, device=p.e.device)
    return loss(p.e, p.c, p.teacher_e, p.teacher_c, labels)


def ours(impl: str) -> Callable[[Problem], Any]:
    return lambda p: gemma_ext.linear_divergence(
        p.e, p.c, p.teacher_e, p.teacher_c, kind=p.kind, softcap=p.softcap, impl=impl,
        return_parts=True,
    )  # fmt: skip


SUBJECTS = {
    "eager": eager,
    "chunks of 512, recomputed": chunked,
    "trl": trl,
    "liger": liger,
    "exact": ours("exact"),
    "auto": ours("auto"),
}


def refusal(name: str, options: argparse.Namespace) -> str:
    package = {"trl": "trl", "liger": "liger_kernel"}.get(name)
    if package and find_spec(package) is None:
        return f"{package} is not installed"
    if package and options.kind == "tvd":
        return f"{name} has no tvd"
    if name == "liger" and options.softcap:
        return "liger has no softcap: --softcap 0"
    return ""


def check(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Errors and peak memory of one step; in a process of its own."""
    p = problem(options)
    with torch.no_grad():
        want = sum(
            divergence(*p.wide(slice(i, i + CHUNK), torch.float32).logits(), p.kind).sum()
            for i in range(0, len(p.e), CHUNK)
        ) / len(p.e)
    with memory_of(options.device) as watched:
        out = SUBJECTS[name](p)
        loss = out if isinstance(out, Tensor) else out.loss
        loss.backward()
        peak = watched.peak()
    exact = p.wide(slice(0, ROWS), torch.float64)
    exact.e.requires_grad_()
    truth = divergence(*exact.logits(), p.kind).sum() / len(p.e)
    (grad,) = torch.autograd.grad(truth, exact.e)
    gradients = sum(x.grad.numel() * x.grad.element_size() for x in (p.e, p.c))
    return {
        "loss_error": float((loss.detach().float() - want).abs() / want),
        "error": float((p.e.grad[:ROWS].double() - grad).norm() / grad.norm()),
        "peak": (peak - gradients) / 1e6,
        "kept": None if isinstance(out, Tensor) else out.stats.kept_fraction,
    }


def checked(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """What `check` found, with a note where the subject is refused, failed or is wrong."""
    if note := refusal(name, options):
        return {"note": note}
    done = subprocess.run(
        [sys.executable, __file__, *sys.argv[1:], "--one", name],
        env={**os.environ, **memory_environment()},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return {"note": f"failed: {lines[-1]}"}
    found = json.loads(done.stdout.splitlines()[-1])
    # eager logits in 16 bits are off by 2^-9 of their size, and a divergence by more
    limit = {"fp32": 1e-3, "fp16": 0.1, "bf16": 0.5}[options.dtype]
    wrong = [key for key in ("loss_error", "error") if not found[key] < limit]
    found["note"] = ", ".join(f"RED: {key} {found[key]:.1e}" for key in wrong)
    return found


def rows_of(options: argparse.Namespace) -> list[dict[str, Any]]:
    names = options.impl or list(SUBJECTS)
    found = {name: checked(name, options) for name in names}
    p = problem(options)

    def step(name: str) -> Callable:
        def run(mark: Callable[[], None]) -> None:
            p.e.grad = p.c.grad = None
            out = SUBJECTS[name](p)
            mark()
            (out if isinstance(out, Tensor) else out.loss).backward()

        return run

    timings = interleave(
        {name: step(name) for name in names if not found[name]["note"]},
        seconds=options.seconds,
        measure=measure_of(options.device),
    )
    gemm = measure_ceilings(options.device).gemm * 1e9
    n, d, v = options.shape
    rows = []
    for name in names:
        row = {"name": name, **found[name]}
        if name in timings:
            mine = timings[name]
            row |= {
                "forward": mine.forward,
                "seconds": mine.total,
                "spread": mine.spread,
                "of_gemm": 8.0 * n * d * v / gemm / mine.total,
                "x_eager": paired_ratio(timings["eager"], mine) if "eager" in timings else None,
            }
        rows.append({key: row.get(key) for key in COLUMNS} | {"bars": ""})
    return rows


def parse_options() -> argparse.Namespace:
    parser = parser_of(
        __doc__, device="cpu", dtype="bf16", threads=torch.get_num_threads(), seconds=60.0
    )
    parser.add_argument(
        "--shape",
        type=shape_of,
        default=(2048, 2304, 32768),
        metavar="N,D,V",
    )
    parser.add_argument("--kind", default="forward_kl", choices=KINDS)
    parser.add_argument("--data", default="plaw-2.5", choices=DATA_KINDS)
    parser.add_argument("--softcap", type=float, default=30.0, help="0: none")
    parser.add_argument("--impl", nargs="+", choices=tuple(SUBJECTS))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    if options.one:
        print(json.dumps(check(options.one, options)))
        return
    facts = report.machine(options.device)
    print(report.header(facts), flush=True)
    rows = rows_of(options)
    print(report.table_and_bars(rows, COLUMNS))
    if options.save:
        n, d, v = options.shape
        case = {"n": n, "d": d, "v": v, "threads": options.threads}
        case |= {name: getattr(options, name) for name in ("kind", "dtype", "data", "softcap")}
        layout = report.Layout(
            title="Divergence of two heads: forward and backward",
            about=f"`python benchmarks/bench_divergence.py --device {options.device} --save`",
            case=tuple(case),
            label=lambda row: (
                "{kind} N={n} D={d} V={v} {dtype} {data} softcap {softcap:g}, {threads} threads"
            ).format_map(row),
            columns=COLUMNS,
            place=list(SUBJECTS).index,
        )
        folder = HERE / "results" / facts["device"]
        report.save(folder, "divergence", [{**row, **case} for row in rows], facts, layout)
    sys.exit(any("RED" in row["note"] for row in rows))


if __name__ == "__main__":
    main()
