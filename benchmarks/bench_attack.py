"""The inner attack of continuous adversarial training, batched and as a loop over micro-batches.

    python benchmarks/bench_attack.py                                # random weights, V = 16384
    python benchmarks/bench_attack.py --model FOLDER --dtype bf16    # a real model
    python benchmarks/bench_attack.py --save

A global step has `--batch` rows in micro-batches of 8, every eighth row adversarial (70 tokens of
prompt, 20 of target), the others useful (up to 256 tokens). Three subjects find the same
perturbations with K sign steps and frozen weights:

- micro-batches: as the paper's released code is described to work. A micro-batch is embedded by a
  product of one-hot rows with the whole table; its adversarial rows keep its length, about one at
  a time; logits of all positions; cross-entropy against one-hot labels. It is spared the scale
  that such a product loses: the rows of its table are those that the model reads.
- micro-batches, mended: the same with looked-up embeddings and labels that are ids.
- gemma_ext: the adversarial rows of all micro-batches at once, at their own length, and the head
  at targets alone.

A subject whose losses differ has no time.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gemma_ext.bench import report, timing
from gemma_ext.bench.options import parser_of
from gemma_ext.bench.rows import verdict
from gemma_ext.bench.subject import DTYPES
from gemma_ext.papers.continuous_at import Attack, AttackConfig, Batch, Row

RESULTS = Path(__file__).parent / "results"
SLACK = {"fp32": 1e-3, "bf16": 0.1}  # of a mean loss; the loop adds small steps up in bf16
BAR = 5.0
MICRO, EVERY, PROMPT, TARGET, LONGEST = 8, 8, 70, 20, 256
KEY = ("model", "dtype", "batch", "steps")
COLUMNS = {
    "name": ("attacked by", ""),
    "total": ("s", ".2f"),
    "spread": ("spread", ".0%"),
    "rate": ("row steps/s", ".1f"),
    "x_peer": ("x micro-batches", ".2f"),
    "x_mended": ("x mended", ".2f"),
    "peak_mb": ("peak MB", ".0f"),
    "loss": ("mean loss", ".4f"),
    "error": ("largest difference", ".1e"),
    "note": ("note", ""),
}
ORDER = ("micro-batches", "micro-batches, mended", "gemma_ext")
LAYOUT = report.Layout(
    title="The attack of continuous adversarial training",
    about="`python benchmarks/bench_attack.py --save`; batch is of the global step, an eighth of "
    "it adversarial.",
    case=KEY,
    label=lambda row: f"{row['model']} {row['dtype']}, batch {row['batch']}, K {row['steps']}",
    columns=COLUMNS,
    place=ORDER.index,
)


def build(options: argparse.Namespace) -> tuple[Any, str]:
    from transformers import AutoModelForCausalLM

    from gemma_ext import pocket

    dtype = DTYPES[options.dtype]
    if options.model is None:
        size = dataclasses.replace(
            pocket.SIZES["small"], hidden_size=256, intermediate_size=1024, layers=12, head_dim=64
        )
        model = pocket.build_model(size).to(dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
    text = model.config.get_text_config()
    name = f"{text.model_type}-{text.num_hidden_layers}x{text.hidden_size}-V{text.vocab_size}"
    return model.eval().requires_grad_(False).to(options.device), name


def micro_batches(vocab: int, batch: int) -> list[list[tuple[Row, bool]]]:
    """Rows and whether each is adversarial."""
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, vocab, (count,), generator=generator).tolist())

    rows = []
    for at in range(batch):
        if at % EVERY == 0:
            rows.append((Row((2, *ids(PROMPT - 1)), ids(TARGET)), True))
        else:
            length = LONGEST - int(torch.randint(0, 96, (), generator=generator))
            length = LONGEST if at % MICRO == 1 else length
            rows.append((Row((2, *ids(length // 2 - 1)), ids(length - length // 2)), False))
    return [rows[start : start + MICRO] for start in range(0, batch, MICRO)]


def loop(
    model: Any, table: Tensor, batches: list[list[tuple[Row, bool]]], config: AttackConfig,
    radius: float, mended: bool,
) -> list[float]:  # fmt: skip
    """Last losses of the adversarial rows, one micro-batch after another."""
    found = []
    vocab = len(table)
    for rows in batches:
        batch = Batch([row for row, _ in rows], model.device)
        if mended:
            states = table[batch.ids]
        else:
            states = F.one_hot(batch.ids, vocab).to(table.dtype) @ table
        chosen = torch.tensor([adversarial for _, adversarial in rows], device=model.device)
        ids, mask = batch.ids[chosen], batch.mask[chosen]
        states, free, scored = states[chosen], batch.free[chosen], batch.scored[chosen]
        labels = ids[:, 1:] if mended else F.one_hot(ids[:, 1:], vocab).to(table.dtype)
        delta = torch.zeros_like(states)

        def losses(
            delta: Tensor, states: Tensor = states, mask: Tensor = mask,
            labels: Tensor = labels, scored: Tensor = scored,
        ) -> Tensor:  # fmt: skip
            logits = model(
                inputs_embeds=states + delta, attention_mask=mask.long(), use_cache=False
            ).logits[:, :-1]
            nll = F.cross_entropy(logits.transpose(1, 2).float(), _classes(labels),
                                  reduction="none")  # fmt: skip
            return (nll * scored[:, 1:]).sum(1) / scored.sum(1)

        for _ in range(config.steps):
            here = delta.clone().requires_grad_()
            (grad,) = torch.autograd.grad(losses(here).sum(), here)
            delta = (delta - config.rate * grad.sign()) * free.unsqueeze(-1)
            norm = delta.norm(dim=-1, keepdim=True)
            delta = delta * (radius / norm.clamp_min(1e-12)).clamp_max(1.0)
        with torch.no_grad():
            found += losses(delta).tolist()
    return found


def _classes(labels: Tensor) -> Tensor:
    return labels if labels.dim() == 2 else labels.transpose(1, 2).float()


def run_case(options: argparse.Namespace) -> tuple[list[dict[str, Any]], str]:
    model, name = build(options)
    attack = Attack(model, AttackConfig(steps=options.steps, rate=1e-3, eps_rel=0.1))
    embeddings = attack.perturbed.embeddings
    radius = 0.1 * embeddings.mean_norm()
    table = embeddings(torch.arange(embeddings.vocab, device=model.device))
    batches = micro_batches(embeddings.vocab, options.batch)
    adversarial = [row for rows in batches for row, is_one in rows if is_one]

    subjects: dict[str, Callable[[], Any]] = {
        "micro-batches": lambda: loop(model, table, batches, attack.config, radius, False),
        "micro-batches, mended": lambda: loop(model, table, batches, attack.config, radius, True),
        "gemma_ext": lambda: attack(adversarial).losses[-1].tolist(),
    }
    expected = torch.tensor(subjects["gemma_ext"]())
    rows: dict[str, dict[str, Any]] = {}
    for label in list(subjects):
        with timing.memory_of(options.device) as memory:
            losses = torch.tensor(subjects[label]())
        error = (losses - expected).abs().max().item()
        rows[label] = {"peak_mb": memory.peak() / 2**20, "error": error}
        rows[label] |= {"loss": losses.mean().item(), "note": "", "bars": ""}
        if error > SLACK[options.dtype]:
            rows[label]["note"] = f"RED: off by {error:.1e}"
            del subjects[label]
    work = len(adversarial) * options.steps
    add_times(rows, subjects, work, options)
    return [{"name": label, **row} for label, row in rows.items()], name


def add_times(
    rows: dict[str, dict[str, Any]],
    subjects: dict[str, Callable[[], Any]],
    work: int,
    options: argparse.Namespace,
) -> None:
    timings = timing.interleave(
        {label: timing.whole(run) for label, run in subjects.items()},
        seconds=options.seconds,
        warmup=0,
        measure=timing.measure_of(options.device),
    )
    for label, own in timings.items():
        rows[label] |= {"total": own.total, "spread": own.spread, "rate": work / own.total}
    mine = timings.get("gemma_ext")
    for label, column in zip(ORDER[:2], ("x_peer", "x_mended"), strict=True):
        if mine is not None and label in timings:
            ratio = timing.paired_ratio(timings[label], mine)
            rows["gemma_ext"][column] = ratio
            if column == "x_peer":
                text = f"{ratio:.2f} x the loop over micro-batches, {BAR} asked,"
                rows["gemma_ext"]["bars"] = verdict(text, ratio >= BAR)


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    facts = report.machine(options.device)
    print(report.header(facts), flush=True)
    found, name = run_case(options)
    values = dict(zip(KEY, (name, options.dtype, options.batch, options.steps), strict=True))
    rows = [{**values, **dict.fromkeys(COLUMNS), **row} for row in found]
    rows.sort(key=lambda row: LAYOUT.place(row["name"]))
    print(f"\n## {LAYOUT.label(rows[0])}\n{report.table_and_bars(rows, COLUMNS)}", flush=True)
    if options.save:
        report.save(RESULTS / facts["device"], "attack", rows, facts, LAYOUT)
    raise SystemExit(int(any(row["note"].startswith("RED") for row in rows)))


def parse_options() -> argparse.Namespace:
    parser = parser_of(
        __doc__,
        device="cpu",
        dtype="fp32",
        dtypes=SLACK,
        threads=torch.get_num_threads(),
        seconds=60.0,
    )
    parser.add_argument("--model", help="a folder; else random weights")
    parser.add_argument("--batch", type=int, default=64, help="rows of the global step")
    parser.add_argument("--steps", type=int, default=10, help="K")
    return parser.parse_args()


if __name__ == "__main__":
    main()
