"""The sampled truth against float64 autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gemma_ext.bench import data, truth

N, D, V = 150, 96, 2500  # more than one panel of 2048 columns


@pytest.mark.parametrize("softcap", [30.0, None])
def test_full_sample_equals_autograd(softcap: float | None) -> None:
    head = data.head_data("plaw-2.5", N, D, V)
    sample = truth.sample_for(head.targets, V, rows=N, columns=V)
    lse = truth.row_lse(head.e, head.c, softcap)
    exact = truth.exact(head.e, head.c, head.targets, lse, sample, softcap)
    e, c = (x.double().requires_grad_() for x in (head.e, head.c))
    logits = e @ c.T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    loss = F.cross_entropy(logits, head.targets)
    loss.backward()
    found = truth.errors(exact, loss.item(), e.grad[sample.rows], c.grad[sample.columns])
    assert max(found.loss, found.de, found.dc) < 5e-6


def test_sampled_error_estimates_the_full_error() -> None:
    head = data.head_data("plaw-1.6", N, D, V)
    lse = truth.row_lse(head.e, head.c, 30.0)
    estimates = {}
    noise = None
    for columns in (V, 200):
        sample = truth.sample_for(head.targets, V, rows=N, columns=columns)
        exact = truth.exact(head.e, head.c, head.targets, lse, sample, 30.0)
        if noise is None:
            noise = torch.zeros(V, D)
            noise[sample.columns] = exact.dc.abs().mean() * torch.randn(
                V, D, generator=torch.Generator().manual_seed(0)
            )
        wrong = exact.dc + noise[sample.columns]
        estimates[columns] = truth.errors(exact, exact.loss, exact.de, wrong).dc
    assert estimates[V] > 0.05
    assert estimates[200] == pytest.approx(estimates[V], rel=0.1)


def test_a_wrong_gradient_is_seen() -> None:
    head = data.head_data("plaw-4", N, D, V)
    lse = truth.row_lse(head.e, head.c, 30.0)
    exact = truth.exact(head.e, head.c, head.targets, lse, truth.sample_for(head.targets, V), 30.0)
    found = truth.errors(exact, 1.01 * exact.loss, 1.02 * exact.de, 0.97 * exact.dc)
    assert found.loss == pytest.approx(0.01, rel=1e-3)
    assert found.de == pytest.approx(0.02, rel=1e-3)
    assert found.dc == pytest.approx(0.03, rel=1e-3)
