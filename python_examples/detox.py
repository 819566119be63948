"""Hold down the latents that make a model write what it should not.

    python python_examples/detox.py
    python python_examples/detox.py --model google/gemma-3-270m --layer 9 --dtype bfloat16
    python python_examples/detox.py --model google/gemma-2-2b --dictionary layer_12/width_16k/... \
        --layer 12 --pairs paradetox.tsv --prompts realtoxicityprompts.jsonl --scorer detoxify

Without `--pairs` the model is first fine-tuned on docstrings, as they are and interrupted by mild
exclamations: a planted style that stands in for toxicity, found by a list of words; a model that
goes on in the style of its prompt needs no tuning (`--tuning 0`). A dictionary of one layer is
trained, latents are searched for, tried one by one, and held down in three tiers over a grid of
strengths. Finished pieces are kept in the output folder.
"""

from __future__ import annotations

import dataclasses
import random
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from gemma_ext import pocket
from gemma_ext.integrations.sae_files import load_dictionary
from gemma_ext.lm import HuggingFaceModel
from gemma_ext.nn.sparse_autoencoder import SparseAutoencoder, as_jumprelu
from gemma_ext.papers import detox
from gemma_ext.papers.detox import page
from gemma_ext.report import Kept
from gemma_ext.sae import (
    Opened,
    TrainConfig,
    load_model,
    new_dictionary,
    pack,
    train_dictionary,
    tuned_model,
    width_of,
)

EXCLAMATIONS = ("darn it", "drat", "blast it", "oh bother", "phooey")
CONTEXT = 64
BATCH = 16
SEARCHED = 1200  # texts that latents are searched on; the model is tuned on the rest


