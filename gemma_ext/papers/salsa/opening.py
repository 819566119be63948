"""Parents, references and starts by their names on a command line."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from gemma_ext.nn.ppo import FrozenReference, Reference
from gemma_ext.papers.salsa.checks import Batch, LinearMode, held_out_loss
from gemma_ext.papers.salsa.choice import alpha_sweep, layer_alphas
from gemma_ext.papers.salsa.lora import lora_soup
from gemma_ext.papers.salsa.references import MultiReference, SoupReference, ema, sync
from gemma_ext.papers.salsa.soup import Weights, check_parents, check_tokenizers, soup, uniform
from gemma_ext.ppo.opening import load_causal
from gemma_ext.souping.lora import load_adapter
from gemma_ext.souping.lora.folder import is_adapter

REFERENCES = ("frozen", "soup", "multi", "ema", "sync")
CHOICES = ("even", "best", "layers")


@dataclass(frozen=True)
class Parents:
    """Models of one start, by name, and their tokenizer."""

    models: dict[str, nn.Module]
    tokenizer: Any

    @property
    def all(self) -> list[nn.Module]:
        return list(self.models.values())


def open_parents(
    names: Sequence[str], *, base: str | None = None, dtype: str = "auto", device: str = "cpu"
) -> Parents:
    """Loads parents and refuses what cannot be averaged.

    Args:
        names: folders or hub ids; adapter folders of peft where `base` is their model, each of
            which stands for the base with its update.

    Raises:
        ValueError: fewer than two, adapters without a base, or models that do not fit.
    """
    if len(names) < 2:
        raise ValueError(f"parents: expected at least two, got {len(names)}")
    adapters = [is_adapter(Path(name)) for name in names]
    if any(adapters):
        if not all(adapters) or base is None:
            raise ValueError("base: expected the model of the adapters, and adapters alone")
        start, tokenizer = load_causal(base, dtype, device)
        models = [lora_soup(start, [load_adapter(name)]) for name in names]
        return Parents(dict(zip(names, models, strict=True)), tokenizer)
    loaded = [load_causal(name, dtype, device) for name in names]
    check_parents([model for model, _ in loaded])
    check_tokenizers([tokenizer for _, tokenizer in loaded])
    models = dict(zip(names, (model for model, _ in loaded), strict=True))
    return Parents(models, loaded[0][1])


def choose_weights(
    how: str, parents: Sequence[nn.Module], batches: Sequence[Batch], steps: int = 50
) -> Weights:
    """1 / K each, the best alpha of two by held-out loss, or one of each layer.

    Raises:
        ValueError: an unknown way, or no held-out data for one that looks at it.
    """
    if how not in CHOICES:
        raise ValueError(f"choose: expected one of {', '.join(CHOICES)}, got {how!r}")
    if how == "even":
        return uniform(len(parents))
    if not batches:
        raise ValueError(f"held-out: expected data to choose by for {how}, got none")
    if how == "layers":
        return layer_alphas(parents, batches, steps=steps)
    best = alpha_sweep(parents, batches, refine=4).best
    return [best, 1 - best]


def checked_mode(
    parents: Sequence[nn.Module], made: nn.Module, batches: Sequence[Batch], tolerance: float
) -> LinearMode | None:
    """The linear mode where there is held-out data.

    Raises:
        ValueError: a soup that is worse than its worst parent.
    """
    if not batches:
        return None
    losses = tuple(held_out_loss(parent, batches) for parent in parents)
    return LinearMode(losses, held_out_loss(made, batches), tolerance).require()


def open_reference(
    kind: str,
    parents: Sequence[nn.Module],
    weights: Weights,
    *,
    decay: float = 0.99,
    mixup: float = 0.6,
    every: int = 512,
) -> Reference:
    """A reference by name; the first parent is where a frozen or moving one starts.

    Raises:
        ValueError: an unknown name, or layer-wise weights of several models.
    """
    if kind not in REFERENCES:
        raise ValueError(f"reference: expected one of {', '.join(REFERENCES)}, got {kind!r}")
    if kind == "soup":
        return SoupReference(parents, weights)
    if kind == "multi":
        if not isinstance(weights, Sequence):
            raise ValueError("choose: expected even or best for multi, got layers")
        return MultiReference([copy.deepcopy(parent) for parent in parents], weights)
    start = copy.deepcopy(parents[0])
    if kind == "ema":
        return ema(start, decay)
    return FrozenReference(start) if kind == "frozen" else sync(start, mixup, every)


def open_start(init: str, parents: Sequence[nn.Module], weights: Weights, **load: Any) -> nn.Module:
    """The policy's start: "sft1" for the first parent, "soup", or a folder or hub id."""
    if init == "sft1":
        made = copy.deepcopy(parents[0])
    elif init == "soup":
        made = soup(parents, weights)
    else:
        made = load_causal(init, **load)[0]
    return made.requires_grad_(True)
