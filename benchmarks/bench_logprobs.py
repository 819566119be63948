"""Log-probabilities and entropy of a policy, forward and backward, beside trl's chunked function.

    python benchmarks/bench_logprobs.py
    python benchmarks/bench_logprobs.py --head frozen --idle 0.5
    python benchmarks/bench_logprobs.py --model FOLDER      # its head, on this documentation
    python benchmarks/bench_logprobs.py --device cuda --save

Every subject takes the same hidden states, head, targets and upstream gradients, of which a share
`--idle` of the rows has none, as clipped tokens and groups without an advantage have. Targets are
drawn from the policy. A subject runs in a process of its own first: its log-probabilities and
entropies and the gradients of 64 rows of hidden states against float64, and its peak memory; one
that is wrong has no time. The others are then timed in turn in one process.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gemma_ext
from gemma_ext.bench import report
from gemma_ext.bench.ceilings import measure_ceilings
from gemma_ext.bench.data import DATA_KINDS, head_data
from gemma_ext.bench.options import parser_of
from gemma_ext.bench.subject import DTYPES
from gemma_ext.bench.timing import (
    interleave,
    measure_of,
    memory_environment,
    memory_of,
    paired_ratio,
)

HERE = Path(__file__).parent
HEADS = ("full", "frozen")
BARS = {"cpu": 2.0, "cuda": 1.5}
ROWS, CHUNK = 64, 512
COLUMNS = {
    "name": ("subject", ""),
    "forward": ("fwd ms", ".0fms"),
    "seconds": ("fwd+bwd ms", ".0fms"),
    "spread": ("spread", ".0%"),
    "of_gemm": ("of the products", ".0%"),
    "peak": ("peak less gradients MB", ".0f"),
    "x_forward": ("fwd x trl", ".2f"),
    "x_trl": ("fwd+bwd x trl", ".2f"),
    "logp_error": ("log p err", ".1e"),
    "entropy_error": ("entropy err", ".1e"),
    "error": ("dE err", ".1e"),
    "note": ("note", ""),
}


@dataclass(frozen=True)
class Problem:
    """e [N, D], c [V, D], targets [N]; upstream gradients of log-probability and entropy [N]."""

    e: Tensor
    c: Tensor
    targets: Tensor
    upstream: tuple[Tensor, Tensor]
    softcap: float | None
    temperature: float

    def logits(self, rows: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Hidden states of `rows`, a leaf, and their logits."""
        e = self.e[rows].detach().to(dtype).requires_grad_()
        s = e @ self.c.detach().to(dtype).T
        s = s if self.softcap is None else self.softcap * torch.tanh(s / self.softcap)
        return e, s / self.temperature

    def objective(self, out: tuple[Tensor, Tensor]) -> Tensor:
        return sum((u * x).sum() for u, x in zip(self.upstream, out[:2], strict=True))


