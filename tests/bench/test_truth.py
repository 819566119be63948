"""The sampled truth against float64 autograd, and the filter analysis against its definition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gemma_ext.bench import data, filtering, truth

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


def _rows() -> filtering.ExactRows:
    head = data.head_data("plaw-1.6", 40, 64, 1100)
    return filtering.ExactRows(head.e, head.c, head.targets, 30.0)


def test_blocks_follow_the_predicate() -> None:
    batch, eps = _rows(), 2.0**-9
    order = filtering.descending(batch.kept_count(eps))
    kept = filtering.keep_blocks(batch.distance, order, filtering.Blocks(8, 256), eps)
    assert kept.shape == (5, 5)
    for row in range(5):
        for tile in range(5):
            part = batch.distance[8 * row : 8 * row + 8][:, order[256 * tile : 256 * tile + 256]]
            assert kept[row, tile] == (part >= eps).any()


def test_compensation_restores_the_row_sums() -> None:
    head = data.head_data("plaw-1.6", 40, 64, 1100)
    batch = filtering.ExactRows(head.e, head.c, head.targets, None)
    order = torch.arange(1100)
    # Constant classifier columns see only row sums of G: they vanish iff no mass is lost.
    ones = torch.cat([torch.ones(1100, 1), batch.c[:, 1:]], 1)
    flat = filtering.ExactRows(batch.e, ones, head.targets, None)
    found = filtering.outcome(flat, order, filtering.Blocks(1, 256), 2.0**-6)
    assert 0 < found.kept < 1
    assert found.dropped > 0
    assert found.de < found.de_plain


def test_everything_kept_is_exact() -> None:
    batch = _rows()
    found = filtering.outcome(batch, torch.arange(1100), filtering.Blocks(8, 256), 0.0)
    assert found.kept == 1.0
    assert found.dropped == 0.0
    assert max(found.de, found.dc, found.de_plain, found.dc_plain) < 1e-6
