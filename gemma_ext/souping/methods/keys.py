"""Parameters that several methods take, under mergekit's keys."""

from __future__ import annotations

from collections.abc import Sequence

from gemma_ext.souping.method import Parameter

WEIGHT = Parameter("weight", per_model=True)
DENSITY = Parameter("density", 1.0, per_model=True)
LAMBDA = Parameter("lambda", 1.0)
INT8_MASK = Parameter("int8_mask", False, kind=bool)
"""Accepted and without effect: no mask is ever stored."""

NORMS = ("l1", "l2", "linf")


def normalize(default: bool) -> Parameter:
    """Divide by the sum of the weights that took part."""
    return Parameter("normalize", default, kind=bool)


def shares(weights: Sequence[float], name: str) -> list[float]:
    """Weights over their sum.

    Raises:
        ValueError: the sum is 0; `name` is of the tensor.
    """
    total = sum(weights)
    if total == 0:
        raise ValueError(
            f"expected weights that do not add up to 0, got {list(weights)} for {name}"
        )
    return [weight / total for weight in weights]


def one_of(key: str, value: str, known: Sequence[str]) -> str:
    """`value`, if it is among the known ones.

    Raises:
        ValueError: it is not.
    """
    if value not in known:
        raise ValueError(f"expected {key} to be one of {', '.join(known)}, got {value!r}")
    return value
