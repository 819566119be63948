"""Answers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from cce_oracle import Problem, assert_close, run

LN2, LN3 = math.log(2), math.log(3)


def test_three_tokens(impl):
    p = Problem(
        torch.tensor([[1.0]]),
        torch.tensor([[0.0], [LN2], [LN3]]),
        torch.tensor([2]),
        torch.zeros(3),
    )
    loss, grads = run(impl.loss, p)
    assert_close(loss, torch.tensor(LN2), rtol=1e-6)
    assert_close(grads["e"], torch.tensor([[LN2 / 3 - LN3 / 2]]), rtol=1e-6)
    third = torch.tensor([1 / 6, 1 / 3, -1 / 2])
    assert_close(grads["c"], third[:, None], rtol=1e-6)
    assert_close(grads["bias"], third, rtol=1e-6)


def test_softcap_derivative(impl):
    p = Problem(torch.tensor([[1.0]]), torch.tensor([[0.0], [30.0]]), torch.tensor([0]))
    loss, grads = run(impl.loss, p, softcap=30.0)
    top = 30 * math.tanh(1)
    assert_close(loss, torch.tensor(math.log(1 + math.exp(top))), rtol=1e-6)
    assert loss.item() == pytest.approx(22.847825, abs=2e-5)
    assert grads["c"][1].item() == pytest.approx(1 / math.cosh(1) ** 2, rel=1e-5)
    assert grads["c"][0].item() == pytest.approx(-1.0, rel=1e-5)


@pytest.mark.parametrize("vocab", [1, 2, 257, 1000])
def test_zero_classifier_is_uniform(impl, vocab):
    g = torch.Generator().manual_seed(vocab)
    e = torch.randn(5, 3, generator=g)
    y = torch.randint(0, vocab, (5,), generator=g)
    loss, grads = run(impl.loss, Problem(e, torch.zeros(vocab, 3), y))
    assert_close(loss, torch.tensor(math.log(vocab)), rtol=2e-6)
    residual = torch.full((5, vocab), 1 / vocab, dtype=torch.float64)
    residual[torch.arange(5), y] -= 1
    assert_close(grads["c"], residual.T @ e.double() / 5, rtol=1e-5)
    assert torch.count_nonzero(grads["e"]) == 0


@pytest.mark.parametrize("vocab", [2, 300])
def test_saturated_cap(impl, vocab):
    """a_y = 1e4 and the rest -1e4: the cap leaves a gap of 60 and no gradient."""
    c = torch.full((vocab, 1), -1e4)
    c[1] = 1e4
    p = Problem(torch.ones(3, 1), c, torch.ones(3, dtype=torch.long))
    loss, grads = run(impl.loss, p, softcap=30.0)
    assert abs(loss.item() - math.log1p((vocab - 1) * math.exp(-60))) < 1e-6
    assert torch.count_nonzero(grads["c"]) == 0
    assert torch.count_nonzero(grads["e"]) == 0


def test_one_word_vocabulary_has_no_loss(impl):
    p = Problem(torch.randn(4, 8), torch.randn(1, 8), torch.zeros(4, dtype=torch.long))
    loss, grads = run(impl.loss, p)
    assert loss.item() == 0
    assert all(torch.count_nonzero(g) == 0 for g in grads.values())


def test_uncapped_logits_of_ten_thousand_do_not_overflow(impl):
    """exp(1e4) is inf: the sum must be taken relative to the largest logit."""
    c = torch.zeros(600, 1)
    c[7], c[400] = 1e4, 1e4 - LN2
    p = Problem(torch.ones(1, 1), c, torch.tensor([400]))
    loss, grads = run(impl.loss, p)
    # An fp32 logit near 1e4 is a multiple of 2^-10.
    gap = (c[7] - c[400]).double().exp().item()
    assert loss.item() == pytest.approx(math.log1p(gap), rel=1e-3)
    assert grads["c"][400].item() == pytest.approx(1 / (1 + gap) - 1, rel=1e-3)


def test_entropy_and_lse_of_a_uniform_row(impl):
    p = Problem(torch.ones(2, 4), torch.zeros(300, 4), torch.tensor([0, 299]))
    out, _ = run(impl.loss, p, return_lse=True, return_entropy=True)
    want = torch.full((2,), math.log(300))
    assert_close(out.lse, want, rtol=1e-6)
    assert_close(out.entropy, want, rtol=1e-6)
