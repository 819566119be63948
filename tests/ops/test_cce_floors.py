"""Gradients where they are small, or where all logits are large: no worse than eager fp32."""

from __future__ import annotations

import pytest
import torch
from cce_oracle import Problem, assert_close, expected, problem, run


def confident(margin: float, vocab: int = 4000) -> Problem:
    """Rows whose label leads by about ``margin`` over the other words."""
    g = torch.Generator().manual_seed(1)
    c = torch.nn.functional.normalize(torch.randn(vocab, 64, generator=g), dim=1)
    labels = torch.randint(0, vocab, (256,), generator=g)
    return Problem(margin * c[labels], c, labels)


def eager(e, c, targets, bias=None, **_):
    return torch.nn.functional.cross_entropy(e @ c.T, targets, reduction="sum")


def check_rivals(impl, margin: float, bar: float) -> None:
    p = confident(margin, 200)
    _, want = expected(p, reduction="sum")
    _, got = run(impl.loss, p, reduction="sum")
    for name in got:
        error = (got[name].double() - want[name]).norm() / want[name].norm()
        assert error < bar, f"d{name}: {error:.1e}"


@pytest.mark.parametrize("margin", [20.0, 25.0, 30.0])
def test_certain_rows_keep_a_gradient(impl, margin):
    """p_y - 1 has no digits left where the loss is 2e-7; what the rivals hold has."""
    p = confident(margin)
    truth, want = expected(p, reduction="sum")
    assert truth.loss / 256 < 1e-3
    _, theirs = run(eager, p)
    _, ours = run(impl.loss, p, reduction="sum")
    for name in ours:
        error, bar = (
            (g[name].double() - want[name]).norm() / want[name].norm() for g in (ours, theirs)
        )
        if impl.name == "reference":
            bar = 2e-5  # a score of 30 in fp32 is known to 2e-6, and p to as much
        assert error <= bar, f"d{name}: {error:.1e} against {bar:.1e}"


@pytest.mark.parametrize("margin", [10.0, 20.0])
def test_rivals_in_the_labels_own_tile_are_not_lost(impl, margin):
    # the split products of a card know a score to 2^-16
    check_rivals(impl, margin, 2e-5 if impl.device == "cpu" else margin * 2.0**-16)


@pytest.mark.parametrize("offset", [300.0, -300.0, 16384.0])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_number_common_to_all_logits_costs_its_own_rounding(impl, offset, reduction):
    """Against the problem that fp32 logits of this size make: p is relative to the largest."""
    check_common_number(impl, offset, reduction)


def check_common_number(impl, offset: float, reduction: str) -> None:
    g = torch.Generator().manual_seed(2)
    step = torch.finfo(torch.float32).eps * abs(offset)
    # logits that are whole multiples of the rounding step stay exact
    c = (torch.randn(600, 8, generator=g) / step).round() * step
    e = torch.zeros(20, 8)
    e[torch.arange(20), torch.arange(20) % 8] = 1.0
    p = Problem(e, c, torch.randint(0, 600, (20,), generator=g), torch.full((600,), offset))
    _, want = expected(p, reduction=reduction)
    _, got = run(impl.loss, p, reduction=reduction)
    for name in got:
        assert_close(got[name], want[name], rtol=1e-5, what=f"d{name}")


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_sums_over_a_large_vocabulary(impl, reduction):
    """dE adds 256000 terms of one size: one running float32 sum would lose 4e-5 of them."""
    p = problem(16, 32, 256_000, spread=1.0, bias=False, seed=3)
    _, want = expected(p, reduction=reduction)
    _, got = run(impl.loss, p, reduction=reduction)
    error = (got["e"].double() - want["e"]).norm() / want["e"].norm()
    assert error < 1.5e-6, f"{error:.1e}"
