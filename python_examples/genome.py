"""Evolve a pool of LoRA experts for a mix of tasks that none of them was trained for, with GENOME+.

    python python_examples/genome.py
    python python_examples/genome.py --model google/gemma-3-270m --seeds 1 --steps 20 --batch 4 \
        --population 8 --generations 10 --samples 30 --test-samples 90

Experts are fine-tuned on slices of Python's standard library: the code of five packages, and all
docstrings. The new task is an even mix of three of the slices, in files that no expert has seen:
some samples to evolve on and more, from yet other files, for the table. Beside GENOME+ stand the
best expert, static merges and other searches, each with as many evaluations.

Everything is kept in the output folder; a run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import functools
import json
import zlib
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from gemma_ext import pocket
from gemma_ext.distributed.fleet import open_fleet
from gemma_ext.files import new_folder
from gemma_ext.integrations.transformers import patch
from gemma_ext.papers.genome.baselines import BASELINES
from gemma_ext.papers.genome.config import search_from
from gemma_ext.papers.genome.draws import draws
from gemma_ext.papers.genome.lineage import FINISHED
from gemma_ext.papers.genome.models import Experts, ModelWorker
from gemma_ext.papers.genome.page import table, write_report
from gemma_ext.papers.genome.study import run_study
from gemma_ext.papers.genome.tasks import Task
from gemma_ext.progress import progress_bar

SLICES = ("asyncio", "distutils", "docstrings", "email", "idlelib", "lib2to3")
MIX = ("asyncio", "email", "docstrings")  # in equal parts
TRAINING, VALIDATION, TEST = ((0, 1, 2, 3), (4, 5), (6, 7))  # eighths of the files
SAMPLE = 80  # characters, at least
CONTEXT = 128  # tokens of a training row


def main(
    model: Annotated[str, typer.Option(help="pocket, pocket:small, a folder or a hub id.")] = (
        "pocket"
    ),
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    out: Annotated[Path, typer.Option(help="Folder of experts, runs and page.")] = Path(
        "out/genome"
    ),
    method: Annotated[str, typer.Option(help="Preset: genome, genome+, ...")] = "genome+-script",
    seeds: Annotated[int, typer.Option(min=1, help="Runs: other samples, other draws.")] = 3,
    budget: Annotated[int, typer.Option(min=1, help="Evaluations of each method.")] = 60,
    population: Annotated[int | None, typer.Option(min=2, help="In place of the preset's.")] = None,
    generations: Annotated[int, typer.Option(min=0, help="At most; the budget ends them.")] = 50,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each expert.")] = 60,
    batch: Annotated[int, typer.Option(min=1, help="Rows of a training step.")] = 16,
    samples: Annotated[int, typer.Option(min=3, help="Of the mix, to evolve on.")] = 60,
    test_samples: Annotated[int, typer.Option(min=3, help="Of the mix, for the table.")] = 600,
    workers: Annotated[int, typer.Option(min=0, help="Processes; 0 for this one.")] = 2,
) -> None:
    """Train experts of MODEL, evolve them, and compare."""
    base = prepare(model, out)
    begin = not model.startswith("pocket")
    adapters = [
        train_expert(base, name, out / "experts", steps, batch, device, begin) for name in SLICES
    ]
    experts = Experts(str(base), tuple(str(folder) for folder in adapters))
    digest = experts.pool().digest
    runs = []
    for seed in range(seeds):
        folder = out / f"{method}-{budget}-{samples}" / f"seed-{seed}"
        tasks = mixed_tasks(samples, test_samples, seed)
        worker = ModelWorker(experts, tasks, folder.resolve() / "run" / FINISHED, device)
        # its published rates, with moves and children for as long as the budget lasts
        wanted = {"budget": budget, "generations": generations, "patience": None}
        if population is not None:
            wanted |= {"size": population, "capacity": population}
        search = search_from({"preset": method, "seed": seed, **wanted})

        def bar(title: str, total: int, seed: int = seed) -> AbstractContextManager[Any]:
            return progress_bar(f"seed {seed}: {title}", total, True)

        with open_fleet(worker, workers) as fleet:
            _, rows = run_study(
                fleet,
                search,
                len(experts),
                {task.name: task.weight for task in tasks},
                folder,
                identity={"pool": digest, "tasks": json.dumps([task.digest for task in tasks])},
                baselines=list(BASELINES),
                bar=bar,
            )
        runs.append(rows)
    page = out / f"{method}-{budget}-{samples}" / "report.html"
    facts = {
        "model": model,
        "experts": ", ".join(SLICES),
        "task": f"{', '.join(MIX)} in equal parts",
        "samples": f"{samples} to choose by, {test_samples} of other files for the table",
        "score": "exp of the mean log-likelihood of a token",
    }
    found = write_report(page, runs, title=f"{method} over {len(SLICES)} experts", facts=facts)
    widths = {"method": 14, "evaluations": -4, "validation": 18, "test": 18, "lead": 18}
    for row in table(found):
        print("  ".join(f"{row[key]:{'<' if w > 0 else '>'}{abs(w)}}" for key, w in widths.items()))
    print(page)


def prepare(name: str, out: Path) -> Path:
    """Folder of the base model, where each worker loads it."""
    kind, _, size = name.partition(":")
    if kind != "pocket":
        return Path(name)
    folder = out / f"base-{size or 'nano'}"
    if not folder.exists():
        made = pocket.load(size or "nano")
        with new_folder(folder) as beside:
            made.model.save_pretrained(beside)
            made.tokenizer.save_pretrained(beside)
    return folder


def train_expert(
    base: Path, name: str, folder: Path, steps: int, batch: int, device: str, begin: bool
) -> Path:
    """Folder of the LoRA adapter (rank 8, alpha 16, all linear layers) fine-tuned on a slice.

    All start from the same A: factors that are averaged apart have to mean the same.

    Args:
        begin: put <bos> before every row, which a real Gemma expects and which scored texts have;
            the pocket was trained on windows of a stream.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

    made = folder / f"{name}-{steps}x{batch}"
    if made.exists():
        return made
    torch.manual_seed(0)
    model = patch(AutoModelForCausalLM.from_pretrained(base).to(device))
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    tokenizer = AutoTokenizer.from_pretrained(base)
    text = "\n".join(slice_texts(name, TRAINING))[: batch * CONTEXT * steps * 6]
    ids = tokenizer(text, verbose=False).input_ids
    rows = torch.tensor(ids[: len(ids) // CONTEXT * CONTEXT]).view(-1, CONTEXT)
    if begin:
        rows = torch.cat([rows.new_full((len(rows), 1), tokenizer.bos_token_id), rows], dim=1)
    print(f"training the expert of {name}: {steps} steps over {len(rows)} rows of {CONTEXT} tokens")
    arguments = TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        per_device_train_batch_size=batch,
        max_steps=steps,
        learning_rate=1e-2 if model.config.hidden_size < 256 else 2e-4,  # the release's; pocket
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 10),
        logging_steps=10**9,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=device == "cpu",
        dataloader_pin_memory=device != "cpu",
        seed=0,
    )
    dataset = [{"input_ids": row, "labels": row} for row in rows]
    Trainer(model=model, args=arguments, train_dataset=dataset).train()
    with new_folder(made) as beside:
        model.save_pretrained(beside)
    return made


