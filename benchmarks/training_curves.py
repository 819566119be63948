"""Does a training notice how the head's gradient was made? Loss curves beside the exact one.

    python benchmarks/training_curves.py --save                    # pocket Gemma-2, random start
    python benchmarks/training_curves.py --model FOLDER --seeds 1 --steps 60 --context 128 \
        --batch 1 --save                                           # a trained causal LM

The same model, start, batches and optimiser; only the gradients of the head differ:

    exact        every logit
    sampled      filter_eps = 2^-8
    coarse       filter_eps = 2^-5, eight times the variance
    cut-ce       cut-cross-entropy's published rule by its formula: blocks of 128 rows x 128 columns
                 in which no |p - onehot| reaches 2^-12 are left out
    exact-bf16   exact, with hidden states and classifier rounded to bfloat16
    auto-bf16    the default of bfloat16
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from step_model import head_of
from training_run import MAKERS, Run, Task, rarest, train

from gemma_ext.bench import report
from gemma_ext.bench.options import parser_of
from gemma_ext.bench.rows import verdict
from gemma_ext.pocket.quiet import quiet_transformers
from gemma_ext.pocket.training import windows_of

RESULTS = Path(__file__).parent / "results"
RUNNING = 25  # steps of a running loss
THIN = 10  # steps of a point of the saved curve
HELDOUT = 8192  # targets
RATES = {"pocket": 3e-3, "trained": 2e-5}

LAYOUT = report.Layout(
    title="Training with other gradients of the head",
    about="`python benchmarks/training_curves.py`; columns: `benchmarks/README.md`",
    case=("model", "setting"),
    label=lambda row: f"{row['model']}, {row['setting']}",
    columns={
        "name": ("gradient of the head", ""),
        "kept": ("kept, first to last", ""),
        "third": ("running loss at 1/3", ".4f"),
        "two_thirds": ("at 2/3", ".4f"),
        "end": ("at the end", ".4f"),
        "heldout": ("held-out loss", ".4f"),
        "heldout_seeds": ("per seed", ""),
        "off_seeds": ("less exact's, per seed", ""),
        "off": ("mean", "+.4f"),
        "error": ("its standard error", ".4f"),
        "spread": ("spread over seeds", ".4f"),
        "rare_norm": ("rarest rows, norm", ""),
        "rare_along": ("along exact", ""),
    },
    place=lambda name: list(MAKERS).index(name),
)
MARKS = {
    "third": "running loss at 1/3", "two_thirds": "at 2/3", "end": "at the end",
    "heldout": "held out",
}  # fmt: skip


def pocket_task(size: str, context: int, batch: int, rate: float) -> Task:
    from gemma_ext.pocket import SIZES, build_model, load_text

    text, recipe = load_text(size), SIZES[size]
    return Task(
        name=f"pocket {size} from a random start: V={recipe.vocab_size} D={recipe.hidden_size}",
        build=lambda seed: build_model(recipe, seed),
        train=windows_of(text.train_ids, context),
        heldout=windows_of(text.heldout_ids[: HELDOUT + 1], context),
        rare=rarest(text.train_ids, recipe.vocab_size),
        rate=rate,
        batch=batch,
    )


def trained_task(model: str, text: Path, context: int, batch: int, rate: float) -> Task:
    """The last tenth of the text is held out."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def build(seed: int) -> torch.nn.Module:
        with quiet_transformers():
            return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)

    ids = AutoTokenizer.from_pretrained(model)(text.read_text(), return_tensors="pt").input_ids[0]
    ours, held = ids[: len(ids) * 9 // 10], ids[len(ids) * 9 // 10 :]
    start = build(0)
    v, d = head_of(start).weight.shape
    return Task(
        name=f"{start.config.model_type} on {text.name}: V={v} D={d}",
        build=build,
        train=windows_of(ours, context),
        heldout=windows_of(held[: HELDOUT + 1], context),
        rare=rarest(ours, v),
        rate=rate,
        batch=batch,
    )


def row_of(name: str, runs: Sequence[Run], exact: Sequence[Run]) -> dict[str, Any]:
    """Figures of a maker over the seeds, and its bars against the exact runs of the same seeds."""
    marks, base = marks_of(runs), marks_of(exact)
    paired = {mark: differences(marks[mark], base[mark]) for mark in MARKS}
    off = paired["heldout"]
    row = {
        "name": name,
        "kept": f"{mean(r.kept[0] for r in runs):.3f} to {mean(r.kept[-1] for r in runs):.3f}",
        **{mark: mean(values) for mark, values in marks.items()},
        "heldout_seeds": words(marks["heldout"], ".4f"),
        "off_seeds": words(off, "+.4f"),
        "off": mean(off),
        "error": standard_error(off),
        "spread": spread(marks["heldout"]),
        "rare_norm": ends(runs, "rare_norm"),
        "rare_along": ends(runs, "rare_along"),
        "seeds": marks,
        "off_marks": paired,
        "curves": [thinned(run.losses) for run in runs],
        "bars": "",
    }
    if runs is not exact and len(runs) > 1:
        row["bars"] = "; ".join(
            bar(label, paired[mark], spread(base[mark])) for mark, label in MARKS.items()
        )
    return row


def bar(label: str, off: Sequence[float], seeds: float) -> str:
    """Whether a mean difference is within exact's spread, and within the noise of the pairs."""
    size, noise = abs(mean(off)), 2 * standard_error(off)
    within = verdict(f"{size:.4f} <= {seeds:.4f} (spread of exact)", size <= seeds)
    return f"{label} {within}, {verdict(f'<= {noise:.4f} (2 standard errors)', size <= noise)}"


def marks_of(runs: Sequence[Run]) -> dict[str, list[float]]:
    """Per seed: the running loss after each third of the steps, and the held-out loss."""
    found: dict[str, list[float]] = {}
    for third, mark in enumerate(("third", "two_thirds", "end"), 1):
        ends = [len(run.losses) * third // 3 for run in runs]
        found[mark] = [
            mean(run.losses[max(0, end - RUNNING) : end])
            for run, end in zip(runs, ends, strict=True)
        ]
    return found | {"heldout": [run.heldout for run in runs]}


def mean(values) -> float:
    return statistics.fmean(values)


def spread(values: Sequence[float]) -> float | None:
    """Standard deviation of a seed."""
    return statistics.stdev(values) if len(values) > 1 else None


def standard_error(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def differences(values: Sequence[float], others: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(values, others, strict=True)]


def words(values: Sequence[float], form: str) -> str:
    return " ".join(format(value, form) for value in values)


def ends(runs: Sequence[Run], name: str) -> str:
    """First and last step, the mean over the seeds."""
    first, last = (mean(getattr(run, name)[at] for run in runs) for at in (0, -1))
    return f"{first:.3f} to {last:.3f}"


def thinned(losses: Sequence[float]) -> list[float]:
    return [round(mean(losses[at : at + THIN]), 4) for at in range(0, len(losses), THIN)]


def all_rows(task: Task, names: Sequence[str], steps: int, seeds: int) -> Iterator[dict[str, Any]]:
    """A row per maker as it is done, "exact" first whether named or not."""
    exact: list[Run] = []
    for name in dict.fromkeys(("exact", *names)):
        runs = []
        for seed in range(seeds):
            start = time.monotonic()
            runs.append(train(task, MAKERS[name], steps, seed))
            seconds = time.monotonic() - start
            print(f"{name} seed {seed}: {runs[-1].heldout:.4f}, {seconds:.0f} s", flush=True)
        exact = exact or runs
        yield row_of(name, runs, exact) | {"model": task.name}


def plot(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Curves of every seed, and below them their differences from the exact ones."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    base = next(row["curves"] for row in rows if row["name"] == "exact")
    for index, row in enumerate(rows):
        for seed, curve in enumerate(row["curves"]):
            at = [THIN * (k + 1) for k in range(len(curve))]
            style = {"color": f"C{index}", "lw": 1, "label": row["name"] if seed == 0 else None}
            above.plot(at, curve, **style)
            if row["name"] != "exact":
                below.plot(at, differences(curve, base[seed]), **style)
    figure.suptitle(LAYOUT.label(rows[0]), fontsize=9)
    above.set(ylabel="training loss")
    below.set(xlabel="step", ylabel="loss less exact's, same seed")
    below.axhline(0, color="0.6", lw=0.8)
    above.legend()
    figure.savefig(path, dpi=100, metadata={"Software": None})


def save(folder: Path, rows: Sequence[dict[str, Any]], facts: Mapping[str, str], stem: str) -> None:
    report.save(folder, "training", rows, facts, LAYOUT)
    if find_spec("matplotlib"):
        plot(folder / f"training_{stem}.png", rows)


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    facts = report.machine()
    print(report.header(facts), flush=True)
    kind = "pocket" if options.model is None else "trained"
    shape = options.context, options.batch, options.rate or RATES[kind]
    if options.model is None:
        task, stem = pocket_task(options.pocket, *shape), f"pocket_{options.pocket}"
    else:
        task = trained_task(options.model, options.text, *shape)
        stem = task.name.split()[0]
    setting = (
        f"{options.steps} steps of {options.batch} x {options.context} tokens, "
        f"{options.seeds} seeds, AdamW {task.rate:g}"
    )
    rows = []
    for row in all_rows(task, options.only, options.steps, options.seeds):
        rows.append(row | {"setting": setting})
        if options.save:
            save(RESULTS / facts["device"], rows, facts, stem)
    print(f"\n{task.name}, {setting}\n\n{report.table_and_bars(rows, LAYOUT.columns)}")


def parse_options() -> argparse.Namespace:
    parser = parser_of(__doc__, threads=os.cpu_count())
    parser.add_argument("--pocket", choices=("nano", "small"), default="small")
    parser.add_argument("--model", help="folder or id of a causal LM with its tokenizer")
    parser.add_argument("--text", type=Path, default=Path(argparse.__file__))
    parser.add_argument("--only", nargs="+", choices=tuple(MAKERS), default=tuple(MAKERS))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--batch", type=int, default=4, help="windows of a step")
    parser.add_argument("--rate", type=float, help=f"peak learning rate ({RATES})")
    return parser.parse_args()


if __name__ == "__main__":
    main()
