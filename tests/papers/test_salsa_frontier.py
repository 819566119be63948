"""Comparison at equal measured divergence."""

from __future__ import annotations

import math
import random

import pytest

from gemma_ext.papers.salsa import Difference, Frontier, compare, interval
from gemma_ext.papers.salsa.frontier import common_range


def test_dominated_points_are_dropped_and_the_rest_is_straight_in_the_root():
    frontier = Frontier([(4.0, 1.0), (1.0, 0.0), (2.0, -1.0), (9.0, 0.5), (16.0, 3.0)])
    assert frontier.points == [(1.0, 0.0), (4.0, 1.0), (16.0, 3.0)]
    assert frontier.at(1.0) == 0.0
    assert frontier.at(16.0) == 3.0
    assert frontier.at(2.25) == pytest.approx(0.5)
    assert frontier.at(9.0) == pytest.approx(2.0)


def test_a_root_curve_is_interpolated_exactly():
    points = [(kl, 2 * math.sqrt(kl) - 1) for kl in (0.0, 0.3, 1.7, 5.0)]
    random.Random(0).shuffle(points)
    frontier = Frontier(points)
    for kl in (0.0, 0.1, 0.9, 3.3, 5.0):
        assert frontier.at(kl) == pytest.approx(2 * math.sqrt(kl) - 1)
        assert frontier.needed(frontier.at(kl)) == pytest.approx(kl, abs=1e-9)


def test_behind_the_best_point_the_best_is_kept_and_nothing_is_extrapolated():
    frontier = Frontier([(1.0, 2.0), (5.0, 1.0)])
    assert (frontier.start, frontier.end) == (1.0, 5.0)
    assert frontier.at(5.0) == 2.0
    for kl in (0.9, 5.1):
        with pytest.raises(ValueError, match=r"expected kl in \[1, 5\]"):
            frontier.at(kl)
    assert frontier.needed(2.5) is None
    assert frontier.needed(-3.0) == 1.0


def test_points_have_to_be_numbers():
    with pytest.raises(ValueError, match="at least one point"):
        Frontier([])
    for point in ((-0.1, 0.0), (math.nan, 0.0), (1.0, math.inf)):
        with pytest.raises(ValueError, match="finite points"):
            Frontier([point])


def test_intervals_are_students():
    mean, half = interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert interval([1.0]) == (1.0, math.inf)
    with pytest.raises(ValueError, match="at least one value"):
        interval([])


def test_methods_are_compared_seed_by_seed_at_one_divergence():
    roots = (0.5, 1.0, 2.0)
    baseline = {s: Frontier([(r * r, r + s) for r in roots]) for s in (1, 2, 3)}
    method = {s: Frontier([(r * r, r + s + 0.25) for r in roots]) for s in (1, 2, 3, 4)}
    found = compare(method, baseline, places=4)
    assert [round(math.sqrt(d.kl), 6) for d in found] == [0.5, 1.0, 1.5, 2.0]
    for difference in found:
        assert difference.mean == pytest.approx(0.25)
        assert difference.seeds == 3
        assert difference.half < 1e-9
        assert difference.decided
    assert len(compare(method, baseline, places=1)) == 1
    with pytest.raises(ValueError, match="seed that both"):
        compare(method, {9: baseline[1]})


def test_a_larger_divergence_is_no_win():
    """The same curve walked further: more reward at equal beta, none at equal divergence."""
    curve = [(k * k / 4, k / 2) for k in range(1, 9)]
    near = {s: Frontier(curve[:5]) for s in (1, 2)}
    far = {s: Frontier(curve[2:]) for s in (1, 2)}
    assert max(p[1] for p in curve[2:]) > max(p[1] for p in curve[:5])
    for difference in compare(far, near):
        assert difference.mean == pytest.approx(0.0, abs=1e-12)


def test_ranges_that_do_not_meet_give_nothing():
    low, high = Frontier([(1.0, 0.0), (2.0, 1.0)]), Frontier([(3.0, 0.0)])
    assert common_range([low, high]) is None
    assert compare({1: high}, {1: low}) == []


def test_one_seed_decides_nothing():
    assert not Difference(1.0, 5.0, math.inf, 1).decided
