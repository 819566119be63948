"""Low-rank matrices of each depth from the residuals W_l - W' (section 2.4 of the paper)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

OVERSAMPLING, POWER_ITERATIONS = 16, 2  # of the randomised decomposition
EXACT_BELOW = 1024  # smaller side up to which "auto" is exact

Factors = tuple[Tensor, Tensor]
"""A [r, in], B [out, r]."""


def truncated_svd(residual: Tensor, rank: int, method: str = "exact", seed: int = 0) -> Factors:
    """A = V_r^T and B = U_r S_r of the residual [out, in], in its dtype.

    Args:
        residual: float32 or float64.
        rank: r, cut to the smaller side.
        method: "exact", "randomised" (two power iterations, 16 columns more than asked for), or
            "auto".

    Returns:
        A [r, in], B [out, r].
    """
    smaller = min(residual.shape)
    rank = min(rank, smaller)
    if method == "auto":
        method = "exact" if smaller <= EXACT_BELOW else "randomised"
    if method == "randomised" and rank + OVERSAMPLING < smaller:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            u, s, v = torch.svd_lowrank(residual, rank + OVERSAMPLING, niter=POWER_ITERATIONS)
    else:
        u, s, vh = torch.linalg.svd(residual, full_matrices=False)
        v = vh.mT
    return v[:, :rank].mT.contiguous(), (u[:, :rank] * s[:rank]).contiguous()


def gaussian(out: int, in_: int, rank: int, dtype: torch.dtype, seed: int) -> Factors:
    """The usual start of LoRA: A Gaussian of deviation 1 / r, B zero."""
    rank = min(rank, out, in_)
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, in_, generator=generator, dtype=dtype) / rank
    return a, torch.zeros(out, rank, dtype=dtype)


def of_depths(
    weights: Sequence[Tensor],
    stored: Tensor,
    rank: int,
    *,
    method: str = "exact",
    init: str = "svd",
    seed: int = 0,
) -> list[Factors]:
    """The matrices of all depths that share a stored weight.

    A residual that is exactly zero gets the usual start of LoRA, so that it can learn. Two opposite
    residuals, as of two loops averaged, take one decomposition: A_2 = A_1, B_2 = -B_1.

    Args:
        weights: [out, in] of each depth, float32 or float64.
        stored: [out, in], as it will be run.
        rank: r.
        init: "svd" or "zero".
    """
    residuals = [weight - stored for weight in weights]
    found: list[Factors] = []
    for number, residual in enumerate(residuals):
        if init == "zero" or not residual.any():
            found.append(gaussian(*residual.shape, rank, residual.dtype, seed + number))
        elif number == 1 and _opposite(residuals[0], residual, stored):
            found.append((found[0][0], -found[0][1]))
        else:
            found.append(truncated_svd(residual, rank, method, seed + number))
    return found


def refined(
    weights: Sequence[Tensor],
    stored: Tensor,
    factors: Sequence[Factors],
    without: Iterable[Tensor] = (),
) -> Tensor:
    """mean_l (W_l - B_l A_l): the stored weight that fits best with the matrices as they are.

    Args:
        weights, factors: of each depth with matrices.
        stored: [out, in], whose dtype the result has.
        without: weights of depths without matrices.
    """
    rest = [w - b @ a for w, (a, b) in zip(weights, factors, strict=True)]
    return torch.stack([*rest, *without]).mean(0).to(stored.dtype)


def _opposite(one: Tensor, other: Tensor, stored: Tensor) -> bool:
    """Whether two residuals cancel, up to the rounding of their mean."""
    rounding = 4 * torch.finfo(stored.dtype).eps * stored.abs().max()
    return bool((one + other).abs().max() <= rounding) and bool(one.any())
