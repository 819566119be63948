"""A model of half the layers that runs them twice: convert, uptrain, compare.

    python python_examples/recursive_gemma.py
    python python_examples/recursive_gemma.py --full --seeds 3 --steps 50
    python python_examples/recursive_gemma.py --model models/gemma-3-270m --ranks 64 --freeze

Conversions of the model with several initialisations are uptrained on the same tokens, with and
without the full-size model as teacher, beside a model of the same size that is trained from
nothing; then the loops learn to answer early. Held-out perplexity of every loop is on the page.

Finished pieces are kept in the output folder; a run that was interrupted goes on behind them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from gemma_ext import pocket
from gemma_ext.papers.recursive import grid, page
from gemma_ext.papers.recursive.study import Bench
from gemma_ext.progress import progress_bar
from gemma_ext.report import Kept


def main(
    model: Annotated[str, typer.Option(help="pocket, pocket:small, folder or id.")] = "pocket",
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    out: Annotated[Path, typer.Option(help="Folder of models and page.")] = Path("out/recursive"),
    loops: Annotated[int, typer.Option(min=2, help="B, a divisor of the layers.")] = 2,
    ranks: Annotated[str, typer.Option(help="Of matrices per depth, ascending.")] = "8,32,64",
    seeds: Annotated[int, typer.Option(min=1)] = 1,
    full: Annotated[bool, typer.Option("--full", help="All rows of the tables.")] = False,
    steps: Annotated[int, typer.Option(min=1, help="Of uptraining.")] = 40,
    exit_steps: Annotated[int, typer.Option(min=1, help="Of exit training.")] = 30,
    batch: Annotated[int, typer.Option(min=1, help="Windows of a step.")] = 16,
    context: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 128,
    rate: Annotated[float, typer.Option(help="Peak of the learning rate.")] = 1e-3,
    held_out: Annotated[int, typer.Option(min=1, help="Windows to measure on.")] = 160,
    freeze: Annotated[bool, typer.Option("--freeze", help="Embedding and head stay.")] = False,
) -> None:
    """Tie the layers of MODEL and see what uptraining repairs."""
    source, tokenizer = load(model, device)
    wanted = max(steps, exit_steps) * batch * seeds
    bench = Bench(
        source,
        windows(model, tokenizer, "train", wanted, context),
        windows(model, tokenizer, "heldout", held_out, context),
        steps=steps,
        exit_steps=exit_steps,
        batch=batch,
        rate=rate,
        device=device,
        freeze_embedding=freeze,
    )
    settings = {
        "model": model,
        "loops": loops,
        "ranks": ranks,
        "steps": steps,
        "exit_steps": exit_steps,
        "batch": batch,
        "context": context,
        "rate": rate,
        "held_out": len(bench.held_out),
        "freeze": freeze,
        "rows": "all" if full else "a few",
    }
    kept = Kept(out / "results.json", settings)
    start = kept("start", lambda: bench.measure(source))
    tables: page.Tables = {}
    for seed in range(seeds):
        sizes = tuple(int(rank) for rank in ranks.split(","))
        for table, row, count, make in grid.runs(bench, loops, sizes, seed, out / "models", full):
            with progress_bar(f"{row}, seed {seed}", count, True) as advance:
                record = kept(
                    f"{table}: {row}, seed {seed}", lambda make=make, advance=advance: make(advance)
                )
            tables.setdefault(table, {}).setdefault(row, []).append(record)
    facts = {name: str(value) for name, value in settings.items()}
    facts |= {"seeds": str(seeds), "tokens of uptraining": f"{steps * batch * context:,}"}
    text = page.markdown(tables, start)
    page.write(out / "report.html", tables, start, facts)
    (out / "table.md").write_text(text, encoding="utf-8")
    print(f"{text}\n{out / 'report.html'}")


def load(name: str, device: str) -> tuple[Any, Any]:
    kind, _, size = name.partition(":")
    if kind == "pocket":
        made = pocket.load(size or "nano")
        return made.model.to(device), made.tokenizer
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    return model.to(device).eval(), AutoTokenizer.from_pretrained(name)


def windows(name: str, tokenizer: Any, split: str, count: int, context: int) -> Tensor:
    """At most `count` windows [W, T] of the pocket's text."""
    kind, _, size = name.partition(":")
    if kind == "pocket":
        text = pocket.load_text(size or "nano")
        ids = text.train_ids if split == "train" else text.heldout_ids
    else:
        ids = stream(tokenizer, split, count * context)
    rows = ids[: len(ids) // context * context].view(-1, context)
    return rows if split == "train" else rows[:count]


def stream(tokenizer: Any, split: str, count: int) -> Tensor:
    """At least `count` tokens of the pocket's documents, if there are as many."""
    ids: list[int] = []
    for document in pocket.documents(None):
        if document.split == split:
            ids += [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
            ids += tokenizer(document.text, add_special_tokens=False, verbose=False).input_ids
        if len(ids) >= count:
            break
    return torch.tensor(ids)


if __name__ == "__main__":
    typer.run(main)
