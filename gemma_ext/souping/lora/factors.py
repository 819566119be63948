"""Several low-rank updates of one weight as one: delta_k = s_k B_k A_k, w_k their weights.

| combination             | result                                                       | rank  |
|-------------------------|--------------------------------------------------------------|-------|
| exact                   | sum_k w_k delta_k                                            | sum r |
| cat                     | the same: [B_1 .. B_K] [w_1 s_1 A_1; .. ; w_K s_K A_K]       | sum r |
| svd                     | the nearest to it of the given rank                          | max r |
| linear                  | (sum_k |g_k| B_k) (sum_k g_k A_k), |g_k| = sqrt |w_k s_k|,   | r     |
|                         | the sign of g_k that of w_k s_k                              |       |
| ties, dare_linear,      | the same with a merge of the B_k and one of the A_k in       | r     |
| dare_ties,              | place of the sums                                            |       |
| magnitude_prune         |                                                              |       |
| those with _svd         | of the merge of dense delta_k, the nearest of the given rank | max r |

All but `exact` have the names and meanings of peft's `add_weighted_adapter`. What merges A and B
apart is no merge of the updates: it has the cross terms B_j A_k in it. `exact` and `svd` never hold
a dense delta: with QR of [B_1 .. B_K] and of [A_1; ..; A_K]^T the singular values of the sum are
those of a core of sum r rows and columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gemma_ext.ops.souping import Magnitudes, Mask, Part, Rule, merge_

_ELEMENTWISE = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
COMBINATIONS = (
    "exact",
    "cat",
    "svd",
    "linear",
    *_ELEMENTWISE,
    *(f"{name}_svd" for name in _ELEMENTWISE),
)
SIGNS = {"total": "sum", "frequency": "count"}


@dataclass(frozen=True)
class Factors:
    """One update of one weight, scaling * b @ a.

    Attributes:
        a: [r, in].
        b: [out, r].
        scaling: lora_alpha / r of the adapter.
    """

    a: Tensor
    b: Tensor
    scaling: float = 1.0

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[out, in]."""
        return self.scaling * (self.b.to(dtype) @ self.a.to(dtype))


def merge_factors(
    factors: Sequence[Factors],
    weights: Sequence[float],
    combination_type: str = "svd",
    *,
    rank: int | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
    clamp: float | None = None,
    seed: int = 0,
    name: str = "",
) -> Factors:
    """One update out of K.

    Args:
        factors: K updates of one weight.
        weights: K numbers of any sign.
        combination_type: see the table of this module.
        rank: of what has a free rank (`exact`, `svd` and everything with `_svd`).
        density: share of elements that is kept, in [0, 1]; ties, dare and magnitude_prune need it.
        majority_sign_method: "total" or "frequency", of ties.
        clamp: quantile in [0.5, 1] of the elements of A, B, -A and -B beyond which they are cut
            off, of `svd` and everything with `_svd`. peft takes that of A and B, which depends on
            the signs that an SVD happens to return.
        seed: of dare's draws, which depend on it, on `name` and on positions alone.
        name: of the weight.

    Returns:
        Factors of scaling 1 in the dtype of the first a.

    Raises:
        ValueError: an argument that does not fit, named with what was expected.
    """
    _check(factors, weights, combination_type, density, majority_sign_method)
    dtype = factors[0].a.dtype
    if combination_type == "cat":
        scaled = zip(factors, weights, strict=True)
        a = torch.cat([f.a.float() * (w * f.scaling) for f, w in scaled])
        return Factors(a.to(dtype), torch.cat([f.b for f in factors], dim=1))
    if combination_type in ("exact", "svd"):
        full = sum(f.rank for f in factors)
        kept = rank or (full if combination_type == "exact" else max(f.rank for f in factors))
        b, a = _truncate(*_singular_of_sum(factors, weights), kept)
    elif combination_type.endswith("_svd"):
        dense = [f.dense() for f in factors]
        rule = combination_type.removesuffix("_svd")
        merged = _elementwise(dense, weights, rule, density, majority_sign_method, seed, name)
        kept = rank or max(f.rank for f in factors)
        b, a = _truncate(*torch.linalg.svd(merged, full_matrices=False), kept)
    else:
        roots = [math.sqrt(abs(w * f.scaling)) for f, w in zip(factors, weights, strict=True)]
        signed = [
            math.copysign(root, w * f.scaling)
            for root, f, w in zip(roots, factors, weights, strict=True)
        ]
        options = (combination_type, density, majority_sign_method, seed)
        a = _elementwise([f.a for f in factors], signed, *options, f"{name}.lora_A")
        b = _elementwise([f.b for f in factors], roots, *options, f"{name}.lora_B")
    if clamp is not None and combination_type.endswith("svd"):
        # of both signs of every element: which sign a singular vector has is nobody's choice
        values = torch.cat([b.flatten(), a.flatten()]).double()
        bound = float(torch.cat([values, -values]).quantile(clamp))
        b, a = b.clamp(-bound, bound), a.clamp(-bound, bound)
    return Factors(a.to(dtype), b.to(dtype))


