"""What a merged model is worth: multi-task performance, retention, and what they cost.

    normalised_t = score(merged, t) / score(expert_t, t)         performance = mean over domains
    retention_g  = score(merged, g) / score(base, g)             forgetting  = 1 - mean retention

Scores lie in [0, 1] and rise with quality; a rate that should fall is turned round first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gemma_ext import report


def turned(rate: float) -> float:
    """1 - rate, of a rate in [0, 1] that should fall (harmful answers, attack success)."""
    if not 0 <= rate <= 1:
        raise ValueError(f"rate: expected a number in [0, 1], got {rate}")
    return 1 - rate


def normalised(scores: Mapping[str, float], reference: Mapping[str, float]) -> dict[str, float]:
    """Each score over that of the reference, by task.

    Raises:
        ValueError: a task is missing on one side, or its reference score is not positive.
    """
    if scores.keys() != reference.keys():
        odd = sorted(scores.keys() ^ reference.keys())
        raise ValueError(f"scores: expected the tasks of the reference, got a difference in {odd}")
    for task, value in reference.items():
        if not value > 0:
            raise ValueError(f"reference: expected a positive score of {task}, got {value}")
    return {task: scores[task] / reference[task] for task in reference}


def mean(values: Mapping[str, float]) -> float:
    return math.fsum(values.values()) / len(values)


@dataclass(frozen=True)
class Interval:
    """Mean over seeds and the half width of its 95 % interval (Student's t); infinite for one."""

    mean: float
    half: float

    def __str__(self) -> str:
        return f"{self.mean:.3f}" if math.isinf(self.half) else f"{self.mean:.3f} ± {self.half:.3f}"


def interval(values: Sequence[float]) -> Interval:
    """The interval of the mean of independent values, one per seed."""
    mean, half = report.interval(values)
    return Interval(mean, math.inf if half is None else half)


def ranks(scores: Mapping[str, float]) -> dict[str, float]:
    """1 for the largest score; equal scores share the mean of their places."""
    order = sorted(scores.values(), reverse=True)
    place: dict[float, float] = {}
    for value in set(order):
        first = order.index(value) + 1
        place[value] = first + (order.count(value) - 1) / 2
    return {name: place[value] for name, value in scores.items()}
