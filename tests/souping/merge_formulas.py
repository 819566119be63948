"""Trimming, electing and combining in numpy, and a family of models that has ties and zeros."""

from __future__ import annotations

import numpy as np
import torch
from merge_oracle import Tensors, assert_near, family, run, stack

from gemma_ext.souping.methods import METHODS

WEIGHTS = [0.6, -0.2, 0.9]
LAMBDA = 1.3


def awkward(dtype: torch.dtype) -> tuple[list[Tensors], Tensors]:
    """Three fine-tunes and their base; some rows stay where they are in two, some in all three."""
    tunes, base = family(3, seed=3, dtype=dtype)
    for index, tune in enumerate(tunes):
        if index < 2:
            name = "model.layers.0.mlp.up_proj.weight"
            tune[name][:3] = base[name][:3]
        name = "model.embed_tokens.weight"
        tune[name][5:10] = base[name][5:10]
    return tunes, base


def check(name: str, models, expected, tolerance: float = 2e-6, **parameters) -> Tensors:
    """Runs a method into float32 and compares every tensor with expected(delta [M, ..], base)."""
    tunes, base = models
    got = run(METHODS[name], tunes, base, dtype=torch.float32, **parameters)
    true = {n: expected(stack(tunes, base, n).numpy(), base[n].double().numpy()) for n in base}
    assert_near(got, {n: torch.from_numpy(np.asarray(t)) for n, t in true.items()}, tolerance)
    return got


def keep_largest(delta: np.ndarray, count: int) -> np.ndarray:
    """Mask of the `count` largest magnitudes, lowest index first among equals."""
    order = sorted(range(delta.size), key=lambda i: (-abs(delta.flat[i]), i))
    mask = np.zeros(delta.size, bool)
    mask[order[:count]] = True
    return mask.reshape(delta.shape)


def column(values, like: np.ndarray) -> np.ndarray:
    return np.asarray(values, float).reshape(-1, *[1] * (like.ndim - 1))


def elect(terms, votes, zero=1.0, count=False):
    """Masks of the models that have the elected sign."""
    total = (np.sign(votes) if count else votes).sum(0)
    sign = np.where(np.sign(total) == 0, zero, np.sign(total))
    return (np.sign(votes) == sign) & (votes != 0)


def combine(terms, agree, weights, how):
    kept = np.where(agree, terms, 0.0)
    if how == "sum":
        return kept.sum(0)
    if how == "mean":
        return kept.sum(0) / np.maximum(agree.sum(0), 1)
    if how == "max":
        return np.take_along_axis(kept, np.abs(kept).argmax(0)[None], 0)[0]
    total = (column(weights, terms) * agree).sum(0)
    return kept.sum(0) / np.where(total == 0, 1.0, total)


def trimmed_model(models, threshold) -> dict[str, np.ndarray]:
    """Masks [M, ..] by tensor from threshold(magnitudes of the model [D]) -> predicate."""
    tunes, base = models
    deltas = {n: stack(tunes, base, n).numpy() for n in base}
    flat = np.concatenate([d.reshape(len(d), -1) for d in deltas.values()], 1)
    keeps = [threshold(np.sort(np.abs(row))) for row in flat]
    return {
        n: np.stack([keep(np.abs(x)) for keep, x in zip(keeps, d, strict=True)])
        for n, d in deltas.items()
    }


def ref(v, k):
    threshold = v[max(len(v) - int(len(v) * k), 1) - 1]
    return lambda x: x >= threshold


def mergelm(v, k):
    dropped = int((1 - k) * len(v))
    threshold = v[dropped - 1] if dropped else -1.0
    return lambda x: x > threshold


def localized(v, k, keep_equal=False):
    threshold = v[len(v) - int(len(v) * k)]
    return lambda x: x >= threshold if keep_equal else x > threshold


GLOBAL = {"ties_ref": ref, "ties_mergelm": mergelm, "ties_ls": localized}
