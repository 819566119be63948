"""The judges of every other test."""

from __future__ import annotations

import pytest
import torch

from gemma_ext.testing import assert_close, difference, poisoned_empty


def test_measures():
    d = difference(torch.tensor([3.0, 4.0, 1.0]), torch.tensor([3.0, 4.0, 0.0]))
    assert d.max_abs == 1.0
    assert d.worst == 2
    assert d.rel == pytest.approx(0.2)
    assert d.cosine_gap == pytest.approx(1 - 5 / 26**0.5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_positions_come_first(bad):
    x, y = torch.ones(4), torch.ones(4)
    x[2] = bad
    with pytest.raises(AssertionError, match="first at flat position 2"):
        assert_close(x, y, rel=1e9)
    y[2] = bad
    assert_close(x, y, rel=0.0)


def test_worst_is_a_position_of_the_whole_tensor():
    x = torch.tensor([float("nan"), 1.0, 5.0])
    assert difference(x, torch.tensor([float("nan"), 1.0, 1.0])).worst == 2


def test_limits_are_named():
    with pytest.raises(AssertionError, match=r"dC: expected rel <= 1.000e-03, got max abs"):
        assert_close(torch.ones(2) * 1.01, torch.ones(2), rel=1e-3, name="dC")
    with pytest.raises(AssertionError, match="expected shape"):
        assert_close(torch.ones(2), torch.ones(3), rel=1.0)


def test_empty_and_zero():
    assert_close(torch.empty(0), torch.empty(0), rel=0.0)
    assert difference(torch.zeros(3), torch.zeros(3)).cosine_gap == 0.0
    assert difference(torch.ones(3), torch.zeros(3)).cosine_gap == 1.0


def test_poison_fills_and_leaves_no_trace():
    before = torch.are_deterministic_algorithms_enabled()
    with poisoned_empty():
        assert torch.isnan(torch.empty(5)).all()
        assert torch.empty(5, dtype=torch.int64).eq(torch.iinfo(torch.int64).max).all()
    assert torch.are_deterministic_algorithms_enabled() == before
