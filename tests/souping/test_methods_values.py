"""Sums, SCE, pairs, RAM, MagMax, TSV and Iso-C, against formulas in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from merge_formulas import (
    LAMBDA,
    WEIGHTS,
    awkward,
    check,
    column,
    combine,
    elect,
    keep_largest,
)
from merge_oracle import SHAPES, assert_near, family, run, stack

from gemma_ext.souping.methods import METHODS


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def models(request):
    return awkward(request.param)


def test_linear(models):
    tunes, base = models
    whole = {n: torch.stack([t[n].double() for t in tunes]) for n in base}
    for normalize in (True, False):
        got = run(
            METHODS["linear"], tunes, weight=WEIGHTS, normalize=normalize, dtype=torch.float32
        )
        scale = sum(WEIGHTS) if normalize else 1.0
        true = {
            n: sum(w * x for w, x in zip(WEIGHTS, t, strict=True)) / scale for n, t in whole.items()
        }
        assert_near(got, true)


@pytest.mark.parametrize("normalize", [False, True])
def test_task_arithmetic(models, normalize):
    scale = LAMBDA / (sum(WEIGHTS) if normalize else 1.0)
    check("task_arithmetic", models,
          lambda d, b: b + scale * (column(WEIGHTS, d) * d).sum(0),
          weight=WEIGHTS, normalize=normalize, lambda_=LAMBDA)  # fmt: skip


def test_weights_that_cancel_are_not_divided_by(models):
    check("task_arithmetic", models,
          lambda d, b: b + (column([0.5, 0.5, -1.0], d) * d).sum(0),
          weight=[0.5, 0.5, -1.0], normalize=True)  # fmt: skip


@pytest.mark.parametrize("scale", [None, 1.0, 0.3, -2.0])
def test_passthrough(scale):
    tunes, _ = family(1)
    got = run(METHODS["passthrough"], tunes, scale=scale)
    assert_near(
        got, {n: t.double() * (1.0 if scale is None else scale) for n, t in tunes[0].items()}
    )


@pytest.mark.parametrize("mask_deltas", [False, True])
@pytest.mark.parametrize("share", [1.0, 0.3, 0.0])
def test_sce(models, share, mask_deltas):
    def expected(d, b):
        variance = d.astype(np.float32).astype(float).var(0)
        keep = np.ones(b.shape, bool)
        if share < 1:
            keep = keep_largest(variance, int(share * (variance != 0).sum()))
        energy = np.array([(x[keep] ** 2).sum() for x in d])
        weights = energy / energy.sum() if energy.sum() > 0 else np.full(len(d), 1 / len(d))
        used = np.where(keep, d, 0.0) if mask_deltas else d
        agree = elect(used, used)
        return b + combine(column(weights, d) * used, agree, weights, "weighted_mean")

    check("sce", models, expected, 1e-5, select_topk=share, mask_deltas=mask_deltas)


def test_sce_weighs_ordinary_fine_tunes():
    """Energies of 9 to 1 give weights of 9 to 1, however small the deltas are."""
    base = {"w": torch.zeros(64)}
    sign = torch.ones(64)
    tunes = [{"w": 3e-4 * sign}, {"w": 1e-4 * sign}]
    got = run(METHODS["sce"], tunes, base)["w"]
    assert_near({"w": got / 1e-4}, {"w": (0.9 * 3 + 0.1 * 1) * sign.double()}, 1e-5)


def test_nearswap(models):
    tunes, base = models
    t = 0.02

    def expected(d, b):
        return b + np.clip(t / np.maximum(np.abs(d[0]), 1e-6), 0, 1) * d[0]

    check("nearswap", (tunes[:1], base), expected, t=t)


def test_arcee_fusion(models):
    tunes, base = models

    def softmax(x):
        e = np.exp(x - x.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    def expected(d, b):
        p, q = softmax(b + d[0]) + 1e-8, softmax(b) + 1e-8
        score = np.abs(d[0]) * (p * np.log(p / q)).sum(-1, keepdims=True)
        ordered = np.sort(score.ravel())
        low, middle, high = (ordered[int(s * (b.size - 1))] for s in (0.25, 0.5, 0.75))
        threshold = middle + 1.5 * (high - low)
        gap = np.abs(score - threshold).min() if b.size > 1 else 1.0
        assert gap > 1e-6 * max(threshold, 1e-30)
        return b + np.where(score >= threshold, d[0], 0.0)

    tunes, base = (
        [{n: t for n, t in tunes[2].items() if n != "model.layers.1.gate"}],
        {n: t for n, t in base.items() if n != "model.layers.1.gate"},
    )
    check("arcee_fusion", (tunes, base), expected)


def test_arcee_fusion_in_pieces(models, monkeypatch):
    tunes, base = models
    whole = run(METHODS["arcee_fusion"], tunes[:1], base)
    monkeypatch.setattr("gemma_ext.souping.methods.pairs._PIECE", 20)
    pieces = run(METHODS["arcee_fusion"], tunes[:1], base)
    assert all(torch.equal(pieces[n], whole[n]) for n in base)


@pytest.mark.parametrize("epsilon", [1e-5, 0.05])
def test_ram(models, epsilon):
    def expected(d, b):
        active = np.abs(d) > np.float32(epsilon)
        return b + np.where(active, d, 0.0).sum(0) / np.maximum(active.sum(0), 1)

    check("ram", models, expected, epsilon=epsilon)


def test_ram_plus(models):
    epsilon, r, alpha = 0.12, 0.4, 0.7

    def expected(d, b):
        active = np.abs(d) > np.float32(epsilon)
        count = active.sum(0)
        total = np.where(active & (count > 1), d, 0.0).sum(0) / np.maximum(count, 1)
        for x, own in zip(d, active, strict=True):
            shared, unique = (own & (count > 1)).sum(), (own & (count == 1)).sum()
            factor = 1 + r * min(max(shared / max(unique, 1), 0), alpha)
            total = total + np.where(own & (count == 1), factor * x, 0.0)
        return b + total

    check("ramplus_tl", models, expected, epsilon=epsilon, r=r, alpha=alpha)


def test_magmax(models):
    def expected(d, b):
        largest = np.abs(d).max(0)  # of two that are equal but for their signs, the positive one
        return b + LAMBDA * np.where((d == largest).any(0), largest, -largest)

    check("magmax", models, expected, lambda_=LAMBDA)


@pytest.mark.parametrize("name", ["tsv", "iso_c"])
def test_spectral(models, name):
    tunes, base = models
    got = run(METHODS[name], tunes, base, dtype=torch.float32, lambda_=LAMBDA)
    for n in SHAPES:
        d, b = stack(tunes, base, n).numpy(), base[n].double().numpy()
        if b.ndim < 2 or "embed" in n:
            merged = d.mean(0)
        elif name == "iso_c":
            u, s, vh = np.linalg.svd(d.sum(0), full_matrices=False)
            merged = s.mean() * u @ vh
        else:
            merged = whitened(d)
        assert_near({n: got[n]}, {n: torch.from_numpy(b + LAMBDA * merged)}, 1e-5)


def whitened(d: np.ndarray) -> np.ndarray:
    """TSV-Merge with the inverse square root of the Gram matrices of the bases."""
    share = min(d.shape[1:]) // len(d)
    parts = [np.linalg.svd(x, full_matrices=False) for x in d]
    u = np.concatenate([p[0][:, :share] for p in parts], 1)
    s = np.concatenate([p[1][:share] for p in parts])
    v = np.concatenate([p[2][:share] for p in parts])

    def root(gram):
        values, vectors = np.linalg.eigh(gram)
        return vectors @ np.diag(values**-0.5) @ vectors.T

    return u @ root(u.T @ u) @ np.diag(s) @ root(v @ v.T) @ v


def test_tsv_of_one_low_rank_update_is_the_update():
    tunes, base = family(1)
    name = "model.layers.0.mlp.up_proj.weight"
    generator = torch.Generator().manual_seed(4)
    low = torch.randn(11, 2, generator=generator) @ torch.randn(2, 8, generator=generator)
    tunes[0][name] = base[name] + low
    assert_near({name: run(METHODS["tsv"], tunes, base)[name]}, {name: tunes[0][name]}, 1e-5)


def test_iso_c_flattens_the_spectrum():
    tunes, base = family(2)
    name = "model.layers.0.mlp.up_proj.weight"
    got = run(METHODS["iso_c"], tunes, base)[name]
    s = torch.linalg.svdvals((got - base[name]).double())
    assert float(s.max() - s.min()) < 1e-5 * float(s.max())
