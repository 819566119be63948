"""`gemma-ext salsa`: soup, train, compare."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from gemma_ext.files import read_json, write_json
from gemma_ext.papers.salsa import page
from gemma_ext.papers.salsa.folder import record, save
from gemma_ext.papers.salsa.opening import (
    CHOICES,
    REFERENCES,
    checked_mode,
    choose_weights,
    open_parents,
    open_reference,
    open_start,
)
from gemma_ext.papers.salsa.sft import Pairs, read_pairs
from gemma_ext.papers.salsa.soup import soup as make_soup
from gemma_ext.papers.salsa.study import measure
from gemma_ext.papers.salsa.training import Options, SalsaTrainer
from gemma_ext.ppo import Prompts, summary, train_policy
from gemma_ext.ppo.command import join_ranks, make_config, parse_flags
from gemma_ext.ppo.opening import load_causal
from gemma_ext.ppo.rewards import Rewards
from gemma_ext.ppo.run import SAMPLES

RECORD = "salsa.json"
_HELD = "A .jsonl with prompt and completion, or text: the SFT's held-out data."
app = typer.Typer(
    help="SALSA: hold a policy near the average of fine-tuned models.",
    no_args_is_help=True,
    add_completion=False,
)
Models = Annotated[list[str], typer.Argument(help="Parents: folders or ids.", show_default=False)]
Weights = Annotated[str | None, typer.Option(help="Of each parent, as 0.3,0.7.")]
Choose = Annotated[str, typer.Option(help=f"Where none are given: {', '.join(CHOICES)}.")]
HeldOut = Annotated[Path | None, typer.Option(help=_HELD)]
Base = Annotated[str | None, typer.Option(help="The model of parents that are adapters.")]
Tolerance = Annotated[float, typer.Option(help="Nats that a soup may be over its worst parent.")]


@app.command()
def soup(
    parents: Models,
    out: Annotated[Path, typer.Option(help="Folder that is written.")],
    weights: Weights = None,
    choose: Choose = "even",
    held_out: HeldOut = None,
    tolerance: Tolerance = 0.0,
    base: Base = None,
    dtype: Annotated[str, typer.Option(help="Of the soup: auto, float32, bfloat16.")] = "auto",
    rounding: Annotated[str, typer.Option(help="nearest or stochastic.")] = "nearest",
    seed: Annotated[int, typer.Option(help="Of stochastic rounding.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
) -> None:
    """Average PARENTS into a model with soup.json, refused where it is worse than all of them.

    \b
    Example: gemma-ext salsa soup sft-1 sft-2 --out soup --held-out heldout.jsonl
    """
    with _one_sentence("soup"):
        opened = open_parents(parents, base=base, device=device)
        batches = _batches(held_out, opened.tokenizer)
        given = _weights(weights) or choose_weights(choose, opened.all, batches)
        kind = None if dtype == "auto" else _dtype(dtype)
        made = make_soup(opened.all, given, dtype=kind, rounding=rounding, seed=seed)
        mode = checked_mode(opened.all, made, batches, tolerance)
        checks = {} if mode is None else {"parents": mode.parents, "soup": mode.soup}
        entry = record(opened.models, given, made, rounding=rounding, seed=seed, checks=checks)
        save(out, made, entry, opened.tokenizer)
        if mode is None:
            typer.echo("not checked against its parents: no --held-out", err=True)
        else:
            losses = ", ".join(f"{loss:.4f}" for loss in mode.parents)
            typer.echo(f"held-out loss {mode.soup:.4f}, parents {losses}")
    typer.echo(out)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train(
    context: typer.Context,
    parents: Annotated[str, typer.Option(help="Folders or ids, with commas; the first is sft1.")],
    prompts: Annotated[str, typer.Option(help="As of gemma-ext ppo.")],
    reward: Annotated[list[str], typer.Option(help="module:function, or a reward model.")],
    out: Annotated[Path, typer.Option(help="Folder of the run.")],
    reference: Annotated[str, typer.Option(help=f"One of {', '.join(REFERENCES)}.")] = "soup",
    init: Annotated[str, typer.Option(help="sft1, soup, or a folder or id.")] = "sft1",
    weights: Weights = None,
    choose: Choose = "even",
    held_out: HeldOut = None,
    tolerance: Tolerance = 0.0,
    base: Annotated[
        str | None, typer.Option(help="Model before the SFT, to measure divergence from.")
    ] = None,
    decay: Annotated[float, typer.Option(help="Of ema, for each step.")] = 0.99,
    mixup: Annotated[float, typer.Option(help="Of sync.")] = 0.6,
    sync_every: Annotated[int, typer.Option(min=1, help="Steps between syncs.")] = 512,
    measure_prompts: Annotated[
        str | None, typer.Option(help="Held-out prompts for `compare`.")
    ] = None,
    every: Annotated[int, typer.Option(min=1, help="Steps between measurements.")] = 50,
    name: Annotated[str | None, typer.Option(help="Of the method, in `compare`.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """PPO from a fine-tuned model, held near the average of several.

    Every field of gemma_ext.ppo.PPOConfig is a flag, and so is every one of
    gemma_ext.papers.salsa.training.Options: --kl-coef 0.02 --kl-warmup 50 --min-length 8
    --length-normalised --subtract-step-zero --collapse-patience none. The same command goes on
    where an interrupted run stopped.

    \b
    Example: gemma-ext salsa train --parents sft-1,sft-2 --prompts p.jsonl --reward r:f --out run
    """
    with _one_sentence("train"):
        flags = parse_flags(context.args)
        options = _options(flags)
        config = make_config({"output_dir": str(out), **flags})
        join_ranks()
        opened = open_parents(parents.split(","), dtype="float32", device=device)
        batches = _batches(held_out, opened.tokenizer)
        given = _weights(weights) or choose_weights(choose, opened.all, batches)
        made = make_soup(opened.all, given)
        if "soup" in (reference, init):
            checked_mode(opened.all, made, batches, tolerance)
        anchors: dict[str, Any] = {"sft_1": opened.all[0], "soup": made}
        if base is not None:
            anchors["theta_0"] = load_causal(base, "float32", device)[0]
        trainer = SalsaTrainer(
            config,
            open_start(init, opened.all, given, dtype="float32", device=device),
            open_reference(
                reference, opened.all, given, decay=decay, mixup=mixup, every=sync_every
            ),
            Rewards(list(reward), device=device),
            prompts,
            tokenizer=opened.tokenizer,
            options=options,
            anchors=anchors,
            show_progress=not quiet,
        )
        label = name or f"{reference} from {init}"
        kept = {"method": label, "beta": config.kl_coef, "seed": config.seed}
        points = _measuring(trainer, measure_prompts, anchors, every, out / RECORD, kept)
        done = train_policy(
            trainer,
            title=f"{label}: {', '.join(opened.models)}",
            facts={"parents": parents, "reference": reference, "init": init, "weights": str(given)},
        )
        samples = read_json(out / SAMPLES)["after"]
        final = {"zero": trainer.zero, "stopped": trainer.stopped, "samples": samples}
        write_json(out / RECORD, {**kept, **final, "points": points})
        typer.echo(summary(done.history))
        if trainer.stopped:
            typer.echo(f"stopped at step {trainer.step}: {trainer.stopped}", err=True)
    typer.echo(f"{done.folder}\n{done.page}")


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of `train`.", show_default=False)],
    baseline: Annotated[str, typer.Option(help="Name of a method.")] = "frozen from sft1",
    out: Annotated[Path | None, typer.Option(help="Page that is written.")] = None,
) -> None:
    """Compare runs at equal measured divergence, method by method, with intervals over seeds.

    \b
    Example: gemma-ext salsa compare runs/* --out report.html
    """
    with _one_sentence("compare"):
        records = []
        for run in runs:
            if not (run / RECORD).exists():
                raise ValueError(f"expected {RECORD} in {run}, got none")
            records.append(read_json(run / RECORD))
        for entry, run in zip(records, runs, strict=True):
            if not entry["points"]:
                raise ValueError(f"{run}: expected measurements (--measure-prompts), got none")
        if baseline not in {entry["method"] for entry in records}:
            known = ", ".join(dict.fromkeys(entry["method"] for entry in records))
            raise ValueError(f"baseline: expected one of {known}, got {baseline!r}")
        typer.echo(page.markdown(records, baseline=baseline))
        if out is not None:
            facts = {str(run): entry["method"] for entry, run in zip(records, runs, strict=True)}
            page.write(out, records, facts=facts, baseline=baseline)
            typer.echo(out)


def _measuring(
    trainer: SalsaTrainer,
    source: str | None,
    anchors: dict[str, Any],
    every: int,
    place: Path,
    kept: dict[str, Any],
) -> list[dict[str, float]]:
    """Points that grow while the trainer runs, from those of an interrupted run."""
    if source is None:
        return []
    questions = Prompts(source, trainer.tokenizer, trainer.config.max_prompt_length)
    points = read_json(place)["points"] if place.exists() else []

    def measured(trainer: SalsaTrainer, step: int, line: Any = None) -> None:
        if step % every == 0 or step == trainer.steps:
            del points[sum(point["step"] < step for point in points) :]
            found = measure(trainer, questions, anchors, trainer.config.seed)
            points.append({"step": step, **found})
            write_json(place, {**kept, "points": points})

    if not points:
        measured(trainer, 0)
    trainer.callbacks.append(measured)
    return points


def _options(flags: dict[str, str]) -> Options:
    """Takes the fields of `Options` out of the flags."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(Options):
        if field.name in flags:
            text = flags.pop(field.name)
            kind = str(field.type).split(" ")[0]
            try:
                if "None" in str(field.type) and text.lower() == "none":
                    found[field.name] = None
                elif kind == "bool":
                    found[field.name] = {"true": True, "false": False}[text.lower()]
                else:
                    found[field.name] = {"int": int, "float": float}[kind](text)
            except (KeyError, ValueError):
                raise ValueError(f"{field.name}: expected {kind}, got {text!r}") from None
    return Options(**found)


def _batches(path: Path | None, tokenizer: Any) -> list[Any]:
    return [] if path is None else Pairs(read_pairs(path), tokenizer).batches(16)


def _weights(text: str | None) -> list[float] | None:
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"weights: expected numbers with commas, got {text!r}") from None


def _dtype(name: str) -> torch.dtype:
    if name not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype: expected auto, float32, bfloat16 or float16, got {name!r}")
    return getattr(torch, name)


@contextmanager
def _one_sentence(command: str) -> Iterator[None]:
    """What is amiss as one line."""
    try:
        yield
    except (ValueError, TypeError, ImportError, OSError) as error:
        raise SystemExit(f"gemma-ext salsa {command}: {error}") from None
