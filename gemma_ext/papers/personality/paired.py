"""Two conditions on the same items: differences with their uncertainty.

delta = mean_i (after_i - before_i)          an item's scores averaged over its samples first
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Difference:
    """after - before.

    Attributes:
        mean: over items.
        low, high: 95 % interval of the paired bootstrap over items.
        p: of McNemar's exact test on the first sample of each item; None unless scores are 0 or 1.
    """

    mean: float
    low: float
    high: float
    p: float | None

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def mcnemar(lost: int, gained: int) -> float:
    """Two-sided exact p of items that changed sides, Binomial(lost + gained, 1/2); 1 for none.

    Raises:
        ValueError: a negative count.
    """
    if lost < 0 or gained < 0:
        raise ValueError(f"expected counts of 0 or more, got {lost} and {gained}")
    if lost + gained == 0:
        return 1.0
    from scipy.stats import binomtest

    return float(binomtest(lost, lost + gained).pvalue)


def difference(
    before: Sequence[float] | np.ndarray,
    after: Sequence[float] | np.ndarray,
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> Difference:
    """The paired difference of two conditions.

    Args:
        before, after: [items] or [items, samples], item by item the same questions.
        resamples: of the bootstrap, at least 1.

    Raises:
        ValueError: no items, or shapes that differ.
    """
    first, second = _matrix("before", before), _matrix("after", after)
    if first.shape[0] != second.shape[0]:
        raise ValueError(
            f"after: expected the {first.shape[0]} items of before, got {second.shape[0]}"
        )
    if resamples < 1:
        raise ValueError(f"resamples: expected at least 1, got {resamples}")
    gaps = second.mean(1) - first.mean(1)
    items = len(gaps)
    drawn = np.random.default_rng(seed).integers(0, items, (resamples, items))
    low, high = np.quantile(gaps[drawn].mean(1), (0.025, 0.975))
    return Difference(
        float(gaps.mean()), float(low), float(high), _exact(first[:, 0], second[:, 0])
    )


def _exact(before: np.ndarray, after: np.ndarray) -> float | None:
    if not np.isin(np.concatenate([before, after]), (0.0, 1.0)).all():
        return None
    return mcnemar(int((before > after).sum()), int((after > before).sum()))


def _matrix(name: str, values: Sequence[float] | np.ndarray) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim == 1:
        array = array[:, None]
    if array.ndim != 2 or array.size == 0:
        raise ValueError(f"{name}: expected [items] or [items, samples], got {list(array.shape)}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: expected finite scores, got some that are not")
    return array


def holm(p: Sequence[float]) -> list[float]:
    """p adjusted for having made several tests (Holm's step-down), in the order given."""
    order = sorted(range(len(p)), key=lambda i: p[i])
    adjusted, largest = [0.0] * len(p), 0.0
    for place, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p) - place) * p[i]))
        adjusted[i] = largest
    return adjusted
