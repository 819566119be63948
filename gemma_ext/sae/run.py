"""From a model and a text to a dictionary on disk, with its report."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch import distributed as dist

from gemma_ext.extras import require
from gemma_ext.integrations import _files as files
from gemma_ext.integrations.sae_files import save_dictionary
from gemma_ext.integrations.saelens import save_saelens
from gemma_ext.nn.sparse_autoencoder import (
    AbsTopK,
    Activation,
    BatchTopK,
    Gated,
    GroupMax,
    JumpReLU,
    Objective,
    ReLU,
    SparseAutoencoder,
    TopK,
    default_objective,
)
from gemma_ext.progress import progress_bar
from gemma_ext.sae.config import TrainConfig
from gemma_ext.sae.evaluation import Evaluation, evaluate
from gemma_ext.sae.page import write_report
from gemma_ext.sae.sites import capture, find_site
from gemma_ext.sae.stream import Activations
from gemma_ext.sae.tokens import pack, read_texts, rows_of
from gemma_ext.sae.trainer import Trainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DICTIONARY, REPORT, EVALUATION = "sae", "report.html", "evaluation.json"
_HELD_OUT = 20  # one row of so many, where no other text is given
_EVALUATED = 64  # rows
_SMALL = 0.1  # norm of decoder rows at the start, where their norm is free: SAELens

ACTIVATIONS: dict[str, Callable[[float], Activation]] = {
    "relu": lambda k: ReLU(),
    "topk": lambda k: TopK(int(k)),
    "abstopk": lambda k: AbsTopK(int(k)),
    "groupmax": lambda k: GroupMax(int(k)),
    "batchtopk": BatchTopK,
    "jumprelu": lambda k: JumpReLU(),
    "gated": lambda k: Gated(),
}
_BY_RANK = ("topk", "abstopk", "groupmax", "batchtopk")


@dataclass(frozen=True)
class Opened:
    """A model with its tokenizer and rows of tokens for training and for what comes after."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    train: Tensor
    heldout: Tensor


def open_model(
    name: str,
    *,
    text: str | None = None,
    heldout: str | None = None,
    context: int = 128,
    tokens: int | None = None,
    device: str = "cpu",
    dtype: str = "auto",
) -> Opened:
    """A model of the hub, of a folder, or the pocket, with text.

    Args:
        name: "pocket" or "pocket:small", which bring their own text; else as transformers takes it.
        text, heldout: sources of `read_texts`; without `heldout`, each twentieth row of `text`.
        context: T of the rows.
        tokens: to read from `text`, at most.

    Raises:
        ValueError: no text.
    """
    kind, _, size = name.partition(":")
    require("a model of transformers", "hf", "transformers", "tokenizers", "safetensors")
    if kind == "pocket":
        from gemma_ext import pocket

        loaded = pocket.load(size or "nano")
        model, tokenizer = loaded.model, loaded.tokenizer
    elif text is None:
        raise ValueError(f"text: expected a source of text for {name}, got none")
    else:
        import transformers

        model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    bos = tokenizer.bos_token_id
    if text is None:
        train = rows_of(loaded.train_ids, context, bos)
        held = rows_of(loaded.heldout_ids, context, bos)
    else:
        train = pack(read_texts(text), tokenizer, context, tokens=tokens)
        each = torch.arange(len(train)) % _HELD_OUT == _HELD_OUT - 1
        if heldout is None and not each.any():
            raise ValueError(f"text: expected at least {_HELD_OUT} rows, got {len(train)}")
        train, held = (train[~each], train[each]) if heldout is None else (train, train[:0])
    if heldout is not None:
        held = pack(read_texts(heldout), tokenizer, context)
    return Opened(name, model.to(device).eval(), tokenizer, train, held)


def width_of(model: PreTrainedModel, site: str | int) -> int:
    """D at a site."""
    ids = torch.zeros(1, 1, dtype=torch.int64, device=model.get_input_embeddings().weight.device)
    return capture(model, ids, [find_site(model, site)])[0].shape[-1]


def new_dictionary(
    width: int, features: int, activation: str, k: float, *, seed: int = 0
) -> SparseAutoencoder:
    """A dictionary as it is usual for its activation.

    Selection by rank keeps decoder rows at norm 1; the others leave the norms free, and their
    sparsity terms count them. Inputs are scaled to a mean norm of sqrt(D), which is folded when the
    dictionary is saved.

    Raises:
        ValueError: no such activation.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}"
        )
    by_rank = activation in _BY_RANK
    sae = SparseAutoencoder(
        width, features, ACTIVATIONS[activation](k), unit_norm=by_rank, standardise="affine"
    )
    generator = torch.Generator().manual_seed(seed)
    sae.reset_parameters(generator, norm=1.0 if by_rank else _SMALL)
    return sae


@dataclass(frozen=True)
class Trained:
    """What a run left.

    Attributes:
        sae: the dictionary, as it was trained.
        folder: of its files; page: its report.
    """

    sae: SparseAutoencoder
    folder: Path
    page: Path
    evaluation: Evaluation


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
    show_progress: bool = True,
) -> Trained | None:
    """Trains, saves, evaluates; goes on where an interrupted run stopped.

    Args:
        objective: None for the usual one of the activation.
        cache: folder that keeps activations; None runs the model again in every epoch.

    Returns:
        None on every rank but the first.

    Raises:
        ValueError: settings that do not fit.
    """
    out = Path(out)
    rank, world = _ranks()
    stream = Activations(
        [opened.model], [site], opened.train, batch, buffer, seed=seed, folder=cache,
        rank=rank, world=world,
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
    folder = out / DICTIONARY
    if isinstance(sae.activation, GroupMax):
        save_dictionary(_folded(sae), folder, "sparsify")
    else:
        sparsity = trainer.dead.fired.double() / trainer.dead.tokens.clamp(min=1)
        save_saelens(sae, folder, sparsity=sparsity)
    evaluation = evaluate_on(sae, opened, site, show_progress=show_progress)
    numbers = dict(evaluation.numbers().items())
    files.write_json(out / EVALUATION, numbers)
    page = out / REPORT
    write_report(
        page,
        title=f"{type(sae.activation).__name__} dictionary of {opened.name}, {site}",
        evaluation=evaluation,
        history=trainer.history(),
        facts=_facts(opened, site, sae, config, objective, batch * world),
    )
    return Trained(sae, folder, page, evaluation)


def evaluate_on(
    sae: SparseAutoencoder,
    opened: Opened,
    site: str,
    *,
    rows: int = _EVALUATED,
    show_progress: bool = True,
) -> Evaluation:
    """Evaluation on the first held-out rows."""
    tokens = opened.heldout[:rows]
    with progress_bar("evaluating", len(tokens), show_progress) as advance:
        return evaluate(sae, opened.model, site, tokens, progress=advance)


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
        "model": opened.name,
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


def count(text: str) -> int:
    """A number as 500, 20k, 2.5M or 1B.

    Raises:
        ValueError: it is none.
    """
    units: dict[str, float] = {"k": 1e3, "m": 1e6, "b": 1e9}
    unit = units.get(text[-1:].lower())
    digits: Any = text[:-1] if unit else text
    try:
        number = float(digits) * (unit or 1)
    except ValueError:
        number = -1
    if not number >= 1 or number != int(number):
        raise ValueError(f"expected a number as 500, 20k or 2.5M, got {text!r}")
    return int(number)
