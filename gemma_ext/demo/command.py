"""`gemma-ext demo`."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from gemma_ext import _loader
from gemma_ext._version import __version__
from gemma_ext.bench.timing import total_memory
from gemma_ext.command_line import one_sentence
from gemma_ext.demo.head import DTYPES, Head, measure_apart
from gemma_ext.demo.head import LOSSES as HEAD_LOSSES
from gemma_ext.demo.page import write_page
from gemma_ext.demo.stages import stage
from gemma_ext.demo.training import LOSSES, Plan, train
from gemma_ext.extras import require
from gemma_ext.progress import progress_bar
from gemma_ext.report import this_machine


def main(
    out: Annotated[Path, typer.Option(help="Folder of the page and the stages.")] = Path(
        "out/demo"
    ),
    steps: Annotated[int, typer.Option(help="Optimiser steps of each training.")] = 120,
    size: Annotated[str, typer.Option(help="Pocket size to train: nano or small.")] = "small",
    tokens: Annotated[
        int, typer.Option(help="Tokens of the head that is measured, beside those of a step.")
    ] = 2048,
    vocabulary: Annotated[int, typer.Option(help="Its vocabulary.")] = 256_000,
    dtype: Annotated[str, typer.Option(help="auto, bf16 or fp32, of that head.")] = "auto",
    fresh: Annotated[bool, typer.Option(help="Forget what earlier runs finished.")] = False,
) -> None:
    """Train a pocket Gemma-2 with the eager loss and with ours, measure a 2B head, write a page."""
    if dtype not in ("auto", *DTYPES):
        raise typer.BadParameter(f"dtype: expected auto, bf16 or fp32, got {dtype}")
    with one_sentence("demo"):
        results = run(
            out,
            Plan(size=size, steps=steps),
            Head(
                tokens=tokens,
                vocabulary=vocabulary,
                dtype=_fast_dtype() if dtype == "auto" else dtype,
                threads=torch.get_num_threads(),
            ),
            fresh=fresh,
        )
    for name, value in results["numbers"]:
        print(f"{name:<34} {value}")
    print(results["page"])


def run(
    out: Path, plan: Plan, head: Head, *, fresh: bool = False, show_progress: bool = True
) -> dict[str, Any]:
    """All stages, each unless it is already in `out`.

    Returns:
        page: path of the written page; numbers: the five (name, value) pairs that matter.
    """
    require("the demo", "demo", "transformers", "accelerate", "matplotlib", "jinja2")
    start = time.monotonic()
    build = _loader.load().record
    common = {
        "version": __version__,
        "commit": build["commit"],
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    if fresh:
        shutil.rmtree(out, ignore_errors=True)
    trainings, heads = {}, {}
    for loss in LOSSES:
        key = {**common, **asdict(plan), "loss": loss}
        # named after the key, so that a training with other settings is not resumed
        folder = out / f"training-{loss}-{_short(key)}"
        make = functools.partial(train, plan, loss, folder, show_progress)
        trainings[loss] = stage(out / f"training-{loss}.json", key, make)
    # at the N of a training step too: what pays depends on it
    sizes = sorted({plan.tokens, head.tokens})
    todo = [(replace(head, tokens=n), loss) for n in sizes for loss in HEAD_LOSSES]
    with progress_bar("head of Gemma-2-2B's size", len(todo), show_progress) as advance:
        for sized, loss in todo:
            advance(0, f"{loss}, N = {sized.tokens}")
            key = {**common, **asdict(sized), "loss": loss}
            make = functools.partial(measure_apart, loss, sized)
            path = out / f"head-{loss}-{sized.tokens}.json"
            heads.setdefault(sized.tokens, {})[loss] = stage(path, key, make)
            advance(1)
    machine = {"memory": f"{total_memory() / 2**30:.0f} GiB", **this_machine()}
    return write_page(
        out / "report.html",
        trainings=trainings,
        heads=heads,
        plan=plan,
        head=head,
        machine=machine,
        seconds=time.monotonic() - start,
    )


def _fast_dtype() -> str:
    """bf16 where torch has kernels for it, fp32 elsewhere."""
    _loader.load()
    return "bf16" if torch.ops.gemma_ext.cpu_isa().startswith(("avx512", "amx")) else "fp32"


def _short(key: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:8]
