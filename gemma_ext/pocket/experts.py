"""Experts: the pocket fine-tuned on one domain, cached beside it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from gemma_ext.pocket import store
from gemma_ext.pocket.cache import MANIFEST, verify_manifest, write_manifest
from gemma_ext.pocket.domains import load_domain
from gemma_ext.pocket.model import PocketSize, pocket_size
from gemma_ext.pocket.quiet import quiet_transformers
from gemma_ext.pocket.training import train

if TYPE_CHECKING:
    from transformers import Gemma2ForCausalLM

_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class ExpertRecipe:
    """How an expert is made.

    Attributes:
        steps, batch: optimiser steps, and windows in each.
        rate: peak learning rate as a share of the pocket's own.
        seed: order of the windows.
    """

    steps: int = 60
    batch: int = 16
    rate: float = 0.2
    seed: int = 0


def expert_folder(
    domain: str,
    size: str = "nano",
    recipe: ExpertRecipe | None = None,
    *,
    show_progress: bool = True,
) -> Path:
    """Folder of an expert as `from_pretrained` reads it, made on the first call.

    Args:
        domain: one of `DOMAINS`.
        size: the pocket it starts from.
        recipe: how it is made; an interrupted call is taken up where it stopped.

    Raises:
        ValueError: unknown domain or size, or a cached file that is not as it was written.
        ImportError: as `gemma_ext.pocket.load`.
    """
    recipe = recipe or ExpertRecipe()
    pocket = store.load(size, show_progress=show_progress)
    text = load_domain(domain, pocket.tokenizer)
    plan = _plan(pocket_size(size), recipe)
    origin = store.pocket_folder(size)
    content = hashlib.sha256(text.train.numpy().tobytes()).hexdigest()
    key = json.dumps([_FORMAT, origin.name, dataclasses.asdict(recipe), content])
    name = f"{domain}-{recipe.seed}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    folder = origin.with_name(f"{origin.name}.experts") / name
    with store.locked(folder):
        if (folder / MANIFEST).exists():
            return folder
        partial = folder.with_name(f"{name}.partial")
        partial.mkdir(parents=True, exist_ok=True)
        checkpoint = partial / "checkpoint.safetensors"
        done = train(
            pocket.model,
            text.train,
            plan,
            checkpoint=checkpoint,
            seed=recipe.seed,
            show_progress=show_progress,
            what=f"training the {domain} expert",
        )
        with quiet_transformers():
            pocket.model.save_pretrained(partial)
        pocket.tokenizer.save_pretrained(partial)
        checkpoint.unlink()
        write_manifest(
            partial, domain=domain, recipe=dataclasses.asdict(recipe), losses=done.losses
        )
        os.replace(partial, folder)
    return folder


def load_expert(
    domain: str,
    size: str = "nano",
    recipe: ExpertRecipe | None = None,
    *,
    show_progress: bool = True,
) -> Gemma2ForCausalLM:
    """The model of `expert_folder`, in float32 on the CPU, in evaluation mode.

    Arguments and errors are those of `expert_folder`.
    """
    from transformers import Gemma2ForCausalLM

    folder = expert_folder(domain, size, recipe, show_progress=show_progress)
    verify_manifest(folder)
    with quiet_transformers():
        return Gemma2ForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def _plan(size: PocketSize, recipe: ExpertRecipe) -> PocketSize:
    return dataclasses.replace(
        size,
        steps=recipe.steps,
        batch=recipe.batch,
        learning_rate=size.learning_rate * recipe.rate,
    )
