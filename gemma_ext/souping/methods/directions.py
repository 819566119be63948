"""Means on the sphere, from the Gram matrix of the models alone.

x_k one tensor of M models, flattened, G_ij = <x_i, x_j> in float64, u_k = x_k / |x_k|. Every such
mean is a combination sum_k c_k x_k, and every inner product that its iteration needs is one of G:
one pass over the weights for G, M numbers to iterate on, one pass for the combination.

slerp          om = acos <u_0, u_1>: c = (sin((1-t) om), sin(t om)) / sin om, of the vectors as they
               are; (1-t, t) where |<u_0, u_1>| > 0.9995
nuslerp        the same, straight only where it has to be
multislerp     m = sum w_k u_k / |.|, v = sum w_k (u_k - <u_k, m> m), u = cos|v| m + sin|v| v / |v|;
               times sum w_k |x_k|
karcher        u <- exp_u(sum a_k log_u(u_k)) from sum a_k u_k / |.|, a_k = 1 / M; times
               sum a_k |x_k|; a zero x_k has no direction and only shortens
model stock    (arXiv 2403.19522) of deltas, c the mean cosine of pairs:
               t = M c / (1 + (M-1) c), out = t mean_k theta_k + (1-t) theta_0
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

STRAIGHT_ABOVE = 0.9995  # |cosine|; mergekit's bound for slerp, from its first version on
_SMALL = 1e-8


def norms(gram: Tensor) -> Tensor:
    """[..., M] lengths of the M vectors."""
    return gram.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()


def unit_gram(gram: Tensor) -> tuple[Tensor, Tensor]:
    """(Gram of the directions [..., M, M], 1 / lengths [..., M]); a zero vector stays zero."""
    lengths = norms(gram)
    inverse = torch.where(lengths > 0, 1 / lengths, 0.0)
    cosines = gram * inverse.unsqueeze(-1) * inverse.unsqueeze(-2)
    return cosines.clamp(-1, 1), inverse


def cosine(gram: Tensor) -> Tensor:
    """[...] of the two vectors of gram [..., 2, 2]; 0 where one of them is zero."""
    return unit_gram(gram)[0][..., 0, 1]


def slerp(gram: Tensor, t: float, *, straight_above: float | None = None) -> Tensor:
    """Coefficients [..., 2] of x_0 and x_1 for gram [..., 2, 2].

    Args:
        t: share of x_1.
        straight_above: |cosine| from which the way is a straight line; None for only where it has
            to be, at a sine of 1e-8.
    """
    c = cosine(gram)
    angle = c.acos()
    sine = angle.sin()  # of the angle, not of c: the rounding of c then cancels from the ratio
    straight = sine <= _SMALL if straight_above is None else c.abs() > straight_above
    arc = torch.stack([((1 - t) * angle).sin(), (t * angle).sin()], -1)
    arc = arc / torch.where(straight, 1.0, sine).unsqueeze(-1)
    return torch.where(straight.unsqueeze(-1), arc.new_tensor([1 - t, t]), arc)


def multislerp(gram: Tensor, weights: Tensor, eps: float = 1e-8) -> Tensor:
    """Coefficients [M]; weights [M] float64.

    Raises:
        ValueError: more than two directions whose weighted mean vanishes have no middle.
    """
    cosines, inverse = unit_gram(gram)
    lengths = norms(gram)
    if len(lengths) == 1:
        return torch.ones_like(lengths)
    mean_length = _length(weights, cosines)
    if mean_length < eps:
        if len(lengths) == 2:
            return weights / weights.sum()
        raise ValueError(
            "expected directions whose weighted mean is not zero, got ones that cancel; "
            "change the weights"
        )
    middle = weights / mean_length
    lean = cosines @ middle
    tangent = weights - (weights @ lean) * middle
    angle = _length(tangent, cosines)
    direction = math.cos(angle) * middle + _sinc(angle) * tangent
    return direction * inverse * (weights @ lengths)


def karcher(gram: Tensor, *, max_iter: int = 10, tol: float = 1e-5) -> Tensor:
    """Coefficients [M] of the mean of M directions that all weigh the same.

    Args:
        max_iter: most steps.
        tol: a step shorter than this, in radians, is the last.
    """
    lengths = norms(gram)
    held = lengths > 0
    if not held.any():
        return torch.zeros_like(lengths)
    cosines, inverse = unit_gram(gram)
    share = held.double() / held.sum()
    start = _length(share, cosines)
    u = share / start if start > _SMALL else _first(held)
    for _ in range(max_iter):
        c = (cosines @ u).clamp(-1, 1)
        angle = c.acos()
        # an antipode pulls in every direction alike, and so in none
        pull = share / torch.where(c > -1 + _SMALL, torch.sinc(angle / math.pi), 1.0)
        tangent = pull - (pull @ c) * u
        step = _length(tangent, cosines)
        if step < tol:
            break
        u = math.cos(step) * u + _sinc(step) * tangent
        u = u / _length(u, cosines)
    return u * inverse * lengths.mean()


def model_stock(gram: Tensor) -> Tensor:
    """t [...] of gram [..., M, M] of deltas: 0 at orthogonal ones, 1 at equal ones."""
    count = gram.shape[-1]
    lengths = norms(gram)
    products = lengths.unsqueeze(-1) * lengths.unsqueeze(-2)
    cosines = (gram / products.clamp(min=1e-6)).clamp(-1, 1)
    pairs = cosines.sum((-2, -1)) - cosines.diagonal(dim1=-2, dim2=-1).sum(-1)
    mean = pairs / (count * (count - 1))
    divisor = 1 + (count - 1) * mean
    flat = divisor.abs() < 1e-6  # deltas that cancel have no estimate: the base stays
    return torch.where(flat, 0.0, count * mean / torch.where(flat, 1.0, divisor))


def _length(coefficients: Tensor, cosines: Tensor) -> float:
    return math.sqrt(max(0.0, float(coefficients @ cosines @ coefficients)))


def _sinc(angle: float) -> float:
    return math.sin(angle) / angle if angle > 0 else 1.0


def _first(held: Tensor) -> Tensor:
    first = torch.zeros(len(held), dtype=torch.float64)
    first[int(held.int().argmax())] = 1.0
    return first
