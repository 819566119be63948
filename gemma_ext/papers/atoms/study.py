"""The studies of a page: a world with known atoms, the layers of a model, states x dictionary size.

Each piece is measured on states that its dictionary was not learned from, and is a plain record.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gemma_ext.papers.atoms.controls import principal_axes, random_dictionary
from gemma_ext.papers.atoms.dictionary import Dictionary
from gemma_ext.papers.atoms.evaluation import evaluate, recovery
from gemma_ext.papers.atoms.learning import Recipe, learn
from gemma_ext.papers.atoms.moments import Moments
from gemma_ext.papers.atoms.product import AtomicProduct, atomic_product
from gemma_ext.papers.atoms.synthetic import random_world

Record = dict[str, Any]
Advance = Callable[[int], None]
_ROWS = 4096  # of states at a time


def layer(
    x: Tensor,
    held_out: Tensor,
    recipe: Recipe,
    kind: str = "centred",
    shrinkage: float = 1e-4,
    advance: Advance = lambda count: None,
) -> tuple[Dictionary, Record]:
    """Atoms of one layer beside the controls.

    Args:
        x: [N, D] states to learn from; held_out: [M, D] states to measure on.
        kind, shrinkage: of the moment.

    Returns:
        The dictionary, and {"atoms": ..., "random": ..., "axes": ..., "condition", "seconds"};
        the controls are as dense as the atoms turned out to be.
    """
    start = time.perf_counter()
    product, bias = _product(x, kind, shrinkage)
    found = learn(x, product, recipe, bias, advance).dictionary
    seconds = time.perf_counter() - start
    parts = held_out.split(_ROWS)
    quality = evaluate(found, parts)
    record: Record = {
        "atoms": quality.record(),
        "active": quality.counts.tolist(),
        "condition": product.condition,
        "seconds": seconds,
    }
    sample = x[:_ROWS]
    dense = max(quality.active, 1.0)
    for name, control in (
        ("random", random_dictionary(product, recipe.features, sample, dense, bias)),
        ("axes", principal_axes(product, sample, dense, bias)),
    ):
        record[name] = evaluate(control, parts).record()
    return found, record


def scaling(
    x: Tensor,
    held_out: Tensor,
    recipe: Recipe,
    states: int,
    features: int,
    kind: str = "centred",
    shrinkage: float = 1e-4,
    advance: Advance = lambda count: None,
) -> Record:
    """R^2 of `features` atoms learned from the first `states` rows, there and held out."""
    part = x[:states]
    product, bias = _product(part, kind, shrinkage)
    recipe = dataclasses.replace(recipe, features=features)
    found = learn(part, product, recipe, bias, advance).dictionary
    seen = evaluate(found, [part[:_ROWS]], refit=False)
    unseen = evaluate(found, held_out.split(_ROWS), refit=False)
    return {
        "states": len(part),
        "features": features,
        "r2_seen": seen.r2,
        "r2": unseen.r2,
        "active": unseen.active,
    }


def known_world(
    features: int,
    width: int,
    k: int,
    recipe: Recipe,
    states: int = 30_000,
    stretch: float = 10.0,
    advance: Advance = lambda count: None,
) -> Record:
    """How much of a world with known atoms is found, by the atomic and by the plain product.

    Returns:
        {"atomic": ..., "plain": ..., "random": ...}, each with the mean best cosine of a true atom,
        the share found (cosine above 0.9), and the metrics on held-out states.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    world = random_world(features, width, k, generator, stretch)
    x = world.draw(states, generator)[0].float()
    held_out = world.draw(_ROWS, generator)[0].float()
    atomic, _ = _product(x, "centred", 0.0)
    plain = atomic_product(torch.eye(width, dtype=torch.float64) * x.double().square().mean())
    true = atomic.unit(world.atoms)
    record = {}
    for name, product in (("atomic", atomic), ("plain", plain)):
        found = learn(x, product, recipe, None, advance).dictionary
        record[name] = _found(found, atomic, true, held_out)
    control = random_dictionary(atomic, recipe.features, x[:_ROWS], recipe.target)
    record["random"] = _found(control, atomic, true, held_out)
    return record


def _found(found: Dictionary, atomic: AtomicProduct, true: Tensor, held_out: Tensor) -> Record:
    cosine, share = recovery(atomic.unit(found.atoms), true)
    return {"cosine": cosine, "share": share, **evaluate(found, [held_out]).record()}


def _product(x: Tensor, kind: str, shrinkage: float) -> tuple[AtomicProduct, Tensor | None]:
    moments = Moments(x.shape[1], x.device)
    moments.add(x)
    bias = moments.mean.float() if kind == "centred" else None
    return atomic_product(moments.matrix(kind), shrinkage=shrinkage), bias


def sizes(most: int, count: int, factor: int) -> Sequence[int]:
    """`count` sizes up to `most`, each `factor` times the one before."""
    return [most // factor**step for step in reversed(range(count))]
