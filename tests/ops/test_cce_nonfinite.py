"""NaN and infinity: never hidden where they matter, never spread where they do not."""

from __future__ import annotations

import pytest
import torch
from cce_oracle import Problem, assert_close, check, expected, problem, run

from gemma_ext import linear_cross_entropy

MINUS = -float("inf")


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_nan_in_a_valid_row_stays_in_its_row(impl, softcap):
    p = problem(20, 24, 600, seed=1)
    p.e[7, 3] = float("nan")
    loss, grads = run(impl.loss, p, reduction="none", softcap=softcap)
    assert torch.isnan(loss).nonzero().flatten().tolist() == [7]
    assert torch.isnan(grads["e"]).any(1).nonzero().flatten().tolist() == [7]
    assert torch.isnan(grads["c"]).any()


@pytest.mark.parametrize("eps", ["auto", 0.5])
def test_the_filter_never_drops_a_nan(eps):
    p = problem(20, 24, 1500, seed=1)
    p.e[7, 3] = float("nan")
    loss, grads = run(linear_cross_entropy, p, impl="cce", filter_eps=eps)
    assert torch.isnan(loss)
    assert torch.isnan(grads["e"][7]).all()
    assert torch.isnan(grads["c"]).any(1).all()


@pytest.mark.parametrize("column", [0, 255, 256, 599])
def test_nan_in_one_word_reaches_every_loss(impl, column):
    p = problem(20, 24, 600, seed=2)
    p.c[column, 1] = float("nan")
    assert torch.isnan(impl.loss(p.e, p.c, p.targets, reduction="none")).all()


def test_infinite_hidden_state(impl):
    """inf - inf: NaN or inf by the sign of the target's logit, never a number."""
    p = problem(6, 24, 600, seed=3)
    p.e[2, 0] = float("inf")
    loss = impl.loss(p.e, p.c, p.targets, reduction="none")
    assert torch.isfinite(loss).logical_not().nonzero().flatten().tolist() == [2]


MASKS = {
    "some": torch.arange(5, 700, 7),
    "first tile": torch.arange(256),
    "middle tile": torch.arange(256, 512),
    "last tile": torch.arange(512, 700),
    "all but two": torch.cat((torch.arange(300), torch.arange(302, 700))),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_masked_words_take_no_part(impl, mask):
    """bias = -inf removes a word: no probability, no gradient, no NaN."""
    p = problem(40, 24, 700, seed=4)
    p.bias[mask] = MINUS
    free = torch.nonzero(p.bias > MINUS).squeeze(1)
    p.targets = free[p.targets % len(free)]
    got = run(impl.loss, p, reduction="sum")
    check(got, expected(p, reduction="sum"), floor=1e-6)
    for name in ("c", "bias"):
        assert torch.count_nonzero(got[1][name][mask]) == 0
    out = impl.loss(
        p.e, p.c, p.targets, bias=p.bias, return_entropy=True, return_argmax=True, return_lse=True
    )
    alone, _ = expected(Problem(p.e, p.c[free], torch.searchsorted(free, p.targets), p.bias[free]))
    assert_close(out.entropy, alone.entropy, rtol=2e-5, floor=2e-6)
    assert torch.equal(out.argmax, free[alone.argmax])


def test_masked_target_costs_infinity(impl):
    p = problem(5, 24, 700, seed=5)
    p.bias[p.targets[3]] = MINUS
    p.targets[[0, 1, 2, 4]] = 0
    p.bias[0] = 0.0
    loss = impl.loss(p.e, p.c, p.targets, bias=p.bias, reduction="none")
    assert torch.isinf(loss).tolist() == [False, False, False, True, False]
