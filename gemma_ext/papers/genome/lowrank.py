"""Crossover of LoRA experts in the space of what they do, dW = B A, and not of their factors.

sum_i w_i B_i A_i = [w_1 B_1 .. w_M B_M] [A_1; ..; A_M] has rank at most M r. With Q_B R_B and
Q_A R_A of the two stacks its singular values are those of the small core R_B R_A^T; the r largest
give the nearest dW of rank r.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def product_mean(
    a: Sequence[Tensor], b: Sequence[Tensor], weights: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Factors (A [r, d_in], B [d_out, r]) of the rank-r matrix nearest to sum_i w_i B_i A_i.

    Both get the square root of the singular values. O((d_in + d_out) (M r)^2), in float64.

    Args:
        a: M tensors [r, d_in]; b: M tensors [d_out, r]; weights: M numbers.
    """
    rank = a[0].shape[0]
    left = torch.cat([w * x.double() for x, w in zip(b, weights, strict=True)], 1)
    right = torch.cat([x.double() for x in a], 0)
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    u, s, vh = torch.linalg.svd(r_left @ r_right.T)
    kept = min(rank, len(s))
    root = s[:kept].sqrt()
    new_a, new_b = torch.zeros_like(a[0]), torch.zeros_like(b[0])
    new_a[:kept] = (root.unsqueeze(1) * (vh[:kept] @ q_right.T)).to(new_a.dtype)
    new_b[:, :kept] = (q_left @ u[:, :kept] * root).to(new_b.dtype)
    return new_a, new_b
