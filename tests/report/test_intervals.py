"""Student's intervals over seeds."""

import pytest

from gemma_ext.report import interval


def test_intervals_are_students():
    assert interval([0.4]) == (0.4, None)
    mean, half = interval([0.1, 0.2, 0.3])
    assert mean == pytest.approx(0.2)
    assert half == pytest.approx(4.303 * 0.1 / 3**0.5)
    assert interval([2.0, 2.0]) == (2.0, 0.0)


def test_points_are_those_of_the_distribution():
    t = pytest.importorskip("scipy.stats").t
    for count in range(2, 11):
        values = [float(x) for x in range(count)]
        spread = (count * (count + 1) / 12) ** 0.5  # of 0 .. count - 1
        expected = t.ppf(0.975, count - 1) * spread / count**0.5
        assert interval(values)[1] == pytest.approx(expected, rel=5e-4)  # of four digits
    assert interval([0.0, 1.0] * 10)[1] > interval([0.0, 1.0] * 20)[1]
