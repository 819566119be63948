"""Figures over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from gemma_ext.extras import require


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and half the width of its 95 % interval by Student's t; None for one value.

    Raises:
        ValueError: no value.
        ImportError: several values, and scipy is missing.
    """
    if not values:
        raise ValueError("values: expected at least one value, got none")
    mean = statistics.fmean(values)
    if len(values) == 1:
        return mean, None
    require("an interval over seeds", "genome", "scipy")
    from scipy.stats import t

    error = statistics.stdev(values) / len(values) ** 0.5
    return mean, float(t.ppf(0.975, len(values) - 1)) * error
