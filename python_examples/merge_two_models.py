"""Merge two fine-tunes of one base by recipes, and see what each of the five models can do.

    python python_examples/merge_two_models.py
    python python_examples/merge_two_models.py --model my/chat --other my/code --base my/base \\
        --text chat.txt --other-text code.txt

Writes a soup and a TIES merge as folders that transformers loads, the recipes beside them, and a
page about the models. `--model pocket` (or pocket:small) needs no network: the pocket and its two
experts, for prose and for network code, are trained here on first use. An interrupted run goes on
where it stopped; merges that are there are not made again.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from gemma_ext.integrations.transformers import patch
from gemma_ext.souping.recipes.explain import explain_recipe
from gemma_ext.souping.recipes.recipe import read_recipes
from gemma_ext.souping.recipes.run import Options, open_recipe, run_recipes

RECIPES = {
    "soup": """\
merge_method: linear
models:
  - {{model: {one}, parameters: {{weight: 0.5}}}}
  - {{model: {other}, parameters: {{weight: 0.5}}}}
""",
    "ties": """\
merge_method: ties
base_model: {base}
models:
  - {{model: {one}, parameters: {{weight: 1.0, density: 0.5}}}}
  - {{model: {other}, parameters: {{weight: 1.0, density: 0.5}}}}
""",
}
EXPERTS = ("prose", "network")
CONTEXT = 128  # tokens of a scored window
WINDOWS = 32  # at most


def main(
    model: Annotated[
        str, typer.Option(help="A fine-tune: a folder or a hub id; or pocket, pocket:small.")
    ] = "pocket",
    other: Annotated[str | None, typer.Option(help="The other fine-tune.")] = None,
    base: Annotated[str | None, typer.Option(help="What both were made of.")] = None,
    text: Annotated[Path | None, typer.Option(help="Text that MODEL was tuned for.")] = None,
    other_text: Annotated[Path | None, typer.Option(help="Text that OTHER was tuned for.")] = None,
    device: Annotated[str, typer.Option(help="That merges and scores: cpu, cuda.")] = "cpu",
    out: Annotated[Path, typer.Option(help="Folder of merges, recipes and page.")] = Path(
        "out/merge"
    ),
) -> None:
    """Merge MODEL and OTHER two ways and print the perplexity of all five on both texts."""
    from transformers import AutoTokenizer

    pocket = model.split(":")[0] == "pocket"
    if pocket:
        places = pocket_folders(model.partition(":")[2] or "nano")
    elif not (other and base and text and other_text):
        raise typer.BadParameter("with --model also give --other, --base, --text, --other-text")
    else:
        places = {"base": base, "one": model, "other": other}
    out.mkdir(parents=True, exist_ok=True)
    for name, template in RECIPES.items():
        path = out / f"{name}.yml"
        path.write_text(template.format(**places), encoding="utf-8")
        recipes = read_recipes(path)
        options = Options(device=device, show_progress=True)
        if not (out / name / "config.json").exists():
            run_recipes(recipes, out / name, options)
    explain_recipe(open_recipe(recipes[0]), out / "explain.html")

    tokenizer = AutoTokenizer.from_pretrained(places["base"])
    if pocket:
        texts = pocket_texts(tokenizer)
    else:
        files = {"one's text": text, "other's text": other_text}
        texts = {
            name: torch.tensor(tokenizer(path.read_text(encoding="utf-8")).input_ids)
            for name, path in files.items()
        }
    windows = {name: windows_of(ids) for name, ids in texts.items()}
    print(f"{'perplexity on':<14}" + "".join(f"{name:>14}" for name in windows))
    for name, place in {**places, **{name: out / name for name in RECIPES}}.items():
        scores = perplexities(str(place), windows.values(), device)
        print(f"{name:<14}" + "".join(f"{score:>14.2f}" for score in scores))
    print(out / "explain.html")


def pocket_folders(size: str) -> dict[str, str]:
    """The pocket and two of its experts."""
    from gemma_ext.pocket import expert_folder
    from gemma_ext.pocket.store import pocket_folder

    one, other = (expert_folder(domain, size) for domain in EXPERTS)
    return {"base": str(pocket_folder(size)), "one": str(one), "other": str(other)}


def pocket_texts(tokenizer) -> dict[str, Tensor]:
    """Held-out text of the experts' domains."""
    from gemma_ext.pocket import load_domain

    return {domain: load_domain(domain, tokenizer).test for domain in EXPERTS}


def windows_of(ids: Tensor) -> Tensor:
    """[n] ids as [rows, CONTEXT].

    Raises:
        ValueError: not one window.
    """
    rows = min(ids.numel() // CONTEXT, WINDOWS)
    if not rows:
        raise ValueError(f"text: expected at least {CONTEXT} tokens, got {ids.numel()}")
    return ids[: rows * CONTEXT].view(rows, CONTEXT)


@torch.no_grad()
def perplexities(place: str, texts, device: str) -> list[float]:
    """exp of the mean loss over the windows of each text, logits never held."""
    from transformers import AutoModelForCausalLM

    network = patch(AutoModelForCausalLM.from_pretrained(place).to(device).eval(), train_only=False)
    found = []
    for windows in texts:
        parts = windows.to(device).split(8)
        losses = [float(network(input_ids=part, labels=part).loss) * len(part) for part in parts]
        found.append(math.exp(sum(losses) / len(windows)))
    return found


if __name__ == "__main__":
    typer.run(main)
