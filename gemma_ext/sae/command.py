"""`gemma-ext sae train | eval | inspect | convert`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer

from gemma_ext.command_line import one_sentence
from gemma_ext.integrations.sae_files import FORMATS, load_dictionary, save_dictionary
from gemma_ext.nn.sparse_autoencoder import SparseAutoencoder, default_objective
from gemma_ext.progress import progress_bar
from gemma_ext.sae.config import TrainConfig
from gemma_ext.sae.contexts import inspect_latents
from gemma_ext.sae.opening import Opened, open_model, width_of
from gemma_ext.sae.page import summary, write_latents, write_report
from gemma_ext.sae.run import evaluate_on, train_dictionary
from gemma_ext.sae.stream import Activations
from gemma_ext.sae.tokens import count
from gemma_ext.sae.variants import ACTIVATIONS, new_dictionary

app = typer.Typer(
    help="Sparse dictionaries of activations: train, evaluate, look inside, convert.",
    no_args_is_help=True,
)

Model = Annotated[str, typer.Option(help="A folder or hub id; or pocket, pocket:small.")]
Text = Annotated[
    str | None, typer.Option(help="A .jsonl or text file, hf:NAME[:SPLIT], or pocket.")
]
Heldout = Annotated[
    str | None, typer.Option(help="Text to evaluate on; a twentieth of --text by default.")
]
Length = Annotated[int, typer.Option(help="Tokens of a row.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, auto.")]
Dtype = Annotated[str, typer.Option(help="Of the model's weights: auto, float32, bfloat16.")]
Site = Annotated[
    str,
    typer.Option(help="A block's number, blocks.N.hook_mlp_out, ..., or the path of a module."),
]
SiteOfFile = Annotated[
    str | None, typer.Option(help="As of train; by default what the dictionary's file says.")
]
Against = Annotated[
    list[str] | None,
    typer.Option(help="A model that reads the same tokens, for a crosscoder; more than once."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]
Dictionary = Annotated[
    Path, typer.Argument(help="Folder or file of any known format, or hf:REPOSITORY:FOLDER.")
]


@app.command()
def train(
    model: Model = "pocket",
    against: Against = None,
    site: Site = "1",
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("out/sae"),
    features: Annotated[int, typer.Option(help="Latents F.")] = 2048,
    activation: Annotated[str, typer.Option(help=f"{', '.join(ACTIVATIONS)}.")] = "topk",
    k: Annotated[float, typer.Option(help="Active latents per token, where they are chosen.")] = 32,
    widths: Annotated[
        str | None, typer.Option(help="Nested prefixes, as 256,1024,2048 (Matryoshka).")
    ] = None,
    sparsity: Annotated[
        float | None, typer.Option(help="Weight of the sparsity term of relu, gated, jumprelu.")
    ] = None,
    tokens: Annotated[str, typer.Option(help="Activations to train on, as 500k or 20M.")] = "500k",
    batch: Annotated[int, typer.Option(help="Activations per step.")] = 2048,
    buffer: Annotated[str, typer.Option(help="Activations shuffled among each other.")] = "64k",
    rate: Annotated[
        float | None, typer.Option(help="Learning rate; 2e-4 / sqrt(F / 2^14) by default.")
    ] = None,
    text: Text = None,
    read: Annotated[
        str | None, typer.Option(help="Tokens of --text to read, if fewer than --tokens.")
    ] = None,
    heldout: Heldout = None,
    context: Length = 128,
    device: Device = "auto",
    dtype: Dtype = "auto",
    bfloat16: Annotated[bool, typer.Option("--bfloat16", help="Products in bfloat16.")] = False,
    cache: Annotated[Path | None, typer.Option(help="Keep activations in this folder.")] = None,
    tensorboard: Annotated[Path | None, typer.Option(help="Folder of live metrics.")] = None,
    seed: Annotated[int, typer.Option(help="Of weights and orders.")] = 0,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 500,
    rows: Annotated[int, typer.Option(help="Held-out rows to evaluate on.")] = 64,
    quiet: Quiet = False,
) -> None:
    """Train a dictionary on a model's activations and write it as a SAELens folder.

    With --against it is a crosscoder of all the models, in the format of science-of-finetuning.
    Run again, it goes on where it stopped. Under torchrun every process is a rank.

    Example: gemma-ext sae train --model pocket --site 1 --activation topk --k 32
    """
    with one_sentence("sae train"):
        steps = max(1, count(tokens) // batch)
        config = TrainConfig(
            steps=steps, learning_rate=rate, bfloat16=bfloat16, save_every=save_every
        )
        opened = _open(model, against, text, heldout, context, device, dtype, count(read or tokens))
        width, sources = width_of(opened.model, site), len(opened.models)
        sae = new_dictionary(width, features, activation, k, sources=sources, seed=seed)
        objective = default_objective(sae, sparsity)
        if widths is not None:
            objective = replace(objective, widths=tuple(int(w) for w in widths.split(",")))
        done = train_dictionary(
            opened,
            site,
            sae.to(opened.model.device),
            config,
            out,
            objective=objective,
            batch=batch,
            buffer=count(buffer),
            seed=seed,
            cache=cache,
            tensorboard=tensorboard,
            evaluated=rows,
            show_progress=not quiet,
        )
        if done is not None:
            typer.echo(summary(done.evaluations))
            typer.echo(done.folder)
            typer.echo(done.page)


@app.command(name="eval")
def evaluation(
    dictionary: Dictionary,
    model: Model = "pocket",
    against: Against = None,
    site: SiteOfFile = None,
    out: Annotated[Path, typer.Option(help="The page.")] = Path("out/sae/eval.html"),
    rows: Annotated[int, typer.Option(help="Held-out rows to look at.")] = 64,
    text: Text = None,
    heldout: Heldout = None,
    context: Length = 128,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quiet: Quiet = False,
) -> None:
    """Measure a dictionary of any known format on held-out text."""
    with one_sentence("sae eval"):
        opened = _open(model, against, text, heldout, context, device, dtype, None)
        sae, place = _load(dictionary, opened, site)
        found = evaluate_on(sae, opened, place, rows=rows, show_progress=not quiet)
        write_report(
            out,
            title=f"{dictionary} on {model}",
            evaluations=found,
            facts=_facts(dictionary, sae, model, place),
        )
        typer.echo(summary(found))
        typer.echo(out)


@app.command(name="inspect")
def inspection(
    dictionary: Dictionary,
    model: Model = "pocket",
    against: Against = None,
    site: SiteOfFile = None,
    out: Annotated[Path, typer.Option(help="The page.")] = Path("out/sae/latents.html"),
    latents: Annotated[
        str | None, typer.Option(help="Their numbers, as 3,17; by default a spread of live ones.")
    ] = None,
    number: Annotated[int, typer.Option("--count", help="Latents without --latents.")] = 20,
    contexts: Annotated[int, typer.Option(help="Of a latent.")] = 10,
    rows: Annotated[int, typer.Option(help="Held-out rows to look at.")] = 256,
    text: Text = None,
    heldout: Heldout = None,
    context: Length = 128,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quiet: Quiet = False,
) -> None:
    """Show what latents fire on: their strongest contexts, as a page."""
    with one_sentence("sae inspect"):
        opened = _open(model, against, text, heldout, context, device, dtype, None)
        sae, place = _load(dictionary, opened, site)
        tokens, places = opened.heldout[:rows], [place] * len(opened.models)
        stream = Activations(opened.models, places, tokens, batch=1, buffer=1)
        wanted = None if latents is None else [int(part) for part in latents.split(",")]
        with progress_bar("looking", len(tokens), not quiet) as advance:
            found, densities = inspect_latents(
                sae, stream, latents=wanted, count=number, contexts=contexts, progress=advance
            )
        write_latents(
            out,
            found,
            densities,
            lambda token: opened.tokenizer.decode([token]),
            title=f"Latents of {dictionary}",
            facts=_facts(dictionary, sae, model, place)
            | {"tokens": f"{tokens.numel():,} of held-out text"},
        )
        typer.echo(out)


@app.command()
def convert(
    dictionary: Dictionary,
    out: Annotated[Path, typer.Argument(help="Folder; a .pt file for openai.")],
    to: Annotated[str, typer.Option(help=f"{', '.join(FORMATS)}.")] = "saelens",
) -> None:
    """Write a dictionary in another library's format."""
    with one_sentence("sae convert"):
        save_dictionary(load_dictionary(dictionary), out, to)
        typer.echo(out)


def _open(
    model: str,
    against: list[str] | None,
    text: str | None,
    heldout: str | None,
    context: int,
    device: str,
    dtype: str,
    tokens: int | None,
) -> Opened:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return open_model(
        model,
        text=text,
        heldout=heldout,
        context=context,
        tokens=tokens,
        device=device,
        dtype=dtype,
        against=against or (),
    )


def _load(path: Path, opened: Opened, site: str | None) -> tuple[SparseAutoencoder, str]:
    sae = load_dictionary(path).to(opened.model.device)
    place = site or sae.metadata.get("hf_hook_point_in") or sae.metadata.get("hook_name")
    if place is None:
        raise ValueError(f"site: expected --site, since {path} does not say where it belongs")
    return sae, place


def _facts(path: Path, sae: SparseAutoencoder, model: str, place: str) -> dict[str, str]:
    return {
        "dictionary": f"{path}: {sae.features:,} latents of width {sae.width}, {sae.activation}",
        "model": model,
        "site": place,
    }
