"""A training step of a causal language model, its loss by transformers, compiled, peers and ours.

    python benchmarks/bench_step.py                                # Gemma-2-2B on a card
    python benchmarks/bench_step.py --cases peaked --kept 0.01 0.05 --impl eager ours
    python benchmarks/bench_step.py --model google/gemma-3-270m --text FILE

Forward and backward of the same model on the same batches, in turn in one process. With random
weights logits are flat, or peaked: the final norm is scaled until ours keeps at most --kept of the
gradient strips of a batch that is not timed, and labels are drawn from the model's own softmax.
"lora" cases train adapters under a frozen head. Without a card a small model stands in.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import step_model
import torch
from step_impls import Implementation, Loss, implementations
from torch import Tensor, nn

from gemma_ext.bench import report, timing
from gemma_ext.bench.options import parser_of
from gemma_ext.bench.subject import DTYPES

Batch = tuple[Tensor, Tensor]  # ids and labels, [B, T]
RESULTS = Path(__file__).parent / "results"
BATCHES = 3  # in rotation
LOSS_SLACK, NORM_SLACK = 1e-2, 0.1  # relative distance from eager
CASE_SECONDS = 10.0  # to build, check and time a case: what is left of a budget to start another
ORDER = ("eager", "compile", "liger", "exact", "ours")
DEFAULT_IMPLS = ("eager", "compile", "liger", "ours")
KEY = ("model", "b", "t", "dtype", "checkpointing", "optimizer", "case")
COLUMNS = {
    "name": ("loss by", ""),
    "forward": ("fwd ms", ".1fms"),
    "total": ("step ms", ".1fms"),
    "spread": ("spread", ".0%"),
    "saved": ("eager - own ms", ".1fms"),
    "x_eager": ("x eager", ".2f"),
    "extra_mb": ("MB over weights", ".0f"),
    "loss": ("loss", ".4f"),
    "grad_norm": ("grad norm", ".4g"),
    "head_norm": ("of the head", ".4g"),
    "kept": ("kept", ".3f"),
    "note": ("note", ""),
}
LAYOUT = report.Layout(
    title="A training step of a causal language model",
    about="`python benchmarks/bench_step.py --save`; columns are explained in `../../README.md`.",
    case=KEY,
    label=lambda row: (
        f"{row['model']} {row['case']}, B={row['b']} T={row['t']} {row['dtype']}"
        f"{', checkpointing' if row['checkpointing'] else ''}"
        f"{', SGD' if row['optimizer'] == 'sgd' else ''}"
    ),
    columns=COLUMNS,
    place=ORDER.index,
)
# The bars of a Gemma-2-2B step at B=4 T=2048 on an H100 or H200: seconds less than another's.
BAR_MODEL = (26, 2304, 256000, 8192)  # layers, width, vocabulary, tokens
FEW_KEPT_SLACK = 1.2  # the share is searched on another batch
FEW_KEPT, FEW_SAVED, FLAT_SAVED, LIGER_SAVED = 0.05, 0.040, 0.015, 0.040


@dataclass(frozen=True)
class Case:
    """Logits ("flat", "real", or the share of strips to keep) and whether only adapters train."""

    logits: str | float
    lora: bool = False

    @property
    def label(self) -> str:
        name = f"kept-{self.logits:g}" if isinstance(self.logits, float) else self.logits
        return f"lora-{name}" if self.lora else name


@dataclass
class Job:
    """What all cases share."""

    config: Any
    weights: str | None
    text: Path | None
    device: str
    dtype: str
    b: int
    t: int
    checkpointing: bool
    sgd: bool
    seconds: float
    rounds: int
    options: Mapping[str, Any]  # of patch

    def row(self, case: Case, name: str) -> dict[str, Any]:
        """Every column of the files, in order, empty."""
        text = self.config.get_text_config()
        model = f"{self.config.model_type}-{text.num_hidden_layers}x{text.hidden_size}"
        values = (
            f"{model}-V{text.vocab_size}{'' if self.weights is None else '-trained'}",
            self.b,
            self.t,
            self.dtype,
            self.checkpointing,
            "sgd" if self.sgd else "none",
            case.label,
        )
        columns = dict.fromkeys([*COLUMNS, "cpu", "rounds", "kept_by_search"])
        return (
            dict(zip(KEY, values, strict=True)) | columns | {"name": name, "note": "", "bars": ""}
        )


@dataclass
class Prepared:
    """A model ready to train on batches of ids and labels; the kept share that a search reached."""

    model: nn.Module
    batches: list[Batch]
    reached: float | None


class Step:
    """One implementation's step over the batches in rotation."""

    def __init__(self, it: Prepared, implementation: Implementation, sgd: bool) -> None:
        self.model, self.implementation = it.model, implementation
        self.first, self.batches = it.batches[0], itertools.cycle(it.batches)
        trained = [p for p in it.model.parameters() if p.requires_grad]
        # a rate of 0 does the work of an update and leaves the weights to the next in turn
        self.optimizer = torch.optim.SGD(trained, lr=0.0) if sgd else None

    def run(self, loss: Loss, batch: Batch, mark: timing.Mark = lambda: None) -> Tensor:
        value = loss(*batch)
        mark()
        value.backward()
        if self.optimizer is not None:
            self.optimizer.step()
        return value.detach()

    def check(self, device: str) -> dict[str, Any]:
        """Loss, gradient norms and memory of the first batch, after a step that is not counted."""
        with self.implementation.on(self.model) as loss:
            self.model.zero_grad(set_to_none=True)
            self.run(loss, self.first)
            self.model.zero_grad(set_to_none=True)
            with timing.memory_of(device) as memory:
                value = self.run(loss, self.first)
                peak = memory.peak()
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        head = self.model.get_output_embeddings().weight.grad
        return {
            "loss": value.item(),
            "grad_norm": torch.stack([norm(g) for g in grads]).norm().item(),
            "head_norm": None if head is None else norm(head).item(),
            "extra_mb": peak / 2**20,
        }

    def measure(self, device: str) -> timing.Measurement:
        """One step, the implementation put in place and the gradients freed before."""
        with self.implementation.on(self.model) as loss:
            self.model.zero_grad(set_to_none=True)
            timed = timing.measure_of(device)
            return timed(partial(self.run, loss, next(self.batches)))


