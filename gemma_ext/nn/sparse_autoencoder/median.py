"""Geometric median, where the decoder's bias starts."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def geometric_median(points: Tensor, *, iterations: int = 100, tolerance: float = 1e-5) -> Tensor:
    """The point with the least sum of distances to points [n, D], by Weiszfeld's iteration.

    Args:
        iterations: at most.
        tolerance: a shorter step ends the iteration.

    Returns:
        [D] in float32.
    """
    points = points.float()
    median = points.mean(0)
    for _ in range(iterations):
        distances = (points - median).norm(dim=-1).clamp(min=1e-12)
        weights = distances.reciprocal()
        moved = (weights / weights.sum()) @ points
        done = (moved - median).norm() < tolerance
        median = moved
        if done:
            break
    return median