@torch.no_grad()
def of_model(options: argparse.Namespace) -> tuple[Tensor, Tensor, float | None]:
    """Hidden states [N, D] of a causal LM on the documentation, its head and its soft-cap."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=DTYPES[options.dtype]).eval()
    text = "\n".join(path.read_text() for path in sorted((HERE.parent / "docs").rglob("*.md")))
    n = options.shape[0]
    ids = torch.tensor(tokenizer(text)["input_ids"][:n])
    if len(ids) < n:
        raise ValueError(f"expected N to be at most {len(ids)} with --model, got {n}")
    parts = [model.base_model(part[None]).last_hidden_state[0] for part in ids.split(CHUNK)]
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    e, c = torch.cat(parts), model.get_output_embeddings().weight
    return e.to(options.device), c.detach().to(options.device), cap


def data_of(options: argparse.Namespace) -> tuple[Tensor, Tensor, float | None]:
    if options.model:
        return of_model(options)
    cap = options.softcap or None
    data = head_data(options.data, *options.shape, softcap=cap or 30.0, device=options.device)
    dtype = DTYPES[options.dtype]
    return data.e.to(dtype), data.c.to(dtype), cap


def problem(options: argparse.Namespace) -> Problem:
    e, c, cap = data_of(options)
    e, n = e.requires_grad_(), len(e)
    g = torch.Generator(options.device).manual_seed(5)
    u, h = torch.empty(2, n, device=options.device).normal_(generator=g) / n
    idle = torch.empty(n, device=options.device).uniform_(generator=g) < options.idle
    upstream = (u.masked_fill(idle, 0.0), (0.01 * h).masked_fill(idle, 0.0))
    c = c.requires_grad_(options.head == "full")
    p = Problem(e, c, idle.long(), upstream, cap, options.temperature)
    targets = torch.cat([drawn(p, first) for first in range(0, n, CHUNK)])
    return Problem(e, c, targets, upstream, cap, options.temperature)


@torch.no_grad()
def drawn(p: Problem, first: int) -> Tensor:
    g = torch.Generator(p.e.device).manual_seed(first)
    _, s = p.logits(slice(first, first + CHUNK), torch.float32)
    # by Gumbel: multinomial takes no more than 2^24 columns
    noise = torch.empty_like(s).exponential_(generator=g).log_()
    return (s - noise).argmax(-1)


def trl(p: Problem) -> tuple[Tensor, Tensor]:
    from trl.kernels import ChunkedLogProbFunction

    return ChunkedLogProbFunction.apply(
        p.e, p.c, None, p.targets, p.temperature, 32768, p.softcap, 1.0, ("entropy",)
    )[:2]


def ours(impl: str) -> Callable[[Problem], tuple[Tensor, Tensor]]:
    return lambda p: gemma_ext.linear_logprobs(
        p.e, p.c, p.targets, softcap=p.softcap, temperature=p.temperature, impl=impl
    )


def in_place_of_trl(p: Problem) -> tuple[Tensor, Tensor]:
    from gemma_ext.integrations.trl import ChunkedLogProbFunction

    return ChunkedLogProbFunction.apply(
        p.e, p.c, None, p.targets, p.temperature, 32768, p.softcap, 1.0, ("entropy",)
    )[:2]


SUBJECTS = {
    "trl": trl,
    "exact": ours("exact"),
    "auto": ours("auto"),
    "auto, in place of trl": in_place_of_trl,
}
OURS = tuple(SUBJECTS)[1:]


def check(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Errors and peak memory of one step; in a process of its own."""
    p = problem(options)
    if "trl" in name:  # not its import
        importlib.import_module("trl.kernels" if name == "trl" else "gemma_ext.integrations.trl")
    with memory_of(options.device) as watched:
        out = SUBJECTS[name](p)
        p.objective(out).backward()
        peak = watched.peak()
    rows = slice(0, ROWS)
    e, s = p.logits(rows, torch.float64)
    log_p = torch.log_softmax(s, -1)
    mine = log_p.gather(1, p.targets[rows, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    u, h = (x[rows].double() for x in p.upstream)
    (grad,) = torch.autograd.grad((u * mine + h * entropy).sum(), e)
    found = p.e.grad[rows].double()
    grads = [x.grad for x in (p.e, p.c) if x.grad is not None]
    return {
        "logp_error": float((out[0].detach()[rows].double() - mine).abs().mean()),
        "entropy_error": float((out[1].detach()[rows].double() - entropy).abs().mean()),
        "error": float((found - grad).norm() / grad.norm().clamp(min=1e-300)),
        "peak": (peak - sum(x.numel() * x.element_size() for x in grads)) / 1e6,
    }


def checked(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """What `check` found, with a note where the subject failed or is wrong."""
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
    # logits that were rounded to 16 bits are off by 2^-9 of their size, up to 0.06 of 30
    limits = {"fp32": (1e-3, 1e-3, 1e-3), "bf16": (0.1, 0.1, 0.1)}[options.dtype]
    names = ("logp_error", "entropy_error", "error")
    wrong = [key for key, limit in zip(names, limits, strict=True) if not found[key] < limit]
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
            p.objective(out).backward()

        return run

    timings = interleave(
        {name: step(name) for name in names if not found[name]["note"]},
        seconds=options.seconds,
        measure=measure_of(options.device),
    )
    gemm = measure_ceilings(options.device).gemm * 1e9
    (n, d), v = p.e.shape, len(p.c)
    products = 4 if options.head == "full" else 3  # forward, again, dE and dC
    rows = []
    for name in names:
        row = {"name": name, **found[name]}
        if name in timings:
            mine, base = timings[name], timings.get("trl")
            row |= {
                "forward": mine.forward,
                "seconds": mine.total,
                "spread": mine.spread,
                "of_gemm": 2.0 * products * n * d * v / gemm / mine.total,
            }
            if base is not None:
                row["x_forward"] = paired_ratio(base, mine, "forward")
                row["x_trl"] = paired_ratio(base, mine)
                bar = BARS[options.device]
                if name in OURS and min(row["x_forward"], row["x_trl"]) < bar:
                    row["note"] = f"RED: below {bar:g} x trl"
        case = {"n": n, "d": d, "v": v, "softcap": p.softcap or 0.0}
        rows.append({key: row.get(key) for key in COLUMNS} | case | {"bars": ""})
    return rows


def parse_options() -> argparse.Namespace:
    parser = parser_of(
        __doc__,
        device="cpu",
        dtype="bf16",
        dtypes=("fp32", "bf16"),
        threads=torch.get_num_threads(),
        seconds=60.0,
    )
    parser.add_argument(
        "--shape",
        type=lambda text: tuple(map(int, text.split(","))),
        default=(1024, 2304, 32768),
        metavar="N,D,V",
    )
    parser.add_argument("--model", metavar="FOLDER", help="in place of --data, D, V, --softcap")
    parser.add_argument("--head", default="full", choices=HEADS, help="frozen: as under LoRA")
    parser.add_argument("--idle", type=float, default=0.3, help="share of rows without a gradient")
    parser.add_argument("--data", default="plaw-2.5", choices=DATA_KINDS)
    parser.add_argument("--softcap", type=float, default=30.0, help="0: none")
    parser.add_argument("--temperature", type=float, default=0.7)
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
        names = ("threads", "head", "idle", "dtype", "temperature")
        case = {name: getattr(options, name) for name in names}
        case["data"] = Path(options.model).name if options.model else options.data
        layout = report.Layout(
            title="Log-probabilities and entropy: forward and backward",
            about=f"`python benchmarks/bench_logprobs.py --device {options.device} --save`",
            case=(*case, "n", "d", "v", "softcap"),
            label=lambda row: (
                "{head} head, {idle:.0%} of rows without a gradient, N={n} D={d} V={v} {dtype} "
                "{data} softcap {softcap:g}, temperature {temperature:g}, {threads} threads"
            ).format_map(row),
            columns=COLUMNS,
            place=list(SUBJECTS).index,
        )
        folder = HERE / "results" / facts["device"]
        report.save(folder, "logprobs", [{**row, **case} for row in rows], facts, layout)
    sys.exit(any("RED" in row["note"] for row in rows))


if __name__ == "__main__":
    main()