def norm(gradient: Tensor) -> Tensor:
    return torch.linalg.vector_norm(gradient, dtype=torch.float32)


def run_case(job: Job, case: Case, chosen: Mapping[str, Implementation]) -> list[dict[str, Any]]:
    """Check every implementation, time those that agree with eager."""
    it = prepare(job, case)
    rows = {name: job.row(case, name) for name in chosen}
    steps: dict[str, Step] = {}
    for name, implementation in chosen.items():
        row = rows[name]
        row["kept_by_search"] = it.reached
        reason = implementation.refuse(it.model, job.device)
        if reason is None:
            reason = check(job, it, implementation, row, rows.get("eager"), steps)
        row["note"] = reason or ""
    timings = timing.interleave(
        steps, seconds=job.seconds, least=job.rounds, warmup=0,
        measure=lambda step: step.measure(job.device),
    )  # fmt: skip
    for name, own in timings.items():
        row = rows[name]
        row |= {"forward": own.forward, "total": own.total, "cpu": own.cpu}
        row |= {"spread": own.spread, "rounds": len(own.runs)}
        if "eager" in timings and name != "eager":
            row["saved"] = timings["eager"].total - own.total
            row["x_eager"] = timing.paired_ratio(timings["eager"], own)
    if is_bar_model(job) and "ours" in timings:
        rows["ours"]["bars"] = "; ".join(bars(case, {name: rows[name] for name in timings}))
    return list(rows.values())


def check(
    job: Job,
    it: Prepared,
    implementation: Implementation,
    row: dict[str, Any],
    eager: Mapping[str, Any] | None,
    steps: dict[str, Step],
) -> str | None:
    """Fill a row and keep the step if it is right; returns why it is not."""
    step = Step(it, implementation, job.sgd)
    try:
        row |= step.check(job.device)
        if implementation.ours:
            ids, labels = it.batches[0]
            hidden = step_model.hidden_states(it.model, ids)
            head = step_model.head_of(it.model)
            eps = None if row["name"] == "exact" else job.options.get("filter_eps", "auto")
            row["kept"] = step_model.kept_share(hidden, head, labels, eps)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return f"failed: {type(error).__name__}: {lines[0][:160]}"
    finally:
        it.model.zero_grad(set_to_none=True)
        gc.collect()
    if eager and eager["loss"] is not None:
        for key, slack in (("loss", LOSS_SLACK), ("grad_norm", NORM_SLACK)):
            if not abs(row[key] - eager[key]) <= slack * abs(eager[key]):
                return f"RED: {key} {row[key]:.4g}, eager's is {eager[key]:.4g}"
    steps[row["name"]] = step
    return None


def prepare(job: Job, case: Case) -> Prepared:
    """A model and its batches; the last batch drawn is for the search alone."""
    dtype = DTYPES[job.dtype]
    model = step_model.build(job.config, dtype, job.device, job.checkpointing, job.weights)
    shape = (BATCHES + 1, job.b, job.t)
    if job.text is not None:
        ids = step_model.text_tokens(job.text.read_text(), job.weights, *shape, job.device)
    else:
        ids = step_model.zipf_tokens(job.config, *shape, job.device)
    *ids, spare = ids
    reached, labels = None, ids
    if isinstance(case.logits, float):
        eps = job.options.get("filter_eps", "auto")
        reached = step_model.sharpen(model, spare, case.logits, eps)
        head = step_model.head_of(model)
        labels = [
            step_model.model_labels(step_model.hidden_states(model, part), head, seed=i)
            for i, part in enumerate(ids)
        ]
    if case.lora:
        step_model.add_adapters(model)
    return Prepared(model, list(zip(ids, labels, strict=True)), reached)


def is_bar_model(job: Job) -> bool:
    text = job.config.get_text_config()
    sizes = (text.num_hidden_layers, text.hidden_size, text.vocab_size, job.b * job.t)
    return job.device == "cuda" and sizes == BAR_MODEL and job.checkpointing


