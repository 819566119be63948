"""From a model and a text to a dictionary on disk, with its report."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import distributed as dist

from gemma_ext import files
from gemma_ext.integrations.sae_files import save_dictionary
from gemma_ext.integrations.saelens import save_saelens
from gemma_ext.nn.sparse_autoencoder import (
    GroupMax,
    Objective,
    SparseAutoencoder,
    default_objective,
)
from gemma_ext.progress import progress_bar
from gemma_ext.sae.config import TrainConfig
from gemma_ext.sae.evaluation import Evaluation, evaluate
from gemma_ext.sae.opening import Opened
from gemma_ext.sae.page import write_report
from gemma_ext.sae.sites import find_site
from gemma_ext.sae.stream import Activations
from gemma_ext.sae.trainer import Trainer

DICTIONARY, REPORT, EVALUATION = "sae", "report.html", "evaluation.json"
EVALUATED = 64  # held-out rows


@dataclass(frozen=True)
class Trained:
    """What a run left.

    Attributes:
        sae: the dictionary, as it was trained.
        folder: of its files; page: its report.
        evaluations: of every source.
    """

    sae: SparseAutoencoder
    folder: Path
    page: Path
    evaluations: list[Evaluation]


def train_dictionary(
    opened: Opened,
    site: str,
    sae: SparseAutoencoder,
    config: TrainConfig,
    out: str | Path,
    *,
    objective: Objective | None = None,
    batch: int = 2048,
    buffer: int = 65536,
    seed: int = 0,
    cache: Path | None = None,
    tensorboard: Path | None = None,
    evaluated: int = EVALUATED,
    show_progress: bool = True,
) -> Trained | None:
    """Trains, saves, evaluates; goes on where an interrupted run stopped.

    Args:
        objective: None for the usual one of the activation.
        cache: folder that keeps activations; None runs the model again in every epoch.
        tensorboard: folder of live metrics.
        evaluated: held-out rows to evaluate on.

    Returns:
        None on every rank but the first.

    Raises:
        ValueError: settings that do not fit.
    """
    out = Path(out)
    rank, world = _ranks()
    stream = Activations(
        opened.models, [site] * len(opened.models), opened.train, batch, buffer, seed=seed,
        folder=cache, rank=rank, world=world,
    )  # fmt: skip
    objective = objective or default_objective(sae)
    trainer = Trainer(sae, objective, stream, config, out, tensorboard=tensorboard)
    with progress_bar("training", config.steps, show_progress and rank == 0) as advance:
        seen = 0

        def progress(step: int, metrics: dict[str, float]) -> None:
            nonlocal seen
            advance(step - seen)
            seen = step

        trainer.run(progress)
    if rank:
        return None
    sae.metadata |= {"model_name": opened.name, "hook_name": find_site(opened.model, site).name}
    sae.metadata |= {"context_size": opened.train.shape[1], "prepend_bos": True}
    if objective.widths:
        edges = (0, *objective.widths)
        sae.metadata["group_sizes"] = [b - a for a, b in pairwise(edges)]
    folder = out / DICTIONARY
    if sae.sources > 1:
        save_dictionary(sae, folder, "crosscoder")
    elif isinstance(sae.activation, GroupMax):
        save_dictionary(_folded(sae), folder, "sparsify")
    else:
        sparsity = trainer.dead.fired.double() / trainer.dead.tokens.clamp(min=1)
        save_saelens(sae, folder, sparsity=sparsity)
    evaluations = evaluate_on(sae, opened, site, rows=evaluated, show_progress=show_progress)
    numbers = [evaluation.numbers() for evaluation in evaluations]
    files.write_json(out / EVALUATION, numbers[0] if len(numbers) == 1 else numbers)
    page = out / REPORT
    write_report(
        page,
        title=f"{type(sae.activation).__name__} dictionary of {opened.name}, {site}",
        evaluations=evaluations,
        history=trainer.history(),
        facts=_facts(opened, site, sae, config, objective, batch * world),
    )
    return Trained(sae, folder, page, evaluations)


def evaluate_on(
    sae: SparseAutoencoder,
    opened: Opened,
    site: str,
    *,
    rows: int = EVALUATED,
    show_progress: bool = True,
) -> list[Evaluation]:
    """Evaluations of every source on the first held-out rows."""
    tokens, sources = opened.heldout[:rows], len(opened.models)
    with progress_bar("evaluating", len(tokens) * sources, show_progress) as advance:
        return [
            evaluate(sae, opened.models, site, tokens, source=source, progress=advance)
            for source in range(sources)
        ]


def _folded(sae: SparseAutoencoder) -> SparseAutoencoder:
    from copy import deepcopy

    from gemma_ext.nn.sparse_autoencoder import fold_standardise

    return fold_standardise(deepcopy(sae))


def _facts(
    opened: Opened,
    site: str,
    sae: SparseAutoencoder,
    config: TrainConfig,
    objective: Objective,
    batch: int,
) -> dict[str, str]:
    default = Objective()
    terms = {k: v for k, v in vars(objective).items() if v != getattr(default, k)}
    return {
        "model": " and ".join([opened.name, *(m.name_or_path for m in opened.others)]),
        "site": find_site(opened.model, site).name,
        "dictionary": f"{sae.features:,} latents of width {sae.width}, {sae.activation}",
        "tokens": f"{config.steps * batch:,} in batches of {batch:,}",
        "text": f"{opened.train.numel():,} tokens in rows of {opened.train.shape[1]}",
        "learning rate": f"{config.rate(sae.features):.2e}",
        "loss": json.dumps({"error": objective.error} | terms, default=str),
    }


def _ranks() -> tuple[int, int]:
    """Rank and world of torchrun, whose process group is opened if nobody has."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()
