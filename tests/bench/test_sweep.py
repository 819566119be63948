"""The sweep over kept shares, on the CPU."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import sweep_cce


@pytest.mark.parametrize("share", [0.05, 0.3, 1.0])
def test_the_threshold_keeps_at_least_the_share(share):
    def kept(eps: float) -> float:
        return min(1.0, 2e-4 / eps)

    found = sweep_cce.threshold(SimpleNamespace(kept=kept), share)
    assert share <= kept(found) < 1.05 * share or share == 1.0
    assert kept(1.06 * found) < share


def test_points_keep_what_they_are_named_after(monkeypatch):
    monkeypatch.setattr(sweep_cce, "SHARES", (0.25, 1.0))
    rows = sweep_cce.measure((48, 96, 2048), "fp32", "cpu", seconds=0.0, least=1)
    found = {row["name"]: row for row in rows}
    assert list(found) == ["exact", *sweep_cce.OWN_KINDS, "25%", "100%"]
    assert found["exact"]["kept"] == found["100%"]["kept"] == 1.0
    assert found["25%"]["kept"] == pytest.approx(0.25, abs=0.1)
    assert all(row["total"] > row["forward"] > 0 for row in rows)
    assert not any(row["bars"] for row in rows)  # they are a card's
    assert [sweep_cce.LAYOUT.place(name) for name in ("exact", "plaw-4", "1%")] == [0, 1, 6]


@pytest.mark.parametrize(
    ("name", "ms", "x_exact", "verdicts"),
    [
        ("plaw-2.5", 18.4, 2.0, ["pass", "pass"]),
        ("plaw-2.5", 18.6, 0.9, ["MISS", "MISS"]),
        ("4%", 24.9, 0.99, ["pass", "pass"]),
        ("9%", 34.1, 1.5, ["pass", "MISS"]),
        ("70%", 60.0, 0.97, ["MISS"]),
        ("exact", 60.0, 1.0, []),
    ],
)
def test_bars(name, ms, x_exact, verdicts):
    row = {"name": name, "total": ms / 1e3, "x_exact": x_exact}
    found = sweep_cce.bars(sweep_cce.BAR_SHAPE, "cuda", row)
    assert [text.rsplit(" ", 1)[1] for text in found] == verdicts
