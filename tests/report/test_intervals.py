"""Student's intervals over seeds."""

import pytest

from gemma_ext import extras
from gemma_ext.report import interval


def test_intervals_are_students():
    assert interval([0.4]) == (0.4, None)
    mean, half = interval([0.1, 0.2, 0.3])
    assert mean == pytest.approx(0.2)
    assert half == pytest.approx(4.302653 * 0.1 / 3**0.5)
    assert interval([2.0, 2.0]) == (2.0, 0.0)
    assert interval([0.0, 1.0] * 10)[1] == pytest.approx(2.093024 * (5 / 19) ** 0.5 / 20**0.5)


def test_no_value():
    with pytest.raises(ValueError, match="values: expected at least one value, got none"):
        interval([])


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    assert interval([1.0]) == (1.0, None)
    with pytest.raises(ImportError, match=r"needs scipy: pip install 'gemma_ext\[genome\]'"):
        interval([1.0, 2.0])