def bars(case: Case, rows: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Each bar of time that applies to ours, with pass or MISS."""
    own, kept = rows["ours"]["total"], rows["ours"]["kept"]
    least = {"liger": 0.0 if case.lora else LIGER_SAVED}
    if case.lora:
        least["eager"] = 0.0
    elif kept <= FEW_KEPT_SLACK * FEW_KEPT:
        least["eager"] = FEW_SAVED
    elif case.logits == "flat":
        least["eager"] = FLAT_SAVED
    for peer, seconds in least.items():
        if peer in rows:
            saved = rows[peer]["total"] - own
            verdict = "pass" if saved >= seconds and saved > 0 else "MISS"
            yield f"{1e3 * saved:.0f} ms under {peer}, {1e3 * seconds:.0f} asked, {verdict}"


def main() -> None:
    options = parse_options()
    device = options.device
    torch.set_num_threads(options.threads)
    known = implementations(**patch_options(options))
    unknown = set(options.impl or []) - set(known)
    if unknown:
        raise SystemExit(f"--impl: expected some of {', '.join(ORDER)}, got {sorted(unknown)}")
    names = [name for name in ORDER if name in (options.impl or DEFAULT_IMPLS)]
    config = step_model.read_config(options.model, device)
    weights = options.model if step_model.has_weights(options.model) else None
    if options.text and weights is None:
        raise SystemExit("--text: expected a --model with weights and a tokenizer")
    on_card = device == "cuda"
    job = Job(
        config=config,
        weights=weights,
        text=options.text,
        device=device,
        dtype=options.dtype,
        b=options.batch or (4 if on_card else 2),
        t=options.tokens or (2048 if on_card else 256),
        checkpointing=options.checkpointing,
        sgd=options.optimizer == "sgd",
        seconds=options.seconds,
        rounds=options.rounds,
        options=patch_options(options),
    )
    facts = report.machine(device)
    print(report.header(facts), flush=True)
    end = time.monotonic() + options.budget
    cases = list(cases_of(options.cases, options.kept, real=weights is not None))
    failed = False
    for i, case in enumerate(cases):
        if i and end - time.monotonic() < CASE_SECONDS:
            print(f"\nnot run, out of time: {', '.join(c.label for c in cases[i:])}")
            break
        rows = run_case(job, case, {name: known[name] for name in names})
        show(rows)
        failed |= any(known[r["name"]].ours and r["note"] for r in rows)
        if options.save:
            report.save(RESULTS / facts["device"], "step", rows, facts, LAYOUT)
        gc.collect()
        if on_card:
            torch.cuda.empty_cache()
    sys.exit(int(failed))


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    print(f"\n## {LAYOUT.label(rows[0])}")
    reached = rows[0]["kept_by_search"]
    if reached is not None:
        print(f"on the batch of the search {reached:.4f} of the strips are kept")
    print(report.table_and_bars(rows, COLUMNS), flush=True)


def cases_of(
    names: Sequence[str] | None, kept: Sequence[float], *, real: bool = False
) -> Iterator[Case]:
    """Cases by their names; peaked ones for each kept share, of "lora-peaked" only the first."""
    for name in names or (("real", "lora") if real else ("flat", "peaked", "lora", "lora-peaked")):
        if name == "peaked":
            yield from map(Case, kept)
        elif name == "lora-peaked":
            yield Case(kept[0], lora=True)
        elif name == "lora":
            yield Case("real" if real else "flat", lora=True)
        else:
            yield Case(name)


def patch_options(options: argparse.Namespace) -> dict[str, Any]:
    """Options of ``patch`` that were given."""
    return {} if options.filter_eps is None else {"filter_eps": options.filter_eps}


def parse_options(words: Sequence[str] | None = None) -> argparse.Namespace:
    card = torch.cuda.is_available()
    parser = parser_of(
        __doc__,
        device="cuda" if card else "cpu",
        dtype="bf16",
        threads=torch.get_num_threads(),
        seconds=4.0,
        rounds=3,
    )
    parser.add_argument("--model", help="path or id of a config, with weights where there are any")
    parser.add_argument("--text", type=Path, help="file to train on, for a model with a tokenizer")
    parser.add_argument("--batch", type=int, help="B: 4 on a card, else 2")
    parser.add_argument("--tokens", type=int, help="T: 2048 on a card, else 256")
    parser.add_argument(
        "--cases", nargs="+", choices=["flat", "peaked", "real", "lora", "lora-peaked"]
    )
    parser.add_argument("--kept", nargs="+", type=float, default=[0.05, 0.01])
    parser.add_argument("--impl", nargs="+", metavar="NAME", help=f"of {', '.join(ORDER)}")
    parser.add_argument("--filter-eps", type=float, help="of ours; by default its own choice")
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--optimizer", choices=["none", "sgd"], default="none")
    parser.add_argument("--budget", type=float, default=600.0, help="seconds to start cases in")
    return parser.parse_args(words)


if __name__ == "__main__":
    main()
