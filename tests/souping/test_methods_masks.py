"""TALL masks, consensus and Localize-and-Stitch, against formulas in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from merge_formulas import (
    LAMBDA,
    awkward,
    check,
    column,
    localized,
    trimmed_model,
)
from merge_oracle import assert_near, family, run, stack

from gemma_ext.souping.methods import METHODS


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def models(request):
    return awkward(request.param)


LAMBDAS = [0.3, 0.4, 0.6]


def tall(d):
    total = d.sum(0)
    return np.abs(d) > column(LAMBDAS, d) * np.abs(total - d), total


@pytest.mark.parametrize("votes", [0, 1, 2, 3])
def test_consensus(models, votes):
    def expected(d, b):
        uses, total = tall(d)
        return b + LAMBDA * np.where(uses.sum(0) >= votes, total, 0.0)

    check("consensus", models, expected, tall_lambda=LAMBDAS, votes=votes, lambda_=LAMBDA)


@pytest.mark.parametrize("task", [0, 2])
def test_tall_masks(models, task):
    def expected(d, b):
        uses, total = tall(d)
        return b + np.where(uses[task], total, 0.0)

    check("tall_masks", models, expected, tall_lambda=LAMBDAS, task=task)


def test_consensus_of_equal_models():
    """M equal models use an element iff lambda < 1 / (M - 1)."""
    tunes, base = family(1)
    below = run(METHODS["consensus"], tunes * 4, base, tall_lambda=0.33)
    assert_near(below, {n: base[n].double() + 4 * (tunes[0][n] - base[n]).double() for n in base})
    above = run(METHODS["consensus"], tunes * 4, base, tall_lambda=0.34)
    assert_near(above, base, 0.0)


@pytest.mark.parametrize("keep_equal", [False, True])
def test_localize_and_stitch(models, keep_equal):
    tunes, base = models

    masks = trimmed_model(models, lambda v: localized(v, 0.3, keep_equal))
    true = {}
    for n in base:
        d = stack(tunes, base, n).numpy()
        merged = np.where(masks[n], d, 0.0).sum(0) / np.maximum(masks[n].sum(0), 1)
        true[n] = torch.from_numpy(base[n].double().numpy() + merged)
    got = run(METHODS["localize_and_stitch"], tunes, base, dtype=torch.float32, density=0.3,
              keep_equal=keep_equal)  # fmt: skip
    assert_near(got, true)


def test_stitch_of_disjoint_supports_is_task_arithmetic():
    tunes, base = family(2)
    halves = {n: torch.arange(t.numel()).view(t.shape) % 2 == 0 for n, t in base.items()}
    for n, half in halves.items():
        tunes[0][n] = torch.where(half, tunes[0][n], base[n])
        tunes[1][n] = torch.where(half, base[n], tunes[1][n])
    sum_ = run(METHODS["task_arithmetic"], tunes, base, weight=1.0)
    masks = [
        {n: h.float() for n, h in halves.items()},
        {n: (~h).float() for n, h in halves.items()},
    ]
    assert_near(run(METHODS["stitch"](masks), tunes, base), sum_, 3e-7)
    # the largest half but one percent: every kept element lies in its own model's support
    found = run(METHODS["localize_and_stitch"], tunes, base, density=0.49)
    moved = {n: found[n] != base[n] for n in base}
    assert sum(int(m.sum()) for m in moved.values()) > 0.9 * sum(t.numel() for t in base.values())
    assert_near({n: found[n][moved[n]] for n in base}, {n: sum_[n][moved[n]] for n in base}, 3e-7)


def test_stitch_with_given_masks(models):
    tunes, base = models
    generator = torch.Generator().manual_seed(9)
    masks = [
        {
            n: (torch.rand(base[n].shape, generator=generator) < 0.4).float()
            for n in base
            if "norm" not in n
        }
        for _ in tunes
    ]
    got = run(METHODS["stitch"](masks), tunes, base, dtype=torch.float32)
    true = {}
    for n in base:
        if "norm" in n:
            true[n] = base[n]
            continue
        d, m = stack(tunes, base, n), torch.stack([mask[n] for mask in masks]).double()
        true[n] = base[n].double() + (m * d).sum(0) / m.sum(0).clamp(min=1)
    assert_near(got, true)
