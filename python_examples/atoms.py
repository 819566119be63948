"""Learn atoms of a model's hidden states and hold them against controls.

    python python_examples/atoms.py
    python python_examples/atoms.py --model google/gemma-3-270m --layers 8 --windows 200

A dictionary is learned for each layer from text of the pocket's corpus and measured on files that
it has not seen, beside a random dictionary and the principal axes; one layer is learned again from
fewer states and with more or fewer atoms; and worlds with known atoms say how many are found.

Finished pieces are kept in the output folder; a run that was interrupted goes on behind them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from gemma_ext import pocket
from gemma_ext.papers import atoms
from gemma_ext.papers.atoms import page, study
from gemma_ext.papers.atoms.states import hidden_states
from gemma_ext.progress import progress_bar
from gemma_ext.report import Kept
from gemma_ext.sae import load_model, pocket_of

CONTEXT = 128


def main(
    model: Annotated[str, typer.Option(help="pocket, pocket:small, a folder or a hub id.")] = (
        "pocket"
    ),
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    out: Annotated[Path, typer.Option(help="Folder of dictionaries and page.")] = Path("out/atoms"),
    layers: Annotated[str, typer.Option(help="Numbers from 0, or 'all'.")] = "all",
    windows: Annotated[int, typer.Option(min=1, help="Of 128 tokens, to learn from.")] = 400,
    held_out: Annotated[int, typer.Option(min=1, help="Windows to measure on.")] = 60,
    ratio: Annotated[int, typer.Option(min=1, help="Atoms per dimension.")] = 4,
    active: Annotated[float, typer.Option(help="Atoms per state that training aims at.")] = 8.0,
    steps: Annotated[int, typer.Option(min=1, help="Of a training.")] = 400,
    batch: Annotated[int, typer.Option(min=1, help="States of a step.")] = 512,
    moment: Annotated[str, typer.Option(help="centred, or raw as in the paper.")] = "centred",
    norm: Annotated[str, typer.Option(help="Of errors: plain or atomic.")] = "plain",
    scaling: Annotated[int, typer.Option(min=0, help="Sizes of states and of atoms.")] = 3,
) -> None:
    """Learn atoms of MODEL, layer by layer."""
    loaded, tokenizer = load_model(model, device=device, dtype=torch.float32)
    streams = streams_of(model, tokenizer)
    count = loaded.config.num_hidden_layers
    chosen = list(range(count)) if layers == "all" else [int(n) for n in layers.split(",")]
    settings: dict[str, Any] = {
        "model": model,
        "windows": windows,
        "held_out": held_out,
        "ratio": ratio,
        "active": active,
        "steps": steps,
        "batch": batch,
        "moment": moment,
        "norm": norm,
    }
    kept = Kept(out / "results.json", settings)
    width = loaded.config.hidden_size
    rate = 1e-2 * (128 / width) ** 0.5  # the entries of unit rows shrink so
    recipe = atoms.Recipe(ratio * width, active, norm=norm, steps=steps, batch=batch, rate=rate)
    sides = [cut(ids, n) for ids, n in zip(streams, (windows, held_out), strict=True)]
    sides = [side.to(device) for side in sides]
    with progress_bar("hidden states", sum(map(len, sides)), True) as advance:
        x, unseen = (hidden_states(loaded, side, chosen, advance=advance) for side in sides)

    found: dict[int, Any] = {}
    for layer in chosen:
        with progress_bar(f"atoms of layer {layer}", steps, True) as advance:

            def learn_layer(layer: int = layer, advance: Any = advance) -> study.Record:
                made, record = study.layer(x[layer], unseen[layer], recipe, moment, advance=advance)
                facts = {
                    "layer": layer,
                    "site": "residual",
                    **settings,
                    **record["atoms"],
                    "q_star_random": record["random"]["q_star"],
                    "k_hist": record["active"],
                }
                made.save(out / f"layer-{layer}", facts)
                return record

            found[layer] = kept(f"layer {layer}", learn_layer)

    middle = chosen[len(chosen) // 2]
    cells = []
    for n in study.sizes(len(x[middle]), scaling, 8):
        for features in study.sizes(2 * recipe.features, scaling, 4):
            with progress_bar(f"{n} states, {features} atoms", steps, True) as advance:

                def learn_cell(
                    n: int = n, features: int = features, advance: Any = advance
                ) -> study.Record:
                    return study.scaling(
                        x[middle], unseen[middle], recipe, n, features, moment, advance=advance
                    )

                cells.append(kept(f"{n} states, {features} atoms", learn_cell))

    worlds = {}
    for name, (features, d, k) in {
        "64 atoms in 32 dimensions, 2 active": (64, 32, 2),
        "128 atoms in 64 dimensions, 3 active": (128, 64, 3),
    }.items():
        plan = atoms.Recipe(features, k, steps=2 * steps, batch=512, rate=1e-2)
        with progress_bar(name, 2 * plan.steps, True) as advance:

            def learn_world(
                sizes: tuple[int, int, int] = (features, d, k),
                plan: atoms.Recipe = plan,
                advance: Any = advance,
            ) -> study.Record:
                return study.known_world(*sizes, plan, advance=advance)

            worlds[name] = kept(name, learn_world)

    facts = {name: str(value) for name, value in settings.items()}
    facts["scaling"] = f"layer {middle}"
    page.write(out / "report.html", found, cells, worlds, facts)
    text = page.markdown(found, worlds)
    (out / "table.md").write_text(text, encoding="utf-8")
    print(f"{text}\n{out / 'report.html'}")


def streams_of(name: str, tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Token streams of training and held-out text."""
    if size := pocket_of(name):
        own = pocket.load_text(size)
        return own.train_ids, own.heldout_ids
    texts = pocket.documents(3_000_000)
    train, held_out = (
        tokenizer(
            "\n".join(doc.text for doc in texts if doc.split == side),
            return_tensors="pt",
            add_special_tokens=False,
            verbose=False,
        ).input_ids[0]
        for side in ("train", "heldout")
    )
    return train, held_out


def cut(ids: Tensor, count: int) -> Tensor:
    """The first `count` windows [W, T]."""
    if ids.numel() < count * CONTEXT:
        sys.exit(f"expected {count * CONTEXT} tokens of text, got {ids.numel()}")
    return ids[: count * CONTEXT].view(count, CONTEXT)


if __name__ == "__main__":
    typer.run(main)