def _singular_of_sum(
    factors: Sequence[Factors], weights: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor]:
    """Singular triplets of sum_k w_k s_k B_k A_k in float64, sum r of them at most."""
    scaled = zip(factors, weights, strict=True)
    left = torch.cat([f.b.double() * (w * f.scaling) for f, w in scaled], dim=1)
    right = torch.cat([f.a.double() for f in factors])
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    u, s, vh = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    return q_left @ u, s, vh @ q_right.T


def _truncate(u: Tensor, s: Tensor, vh: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(b, a) of the first `rank` triplets, zeros where there are fewer."""
    b, a = u[:, :rank] * s[:rank], vh[:rank]
    missing = rank - len(a)
    return torch.nn.functional.pad(b, (0, missing)), torch.nn.functional.pad(a, (0, 0, 0, missing))


def _elementwise(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    rule: str,
    density: float | None,
    signs: str,
    seed: int,
    name: str,
) -> Tensor:
    """float32 merge of tensors of one shape."""
    out = torch.empty_like(tensors[0], dtype=torch.float32)
    part = Part([t.contiguous() for t in tensors], out=out, name=name)
    mask, divide = Mask(), 1.0
    if rule in ("ties", "magnitude_prune"):
        kept = Magnitudes(len(part.sources)).find([part], int(density * out.numel()))
        mask = Mask(keep=kept.cut())
    elif rule.startswith("dare"):
        mask = Mask(density=density)
        divide = density or 1.0
    combine = Rule()
    if rule.endswith("ties"):
        combine = Rule(election=SIGNS[signs], weighted=False, combine="mean")
    merge_([part], combine, weights, mask=mask, divide=divide, seed=seed)
    return out


def _check(
    factors: Sequence[Factors],
    weights: Sequence[float],
    combination_type: str,
    density: float | None,
    signs: str,
) -> None:
    if combination_type not in COMBINATIONS:
        raise ValueError(
            f"expected combination_type to be one of {', '.join(COMBINATIONS)}, "
            f"got {combination_type!r}"
        )
    if not factors:
        raise ValueError("expected at least one update to merge, got none")
    if len(weights) != len(factors):
        raise ValueError(f"expected {len(factors)} weights, got {len(weights)}")
    shapes = {(len(f.b), f.a.shape[1]) for f in factors}
    if len(shapes) > 1:
        raise ValueError(f"expected updates of one weight, got shapes {sorted(shapes)}")
    rule = combination_type.removesuffix("_svd")
    if rule in _ELEMENTWISE and not (density is not None and 0 <= density <= 1):
        raise ValueError(f"expected density in [0, 1] with {combination_type}, got {density}")
    ranks = {f.rank for f in factors}
    if combination_type in ("linear", *_ELEMENTWISE) and len(ranks) > 1:
        raise ValueError(f"expected equal ranks with {combination_type}, got {sorted(ranks)}")
    if signs not in SIGNS:
        raise ValueError(f"expected majority_sign_method to be total or frequency, got {signs!r}")
