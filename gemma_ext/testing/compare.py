"""Comparison of a result with its oracle: inf and nan positions first, then three measures."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Difference:
    """How far `got` is from `expected` over their finite entries, measured in float64.

    Attributes:
        max_abs: largest absolute difference.
        rel: ||got - expected|| / ||expected|| (absolute norm where expected is zero).
        cosine_gap: 1 - cosine of the angle between them; 0 when both are zero, 1 when one is.
        worst: flat position of the largest absolute difference.
    """

    max_abs: float
    rel: float
    cosine_gap: float
    worst: int

    def __str__(self) -> str:
        return (
            f"max abs {self.max_abs:.3e} at flat position {self.worst}, "
            f"relative {self.rel:.3e}, 1 - cosine {self.cosine_gap:.3e}"
        )


def difference(got: Tensor, expected: Tensor, name: str = "result") -> Difference:
    """Measure got against expected, any equal shapes.

    Raises:
        AssertionError: shapes differ, or nan, +inf or -inf stand in different places.
    """
    if got.shape != expected.shape:
        raise AssertionError(
            f"{name}: expected shape {list(expected.shape)}, got {list(got.shape)}"
        )
    x = got.detach().to("cpu", torch.float64).reshape(-1)
    y = expected.detach().to("cpu", torch.float64).reshape(-1)
    for kind, mask in (("nan", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        wrong = (mask(x) != mask(y)).nonzero().reshape(-1)
        if wrong.numel():
            i = int(wrong[0])
            raise AssertionError(
                f"{name}: {kind} differs in {wrong.numel()} places, first at flat position {i}: "
                f"expected {float(y[i])}, got {float(x[i])}"
            )
    finite = torch.isfinite(y)
    gap = torch.where(finite, x - y, torch.zeros_like(x))
    x, y = x[finite], y[finite]
    if gap.numel() == 0:
        return Difference(0.0, 0.0, 0.0, 0)
    norm_x, norm_y = float(x.norm()), float(y.norm())
    if norm_x == 0.0 or norm_y == 0.0:
        cosine_gap = 0.0 if norm_x == norm_y else 1.0
    else:
        cosine_gap = max(0.0, 1.0 - float(torch.dot(x / norm_x, y / norm_y)))
    worst = int(gap.abs().argmax())
    return Difference(
        max_abs=float(gap.abs()[worst]),
        rel=float(gap.norm()) / (norm_y or 1.0),
        cosine_gap=cosine_gap,
        worst=worst,
    )


def assert_close(
    got: Tensor,
    expected: Tensor,
    *,
    rel: float | None = None,
    max_abs: float | None = None,
    cosine_gap: float | None = None,
    name: str = "result",
) -> Difference:
    """Raise AssertionError unless every measure that is given a limit stays within it.

    Returns:
        The difference, for printing.
    """
    found = difference(got, expected, name)
    limits = (("max_abs", max_abs), ("rel", rel), ("cosine_gap", cosine_gap))
    over = [
        f"{key} <= {limit:.3e}"
        for key, limit in limits
        if limit is not None and not getattr(found, key) <= limit
    ]
    if over:
        raise AssertionError(f"{name}: expected {', '.join(over)}, got {found}")
    return found
