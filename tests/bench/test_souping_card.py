"""The benchmark of merges on a card, on the CPU."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import bench_souping_card as bench

from gemma_ext.bench.timing import Measurement, Timing

SUBJECTS = {subject.name: subject for subject in bench.subjects()}


@pytest.fixture(scope="module")
def parts():
    return bench.layers(1, 48, "cpu")


def test_a_row_for_each_and_no_bars_without_a_card(parts):
    rows = bench.measure(parts, "cpu", seconds=0.0, least=1)
    assert [row["name"] for row in rows] == list(bench.NAMES)
    assert all(row["total"] > 0 and not row["bars"] for row in rows)
    assert rows[0]["share"] == pytest.approx(1)


def test_other_bits_print_no_time(parts, monkeypatch):
    def drifting(given):
        bench.plain(given)
        given[0].out.add_(len(calls))
        calls.append(1)

    calls: list[int] = []
    wrong = replace(SUBJECTS["linear"], run=drifting)
    monkeypatch.setattr(bench, "subjects", lambda: [wrong, SUBJECTS["eager linear"]])
    row = bench.measure(parts, "cpu", seconds=0.0, least=1)[1]
    assert row["note"] == "other bits than on the CPU"
    assert row["bars"] == "MISS"
    assert "total" not in row


@pytest.mark.parametrize("name", ["linear", "task arithmetic", "ties"])
def test_eager_compositions_are_the_same_merges(parts, name):
    """Up to their own rounding, and which of equal deltas a sort takes first."""
    SUBJECTS[name].run(parts)
    ours = torch.cat([part.out.flatten() for part in parts]).double()
    SUBJECTS[SUBJECTS[name].eager].run(parts)
    theirs = torch.cat([part.out.flatten() for part in parts]).double()
    base = torch.cat([part.base.flatten() for part in parts]).double()
    moved, off = (ours - base).norm(), (ours - theirs).norm()
    assert off < (0.5 if name == "ties" else 0.3) * moved


@pytest.mark.parametrize(("own", "passes"), [(1.0, True), (0.1, False)])
def test_bars(own, passes):
    def timing(seconds: float) -> Timing:
        return Timing((Measurement(seconds, seconds, seconds),))

    timed = {"ties": timing(2.4 / own), "task arithmetic": timing(1.0)}
    row = {"share": 0.9 * own, "x_eager": 11.0 * own}
    word = "pass" if passes else "MISS"
    for name in ("linear", "ties"):
        verdicts = bench.bars(SUBJECTS[name], row, timed)
        assert len(verdicts) == 2
        assert all(verdict.endswith(word) for verdict in verdicts)
