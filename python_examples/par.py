"""Reward shaping against reward hacking: PPO on a reward model with a planted error.

    python python_examples/par.py                          # every rule on the pocket
    python python_examples/par.py --rules vanilla,par
    python python_examples/par.py --seeds 0,1,2
    python python_examples/par.py --model DIR --dtype bfloat16 --lora 8 --rules par --models 0

Gold counts common words; the proxy, which the policy is trained on, pays for asterisks too. Ten
references of each prompt are drawn once. Each rule and seed is one run of PPO; for each seed reward
models are trained on pairs with a bias for length. Finished pieces are kept in the output folder,
and the page is about all of them: rules and seeds may be added by a further call.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Annotated

import torch
import typer

from gemma_ext import pocket
from gemma_ext.papers.reward_shaping import RULES, page, reward_study, study
from gemma_ext.report import Kept
from gemma_ext.sae import load_model

WORDS = 6  # of a docstring that make a prompt


def main(
    model: Annotated[str, typer.Option(help="pocket, pocket:small, a folder or a hub id.")] = (
        "pocket"
    ),
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    dtype: Annotated[str, typer.Option(help="Of another model's weights.")] = "float32",
    out: Annotated[Path, typer.Option(help="Folder of pieces and page.")] = Path("out/par"),
    rules: Annotated[str, typer.Option(help="Names by commas, or all.")] = "all",
    seeds: Annotated[str, typer.Option(help="A run of each.")] = "0",
    steps: Annotated[int, typer.Option(min=4, help="Of PPO.")] = study.Plan.steps,
    batch: Annotated[int, typer.Option(min=2, help="Responses of a step.")] = study.Plan.batch,
    length: Annotated[int, typer.Option(min=4, help="Tokens of a response.")] = study.Plan.length,
    rate: Annotated[float, typer.Option(help="Learning rate.")] = study.Plan.learning_rate,
    beta: Annotated[float, typer.Option(min=0, help="Price of a nat.")] = study.Plan.beta,
    lora: Annotated[int, typer.Option(min=0, help="Rank of adapters; 0 trains all weights.")] = 0,
    count: Annotated[int, typer.Option(min=2, help="Prompts.")] = 96,
    references: Annotated[int, typer.Option(min=2, help="Of each prompt.")] = 10,
    models: Annotated[int, typer.Option(min=0, help="Steps of each reward model.")] = 60,
) -> None:
    """Compare rules of reward shaping on MODEL."""
    loaded, tokenizer = load_model(model, device=device, dtype=getattr(torch, dtype))
    plan = study.Plan(
        steps=steps, batch=batch, length=length, learning_rate=rate, beta=beta,
        references=references, lora=lora,
    )  # fmt: skip
    names = list(RULES) if rules == "all" else rules.split(",")
    if unknown := set(names) - set(RULES):
        raise typer.BadParameter(f"expected rules of {', '.join(RULES)}, got {sorted(unknown)[0]}")
    begun = prompts(count)
    settings = {"model": model, "dtype": dtype, "prompts": count, **study.facts(plan)}
    kept = Kept(out / "results.json", settings)
    drawn = study.references(plan, loaded, tokenizer, begun, out / "references.jsonl")
    for seed in map(int, seeds.split(",")):
        for rule in names:
            name = f"{rule}-{seed}"
            kept(
                name,
                lambda rule=rule, seed=seed, name=name: study.train(
                    plan, rule, seed, loaded, tokenizer, drawn, out / "runs" / name
                ),
            )
    # the page is about all runs of the folder
    runs = [piece for piece in kept.pieces.values() if "curves" in piece]
    runs.sort(key=lambda run: (list(RULES).index(run["rule"]), run["seed"]))
    if models:
        for seed in map(int, seeds.split(",")):
            kept(
                f"reward models, {models} steps, seed {seed}",
                lambda seed=seed: reward_study.compare(
                    loaded, tokenizer, drawn, plan.planted, out / "reward", steps=models, seed=seed
                ),
            )
    rows = [
        row
        for name, piece in kept.pieces.items()
        if name.startswith(f"reward models, {models} steps")
        for row in piece
    ]
    command = f"python python_examples/par.py --model {model} --rules {rules} --seeds {seeds}"
    facts = {name: str(value) for name, value in settings.items()}
    page.write(out / "report.html", runs, rows, facts, command=command)
    text = page.markdown(runs, rows)
    (out / "table.md").write_text(text, encoding="utf-8")
    print(text + "\n".join(["", *page.verdict_of(runs), str(out / "report.html")]))


def prompts(count: int) -> list[str]:
    """The first words of docstrings."""
    texts = {
        " ".join(entry.split()[:WORDS]): None
        for document in pocket.documents()
        if document.kind == "prose" and document.split == "train"
        for entry in document.text.split("\n\n")
        if len(entry.split()) > 3 * WORDS
    }
    found = sorted(texts)
    random.Random(0).shuffle(found)
    if len(found) < count:
        raise typer.BadParameter(f"expected at most {len(found)} prompts, got {count}")
    return found[:count]


if __name__ == "__main__":
    typer.run(main)