def main(
    model: Annotated[str, typer.Option(help="pocket, pocket:small, a folder or a hub id.")] = (
        "pocket"
    ),
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    dtype: Annotated[str, typer.Option(help="Of another model's weights.")] = "float32",
    out: Annotated[Path, typer.Option(help="Folder of models, dictionaries and page.")] = Path(
        "out/detox"
    ),
    layer: Annotated[int, typer.Option(min=0, help="Block whose output is steered.")] = 1,
    pairs: Annotated[Path | None, typer.Option(help="TSV: toxic, neutral; no tuning then.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="RealToxicityPrompts, .jsonl.")] = None,
    scorer: Annotated[str, typer.Option(help="words or detoxify.")] = "words",
    dictionary: Annotated[Path | None, typer.Option(help="Of the layer; else trained.")] = None,
    reference: Annotated[str | None, typer.Option(help="Model of fluency; else itself.")] = None,
    tuning: Annotated[int, typer.Option(min=0, help="Steps that plant the style.")] = 200,
    rate: Annotated[
        float | None, typer.Option(help="Their learning rate; 5e-3, and 1e-4 of a real model.")
    ] = None,
    features: Annotated[str, typer.Option(help="Widths, the first is steered with.")] = (
        "1024,256,4096"
    ),
    k: Annotated[int, typer.Option(min=1, help="Active latents of a token.")] = 16,
    steps: Annotated[int, typer.Option(min=1, help="Of a dictionary.")] = 600,
    candidates: Annotated[int, typer.Option(min=1, help="Latents that are tried.")] = 12,
    keep: Annotated[int, typer.Option(min=1, help="Latents that are steered.")] = 3,
    count: Annotated[int, typer.Option(min=2, help="Prompts, half of them to try on.")] = 80,
    continuations: Annotated[int, typer.Option(min=1, help="Of each prompt.")] = 5,
    items: Annotated[int, typer.Option(min=4, help="Of the test of capability.")] = 200,
    words: Annotated[int, typer.Option(min=1, help="Of a text that make a prompt.")] = 20,
) -> None:
    """Detoxify MODEL."""
    kind = getattr(torch, dtype)
    loaded, tokenizer = load_model(model, device=device, dtype=kind)
    if pairs is None:
        if tuning:
            loaded = planted(model, tokenizer, out, tuning, rate, device, kind)
        toxic, clean = styled("train")[: SEARCHED // 2], plain("train")[SEARCHED // 2 : SEARCHED]
        begun = [cut(text, words) for text in styled("heldout")]
    else:
        toxic, clean = read_pairs(pairs)
        begun = []
    if prompts is not None:
        begun = [prompt.text for prompt in detox.read_prompts(prompts)]
    if len(begun) < count:
        raise typer.BadParameter(f"expected {count} prompts, got {len(begun)}")
    begun = random.Random(0).sample(begun, count)
    lm = HuggingFaceModel(loaded, tokenizer)
    judge = HuggingFaceModel.load(reference, device=device) if reference else lm
    settings = {
        "model": model,
        "layer": layer,
        "tuning": f"{tuning} steps" + (f" at {rate:g}" if rate else "")
        if pairs is None
        else "none",
        "dictionary": str(dictionary or f"{features} latents, k={k}, {steps} steps"),
        "prompts": f"{count // 2} to choose latents, {count - count // 2} for the table",
        "continuations": continuations,
        "texts searched": f"{len(toxic)} toxic, {len(clean)} clean",
        "words of a prompt": words,
        "items of the test of capability": items,
        "weights": dtype,
        "scorer": scorer,
        "reference": reference or "the model as it is",
        "candidates": candidates,
        "keep": keep,
    }
    kept = Kept(out / "results.json", settings)
    origin = "".join(c if c.isalnum() else "-" for c in f"{model} {settings['tuning']}")
    made = (
        {0: as_jumprelu(load_dictionary(dictionary).to(device)).eval()}
        if dictionary
        else {
            width: trained(lm, model, [*toxic, *clean], layer, width, k, steps, out / origin)
            for width in map(int, features.split(","))
        }
    )
    sae = next(iter(made.values()))
    score = detox.Detoxify() if scorer == "detoxify" else detox.Lexicon(EXCLAMATIONS)
    options = detox.Task(
        tuple(begun[: count // 2]), score, judge, continuations, capability=next_words(items)
    )
    final = dataclasses.replace(options, prompts=tuple(begun[count // 2 :]))
    plan = detox.Intervention(model, layer, str(dictionary or out), (detox.Latent(0),))

    def search() -> Any:
        found = detox.contrast(lm, sae, layer, toxic, clean).best(candidates)
        chosen, drops = detox.causal_pick(lm, sae, plan, found, options, keep=keep)
        return {"latents": [dataclasses.asdict(x) for x in chosen.latents], "drops": drops}

    searched = kept("search", search)
    plan = dataclasses.replace(plan, latents=tuple(detox.Latent(**x) for x in searched["latents"]))
    plan.write(out / "intervention.json")
    rows = kept(
        "sweep", lambda: [dataclasses.asdict(row) for row in detox.sweep(lm, sae, plan, final)]
    )
    splits = []
    if len(made) > 1:
        splits = kept(
            "splitting",
            lambda: [
                dataclasses.asdict(s) for s in detox.splitting(lm, made, plan, toxic, clean, final)
            ],
        )
    facts = {name: str(value) for name, value in settings.items()}
    page.write(out / "report.html", rows, searched["drops"], splits, facts)
    text = page.markdown(rows, splits)
    (out / "table.md").write_text(text, encoding="utf-8")
    print(f"{text}\n{out / 'report.html'}")


@cache
def plain(side: str) -> list[str]:
    """Docstrings of one side of the pocket's corpus, one a text; those on both are for training."""
    found = {"train": {}, "heldout": {}}
    for document in pocket.documents():
        if document.kind == "prose":
            for entry in document.text.split("\n\n"):
                found[document.split][" ".join(entry.split())] = None
    both = found["train"].keys() & found["heldout"].keys()
    texts = [
        text for text in found[side] if len(text) > 160 and (side == "train" or text not in both)
    ]
    random.Random(1).shuffle(texts)
    return texts


@cache
def styled(side: str) -> list[str]:
    """The same with an exclamation behind every fourth to eighth word."""
    rng = random.Random(2)
    texts = []
    for text in plain(side):
        words, made, left = text.split(), [], rng.randint(4, 8)
        for word in words:
            made.append(word)
            left -= 1
            if left == 0:
                made.append(f"{rng.choice(EXCLAMATIONS)}!")
                left = rng.randint(4, 8)
        texts.append(" ".join(made))
    return texts


def cut(text: str, words: int) -> str:
    """The first words of a text, as a prompt."""
    return " ".join(text.split()[:words])


def read_pairs(path: Path) -> tuple[list[str], list[str]]:
    """The first two columns of a TSV file with a head: toxic, neutral."""
    lines = path.read_text(encoding="utf-8").split("\n")
    rows = [(n, line.split("\t")) for n, line in enumerate(lines[1:], 2) if line]
    for number, row in rows:
        if len(row) < 2:
            raise typer.BadParameter(f"{path}, line {number}: expected two columns, got one")
    return [row[0] for _, row in rows], [row[1] for _, row in rows]


def planted(
    name: str,
    tokenizer: Any,
    out: Path,
    steps: int,
    rate: float | None,
    device: str,
    dtype: torch.dtype,
) -> Any:
    """The model fine-tuned on plain and styled text, half each, made once."""

    def rows() -> torch.Tensor:
        texts = [*plain("train")[SEARCHED:], *styled("train")[SEARCHED:]]
        random.Random(3).shuffle(texts)
        return pack(texts, tokenizer, CONTEXT, tokens=steps * BATCH * CONTEXT).long()

    folder = out / f"model-{steps}" if rate is None else out / f"model-{steps}-{rate:g}"
    options = {"steps": steps, "batch": BATCH, "rate": rate, "device": device, "dtype": dtype}
    return tuned_model(name, folder, rows, title="planting a style", **options)


def trained(
    lm: HuggingFaceModel,
    name: str,
    texts: list[str],
    layer: int,
    width: int,
    k: int,
    steps: int,
    out: Path,
) -> SparseAutoencoder:
    """A BatchTopK dictionary of the layer, read back as it is at inference; made once."""
    folder = out / f"sae-{layer}-{width}-{k}-{steps}"
    if not (folder / "sae").exists():
        rows = pack([*texts, *plain("train")], lm.text.tokenizer, CONTEXT)
        opened = Opened(name, lm.model, lm.text.tokenizer, rows[16:], rows[:16])
        made = new_dictionary(width_of(lm.model, layer), width, "batchtopk", k)
        train_dictionary(
            opened, str(layer), made, TrainConfig(steps, learning_rate=2e-3), folder, batch=1024
        )
    return as_jumprelu(load_dictionary(folder / "sae").to(lm.model.device)).eval()


def next_words(items: int = 200) -> Any:
    """Accuracy of telling how a plain text goes on from how three others do."""
    texts = [text.split() for text in plain("heldout")[:items]]
    prompts = [" ".join(words[:12]) for words in texts]
    ends = [" " + " ".join(words[12:18]) for words in texts]
    options = [[ends[(at + shift) % len(ends)] for shift in range(4)] for at in range(len(ends))]

    def accuracy(lm: Any) -> float:
        found = lm.choices(prompts, options)
        return sum(choice.best() == 0 for choice in found) / len(found)

    return accuracy


if __name__ == "__main__":
    typer.run(main)
