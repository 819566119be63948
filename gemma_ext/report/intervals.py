"""Figures over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

# two-sided 95 % points of Student's t for 1, 2, ... degrees of freedom
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and half the width of its 95 % interval by Student's t; None for one value.

    Of more than ten values the interval is that of ten, a little too wide.
    """
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None
    t = _T[min(len(values) - 1, len(_T)) - 1]
    return mean, t * statistics.stdev(values) / len(values) ** 0.5
