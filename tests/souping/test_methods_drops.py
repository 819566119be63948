"""DARE, DELLA and Breadcrumbs, against formulas in numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from merge_formulas import (
    WEIGHTS,
    awkward,
    check,
    column,
    combine,
    elect,
    keep_largest,
)
from merge_oracle import assert_near, family, run, stack

from gemma_ext.souping.methods import METHODS


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def models(request):
    return awkward(request.param)


@pytest.mark.parametrize("name", ["dare", "della"])
@pytest.mark.parametrize("norm", ["density", "l1", "l2", "linf"])
def test_rescaled_drops(models, name, norm):
    """The masks are read off the method itself with one model at a time and weight 1; the rest of
    the formula is written here."""
    tunes, base = models
    density, epsilon = 0.5, 0.2
    more = {"epsilon": epsilon} if "della" in name else {}
    shared = {"weight": [1.0, 0.0, 0.0], "density": density, "dtype": torch.float32, **more}
    method = METHODS[f"{name}_linear"]
    dropped = run(method, tunes, base, rescale=False, **shared)
    first = {n: (dropped[n] != base[n].float()).numpy() for n in base}
    got = run(method, tunes, base, rescale=True, rescale_norm=norm, **shared)
    true = {}
    for n in base:
        d = stack(tunes, base, n).numpy()[0]
        masked = np.where(first[n], d, 0.0)
        orders = {"l1": 1, "l2": 2, "linf": np.inf}
        if norm in orders:
            whole, kept = (np.linalg.norm(x.ravel(), orders[norm]) for x in (d, masked))
            factor = whole / kept if kept > 1e-7 else 1.0
        elif name == "della":
            factor = 1 / probabilities(d, density, epsilon)
        else:
            factor = 1 / density
        true[n] = torch.from_numpy(base[n].double().numpy() + factor * masked)
    assert_near(got, true, 1e-5)


def probabilities(delta: np.ndarray, density: float, epsilon: float) -> np.ndarray:
    """Of being kept, by the rank in each row; of equals the lowest column ranks highest."""
    rows = delta.reshape(-1, delta.shape[-1])
    p = np.full(rows.shape, density)
    for r, row in enumerate(rows):
        order = sorted(range(len(row)), key=lambda i: (abs(row[i]), -i))
        for place, i in enumerate(order):
            if len(row) > 1:
                p[r, i] = density - epsilon + 2 * epsilon * place / (len(row) - 1)
    return p.reshape(delta.shape)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("name", ["dare", "della"])
def test_random_drops_with_an_election(models, name, normalize):
    """Terms of each model alone, then elected and combined here."""
    tunes, base = models
    terms = []
    for model in range(3):
        weight = [w * (m == model) for m, w in enumerate(WEIGHTS)]
        alone = run(METHODS[f"{name}_linear"], tunes, base, weight=weight, density=0.5,
                    dtype=torch.float32, seed=7)  # fmt: skip
        terms.append({n: alone[n].double() - base[n].double() for n in base})
    got = run(METHODS["dare_ties" if name == "dare" else "della"], tunes, base, weight=WEIGHTS,
              density=0.5, normalize=normalize, dtype=torch.float32, seed=7)  # fmt: skip
    true = {}
    for n in base:
        x = np.stack([t[n].numpy() for t in terms])
        # what float32 leaves of base + 0
        x = np.where(np.abs(x) > 1e-6, x, 0.0)
        merged = combine(x, elect(x, x), WEIGHTS, "weighted_mean" if normalize else "sum")
        true[n] = torch.from_numpy(base[n].double().numpy() + merged)
    off = sum(int(((got[n].double() - true[n]).abs() > 1e-4).sum()) for n in base)
    assert off <= 1  # a sum of terms near 0 may turn with their last bit


@pytest.mark.parametrize("spread", ["rank", "value"])
def test_della_keeps_by_rank(spread):
    """How often an element of each place survives, over many rows, within four sigma."""
    rows, columns, density, epsilon = 4000, 9, 0.6, 0.3
    tunes, base = family(1, shapes={"w": (rows, columns)})
    got = run(METHODS["della_linear"], tunes, base, weight=1.0, density=density, epsilon=epsilon,
              rescale=False, spread=spread)["w"]  # fmt: skip
    delta = (tunes[0]["w"] - base["w"]).abs().numpy()
    kept = (got != base["w"]).numpy()
    if spread == "rank":
        p = probabilities(delta, density, epsilon)
    else:
        low, high = delta.min(1, keepdims=True), delta.max(1, keepdims=True)
        p = density - epsilon + 2 * epsilon * (delta - low) / (high - low)
    for place in range(columns):
        at = np.argsort(delta, 1)[:, place]
        mean, share = p[np.arange(rows), at].mean(), kept[np.arange(rows), at].mean()
        assert abs(share - mean) < 4 * math.sqrt(0.25 / rows)


def test_dare_keeps_the_expectation():
    """Mean and variance of delta mask / d over many elements, within four sigma."""
    n, density = 40_000, 0.2
    tunes, base = family(2, shapes={"w": (n,)})
    for tune in tunes:
        tune["w"] = base["w"] + 0.25
    got = run(METHODS["dare_linear"], tunes, base, weight=[1.0, 0.0], density=density)["w"]
    delta = (got - base["w"]).double()
    kept = int((got != base["w"]).sum())
    assert abs(kept - density * n) < 4 * math.sqrt(n * density * (1 - density))
    sigma = 0.25 * math.sqrt((1 - density) / density)
    assert abs(float(delta.mean()) - 0.25) < 4 * sigma / math.sqrt(n)
    other = run(METHODS["dare_linear"], tunes, base, weight=[0.0, 1.0], density=density)["w"]
    again = run(METHODS["dare_linear"], tunes, base, weight=[1.0, 0.0], density=density)["w"]
    seeded = run(METHODS["dare_linear"], tunes, base, weight=[1.0, 0.0], density=density, seed=1)[
        "w"
    ]
    assert torch.equal(got, again)
    both = int(((got != base["w"]) & (other != base["w"])).sum())
    assert abs(both - density**2 * n) < 4 * math.sqrt(n * density**2)
    assert not torch.equal(got, seeded)


@pytest.mark.parametrize(("density", "gamma"), [(0.5, 0.2), (0.8, 0.5), (0.3, 0.0), (0.9, 0.001)])
@pytest.mark.parametrize("name", ["breadcrumbs", "breadcrumbs_ties"])
def test_breadcrumbs(models, name, density, gamma):
    """gamma 0 and gammas below 1 / n take nothing from the top and zero nothing."""

    def expected(d, b):
        n = b.size
        stay, top = int(density * n), int(gamma * n)
        top = min(top, n - stay) if stay else 0
        masks = np.stack([keep_largest(x, stay + top) & ~keep_largest(x, top) for x in d])
        terms = column(WEIGHTS, d) * np.where(masks, d, 0.0)
        agree = elect(terms, terms) if name.endswith("ties") else np.ones(d.shape, bool)
        return b + combine(terms, agree, WEIGHTS, "sum")

    check(name, models, expected, weight=WEIGHTS, density=density, gamma=gamma)


def test_breadcrumbs_can_keep_a_norm(models):
    def expected(d, b):
        stay, top = int(0.5 * b.size), min(int(0.1 * b.size), b.size - int(0.5 * b.size))
        total = 0.0
        for w, x in zip(WEIGHTS, d, strict=True):
            kept = np.where(keep_largest(x, stay + top) & ~keep_largest(x, top), x, 0.0)
            whole, part = np.abs(x).sum(), np.abs(kept).sum()
            total = total + w * kept * (whole / part if part >= 1e-7 else 1.0)
        return b + total

    check("breadcrumbs", models, expected, 1e-5, weight=WEIGHTS, density=0.5, gamma=0.1,
          rescale=True)  # fmt: skip


@pytest.mark.parametrize("remove_first", [True, False])
def test_breadcrumbs_by_row(models, remove_first):
    def expected(d, b):
        rows = d.reshape(len(d), -1, d.shape[-1])
        keep, drop = int(0.5 * d.shape[-1]), int(0.2 * d.shape[-1])
        upto = keep + drop if remove_first else keep
        masks = np.stack(
            [[keep_largest(r, upto) & ~keep_largest(r, drop) for r in x] for x in rows]
        )
        return b + 0.2 * (column(1.0, rows) * np.where(masks, rows, 0.0)).sum(0).reshape(b.shape)

    check("breadcrumbs_row", models, expected, density=0.5, gamma=0.2, remove_first=remove_first)
