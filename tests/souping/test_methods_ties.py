"""TIES in all its readings, against formulas in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from merge_formulas import (
    GLOBAL,
    LAMBDA,
    WEIGHTS,
    awkward,
    check,
    column,
    combine,
    elect,
    keep_largest,
    trimmed_model,
)
from merge_oracle import assert_near, family, run, stack

from gemma_ext.souping.methods import METHODS


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def models(request):
    return awkward(request.param)


@pytest.mark.parametrize(
    ("election", "election_weights", "zero", "merge_func", "normalize"),
    [
        ("sum", True, "positive", None, True),  # mergekit
        ("sum", True, "positive", None, False),
        ("count", True, "positive", None, True),
        ("sum", False, "positive", "mean", False),  # peft
        ("count", False, "positive", "mean", False),
        ("sum", False, "none", "sum", True),
        ("count", True, "none", "max", True),
        ("sum", True, "none", "max", False),
        ("count", False, "none", "weighted_mean", False),
    ],
)
def test_ties_per_tensor(models, election, election_weights, zero, merge_func, normalize):
    densities = [0.3, 0.55, 1.0]

    def expected(d, b):
        masks = np.stack(
            [keep_largest(x, int(k * x.size)) for x, k in zip(d, densities, strict=True)]
        )
        trimmed = np.where(masks, d, 0.0)
        terms = column(WEIGHTS, d) * trimmed
        votes = terms if election_weights else trimmed
        agree = elect(terms, votes, {"positive": 1.0, "none": 0.0}[zero], election == "count")
        return b + LAMBDA * combine(
            terms, agree, WEIGHTS, merge_func or ("weighted_mean" if normalize else "sum")
        )

    check("ties", models, expected, 1e-5, weight=WEIGHTS, density=densities, normalize=normalize,
          lambda_=LAMBDA, election=election, election_weights=election_weights, zero=zero,
          merge_func=merge_func)  # fmt: skip


@pytest.mark.parametrize("density", [0.2, 0.5])
def test_ties_keeps_exactly_the_count_it_says(density):
    """bfloat16 deltas with hundreds of equal magnitudes: no more, no fewer."""
    tunes, base = family(1, dtype=torch.bfloat16, size=1e-3, shapes={"w": (64, 96)})
    got = run(METHODS["ties"], tunes, base, weight=1.0, density=density)["w"]
    delta = (tunes[0]["w"].float() - base["w"].float()).abs()
    kept = (got != base["w"]).sum()
    threshold = delta.flatten().sort(descending=True).values[int(density * delta.numel()) - 1]
    assert int((delta == threshold).sum()) > 20
    assert int(kept) == int(density * delta.numel()) if threshold > 0 else int((delta > 0).sum())


def test_ties_by_row(models):
    def expected(d, b):
        rows = d.reshape(len(d), -1, d.shape[-1])
        count = int(0.4 * rows.shape[-1])
        masks = np.stack([[keep_largest(row, count) for row in x] for x in rows])
        terms = column(WEIGHTS, rows) * np.where(masks, rows, 0.0)
        agree = elect(terms, terms)
        return b + combine(terms, agree, WEIGHTS, "weighted_mean").reshape(b.shape)

    check("ties_row", models, expected, 1e-5, weight=WEIGHTS, density=0.4)


@pytest.mark.parametrize("zero", ["majority", "minority", "positive", "none"])
@pytest.mark.parametrize("name", sorted(GLOBAL))
def test_ties_over_the_model(models, name, zero):
    tunes, base = models
    masks = trimmed_model(models, lambda v: GLOBAL[name](v, 0.35))
    trimmed = {n: np.where(masks[n], stack(tunes, base, n).numpy(), 0.0) for n in base}
    balance = sum(np.sign(t.sum(0)).sum() for t in trimmed.values())
    elected = {"majority": np.sign(balance), "minority": -np.sign(balance), "positive": 1.0,
               "none": 0.0}[zero]  # fmt: skip
    true = {}
    for n, t in trimmed.items():
        terms = column(WEIGHTS, t) * t
        agree = elect(terms, t, elected)
        true[n] = torch.from_numpy(
            base[n].double().numpy() + LAMBDA * combine(terms, agree, WEIGHTS, "mean")
        )
    got = run(METHODS[name], tunes, base, dtype=torch.float32, weight=WEIGHTS, density=0.35,
              lambda_=LAMBDA, zero=zero)  # fmt: skip
    assert_near(got, true, 1e-5)


def test_readings_of_the_same_share_differ_where_magnitudes_are_equal():
    tunes, base = family(1, dtype=torch.bfloat16, size=2e-3, shapes={"w": (40, 50), "v": (333,)})
    kept = {}
    for name in ("ties", *GLOBAL):
        got = run(METHODS[name], tunes, base, weight=1.0, density=0.3)
        kept[name] = sum(int((got[n] != base[n]).sum()) for n in base)
    elements = 40 * 50 + 333
    assert kept["ties"] == int(0.3 * 2000) + int(0.3 * 333)
    assert kept["ties_mergelm"] < int(0.3 * elements) < kept["ties_ref"]
    assert kept["ties_ls"] <= kept["ties_mergelm"]
    kept_equal = run(METHODS["ties_ls"], tunes, base, density=0.3, keep_equal=True)
    assert kept["ties_ref"] == sum(int((kept_equal[n] != base[n]).sum()) for n in base)
