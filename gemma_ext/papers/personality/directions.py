"""A trait as a direction, and what of other traits is taken out of it.

v = mean_i (a_i+ - a_i-)                  v <- v / |v|
subspace: v <- v - B (B^T S^-1 B)^-1 B^T S^-1 v      S = I as released, or the covariance
contrast: v <- v/|v| + c/|c|,  c = mean(target) - mean(other), the paper's own (as summarised)
"""

from __future__ import annotations

import torch
from torch import Tensor

SPAN = (
    1e-5  # relative: what is left of v below this is rounding, and B's columns below it dependent
)


class Mean:
    """Running mean of rows [n, D] in float32 by Welford's update, for any cut into batches."""

    def __init__(self) -> None:
        self.count = 0
        self.value: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        if rows.ndim != 2:
            raise ValueError(f"rows: expected [n, D], got {list(rows.shape)}")
        if rows.shape[0] == 0:
            return
        rows = rows.detach().float()
        self.count += rows.shape[0]
        if self.value is None:
            self.value = torch.zeros_like(rows[0])
        self.value += (rows - self.value).sum(0) / self.count

    def result(self) -> Tensor:
        """[D] float32.

        Raises:
            ValueError: no rows came.
        """
        if self.value is None:
            raise ValueError("rows: expected at least one before the mean, got none")
        return self.value


def unit(v: Tensor) -> Tensor:
    """v / |v|.

    Raises:
        ValueError: a vector of length 0 or not finite.
    """
    length = v.double().norm()
    if not (torch.isfinite(length) and length > 0):
        raise ValueError(f"v: expected a finite vector other than 0, got length {length.item()}")
    return (v.double() / length).to(v.dtype)


def difference(high: Tensor, low: Tensor) -> Tensor:
    """The unit direction from the mean of low rows [m, D] to that of high rows [n, D]."""
    up, down = Mean(), Mean()
    up.add(high)
    down.add(low)
    return unit(up.result() - down.result())


def without(v: Tensor, others: Tensor, covariance: Tensor | None = None) -> Tensor:
    """The unit vector of v with the span of other directions taken out, in float64 inside.

    Args:
        v: [D].
        others: [n, D]; dependent ones count once.
        covariance: [D, D], positive definite: what is taken out is then what the others say of v
            under it (linear discriminant analysis), not its right-angled shadow.

    Raises:
        ValueError: v lies in the span of the others.
    """
    target, rows = v.double(), others.double()
    if rows.ndim != 2 or target.ndim != 1 or rows.shape[1] != target.shape[0]:
        raise ValueError(
            f"others: expected [n, {target.shape[0] if target.ndim else 1}], "
            f"got {list(others.shape)}"
        )
    root = None
    if covariance is not None:
        root = torch.linalg.cholesky(covariance.double())
        target = torch.linalg.solve_triangular(root, target[:, None], upper=False)[:, 0]
        rows = torch.linalg.solve_triangular(root, rows.T, upper=False).T
    left, sizes, _ = torch.linalg.svd(rows.T, full_matrices=False)
    basis = left[:, sizes > SPAN * sizes[:1].clamp_min(torch.finfo(torch.float64).tiny)]
    kept = target - basis @ (basis.T @ target)
    kept = kept - basis @ (basis.T @ kept)
    if kept.norm() <= SPAN * target.norm():
        raise ValueError("v: expected a direction outside the span of the others, got one inside")
    if root is not None:
        kept = root @ kept
    return unit(kept).to(v.dtype)


def contrasted(v: Tensor, target: Tensor, other: Tensor) -> Tensor:
    """v, sharpened by the direction from one trait's rows [n, D] to another's [m, D]."""
    return unit(unit(v) + difference(target, other).to(v.dtype))


def crossed(response: Tensor) -> Tensor:
    """Coefficients [traits, traits] over the directions that move one trait alone, by measurement.

    Args:
        response: [traits, traits], what a unit of direction j did to trait i. Row t of the result
            is c with response c = e_t, the smallest such c where the response has no inverse.
    """
    if response.ndim != 2 or response.shape[0] != response.shape[1]:
        raise ValueError(f"response: expected [traits, traits], got {list(response.shape)}")
    return torch.linalg.pinv(response.double()).T.to(response.dtype)