def slice_texts(name: str, eighths: tuple[int, ...]) -> list[str]:
    """Documents of a slice, in files of these eighths."""
    prose = name == "docstrings"
    return [
        document.text
        for document in unseen()
        if (document.kind == "prose") == prose
        and (prose or document.path.split("/")[0] == name)
        and zlib.crc32(document.path.encode()) % 8 in eighths
    ]


@functools.cache
def unseen() -> list[pocket.Document]:
    """The corpus without the files that the pocket was trained on."""
    known = pocket.documents(pocket.SIZES["nano"].corpus_bytes)
    seen = {document.path for document in known if document.split == "train"}
    return [document for document in pocket.documents() if document.path not in seen]


def mixed_tasks(samples: int, test_samples: int, seed: int) -> tuple[Task, ...]:
    """A task for each slice of the mix, with its share of the samples, drawn by the seed.

    What stands word for word on an earlier side (licences, copied helpers) is left out.
    """
    earlier = {piece for name in SLICES for piece in pieces(name, TRAINING)}
    drawn: dict[str, list[list[dict[str, str]]]] = {name: [] for name in MIX}
    for eighths, count in ((VALIDATION, samples), (TEST, test_samples)):
        fresh = {name: [x for x in pieces(name, eighths) if x not in earlier] for name in MIX}
        for name, found in fresh.items():
            order = draws(seed, "mix", name, *eighths).permutation(len(found))
            drawn[name].append([{"text": found[at]} for at in order[: count // len(MIX)]])
            earlier.update(found)
    return tuple(Task(name, "likelihood", *splits) for name, splits in drawn.items())


@functools.cache
def pieces(name: str, eighths: tuple[int, ...]) -> list[str]:
    """The texts of a slice, cut; each piece once."""
    return list(dict.fromkeys(x for text in slice_texts(name, eighths) for x in cut(text)))


def cut(text: str) -> list[str]:
    """Runs of whole lines, each at least `SAMPLE` characters long; the rest is left out."""
    pieces, now = [], ""
    for line in text.splitlines(keepends=True):
        now += line
        if len(now) >= SAMPLE:
            pieces.append(now)
            now = ""
    return [piece for piece in pieces if len(piece) < 2 * SAMPLE]


if __name__ == "__main__":
    typer.run(main)
