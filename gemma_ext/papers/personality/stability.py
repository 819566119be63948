"""The paper's stability framework: how evenly a manipulation leaves benchmarks alone.

    z_b = delta_b / range_b            range_b = max - min of delta_b over all rows
    consistency = 1 / (1 + population variance of the group's z)
    low_disruption = 1 / (1 + mean |z|)             composite = consistency low_disruption

A group is all rows of a method, of a trait, or of both. The composite is largest, 1, where nothing
changed, so it says nothing without the alignment beside it; and a row that is added moves every
range, so `Ranges` are kept and can be given again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev, pvariance

LEVELS = {"method": ("method",), "trait": ("trait",), "combination": ("method", "trait")}

Ranges = Mapping[str, float]
"""What a benchmark's differences are divided by."""


@dataclass(frozen=True)
class Row:
    """The differences of one manipulation by benchmark, each to the baseline of its own run."""

    method: str
    trait: str
    delta: Mapping[str, float]


@dataclass(frozen=True)
class Stability:
    """Both parts in (0, 1], higher is steadier."""

    consistency: float
    low_disruption: float

    @property
    def composite(self) -> float:
        return self.consistency * self.low_disruption


def ranges(rows: Sequence[Row], scale: str = "range") -> dict[str, float]:
    """Of every benchmark: max - min, or with scale="sd" the population's standard deviation.

    Raises:
        ValueError: no rows, rows of other benchmarks, an unknown scale.
    """
    spread = {"range": lambda values: max(values) - min(values), "sd": pstdev}
    if scale not in spread:
        raise ValueError(f"scale: expected range or sd, got {scale!r}")
    names = _benchmarks(rows)
    return {name: spread[scale]([row.delta[name] for row in rows]) for name in names}


def stability(z: Sequence[float]) -> Stability:
    """Of scaled differences.

    Raises:
        ValueError: none.
    """
    if not z:
        raise ValueError("z: expected at least one difference, got none")
    return Stability(1 / (1 + pvariance(z)), 1 / (1 + fmean(abs(value) for value in z)))


def levels(
    rows: Sequence[Row], by: Ranges | None = None
) -> dict[str, dict[tuple[str, ...], Stability]]:
    """Stability of every group at the three levels of the paper.

    Args:
        by: ranges to divide by, those of `rows` by default; a range of 0 makes its z 0.
    """
    by = ranges(rows) if by is None else by
    missing = [name for name in _benchmarks(rows) if name not in by]
    if missing:
        raise ValueError(f"by: expected the ranges of {', '.join(missing)} too, got {sorted(by)}")
    return {level: _groups(rows, by, keys) for level, keys in LEVELS.items()}


def _groups(
    rows: Sequence[Row], by: Ranges, keys: tuple[str, ...]
) -> dict[tuple[str, ...], Stability]:
    z: dict[tuple[str, ...], list[float]] = {}
    for row in rows:
        z.setdefault(_key(row, keys), []).extend(_scaled(row, by))
    return {group: stability(values) for group, values in z.items()}


def _key(row: Row, keys: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(getattr(row, key) for key in keys)


def _scaled(row: Row, by: Ranges) -> list[float]:
    return [delta / by[name] if by[name] else 0.0 for name, delta in row.delta.items()]


def _benchmarks(rows: Sequence[Row]) -> list[str]:
    if not rows or not rows[0].delta:
        raise ValueError("rows: expected at least one with differences, got none")
    names = list(rows[0].delta)
    for row in rows:
        if set(row.delta) != set(names):
            raise ValueError(
                f"rows: expected the benchmarks {', '.join(names)} in all, "
                f"got {', '.join(row.delta)} of {row.method}, {row.trait}"
            )
    return names
