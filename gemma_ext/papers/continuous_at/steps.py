"""Steps and balls of projected gradient descent on vectors of tokens [P, D].

    sign    d - a sign(g)                 l2norm  d - a g / |g|
    rms     d - a sqrt(D) g / |g|         adam    d - a m / (sqrt(v) + 1e-8), Adam's means of g, g^2

then d <- d min(1, r / |d|), each token in its own ball. On a locally linear loss the fixed point of
sign is -(r / sqrt(D)) sign(g), which gives about sqrt(2 / pi) = 0.80 of the decrease of l2norm's,
-r g / |g|; rms moves as far as sign in the direction of l2norm.
"""

from __future__ import annotations

import torch
from torch import Tensor

STEPS = ("sign", "l2norm", "adam", "rms")
_BETAS, _EPS = (0.9, 0.999), 1e-8  # Adam's own
_ON_BALL = 1 - 1e-4


class Stepper:
    """Directions to go against, of unit size; remembers what Adam has to.

    Args:
        kind: one of `STEPS`.

    Raises:
        ValueError: an unknown kind.
    """

    def __init__(self, kind: str) -> None:
        if kind not in STEPS:
            raise ValueError(f"step: expected one of {', '.join(STEPS)}, got {kind!r}")
        self.kind, self.count = kind, 0
        self._moments: tuple[Tensor, Tensor] | None = None

    def direction(self, grad: Tensor) -> Tensor:
        """Float32 (float64 of float64) [P, D]; tokens without a gradient do not move."""
        grad = grad if grad.dtype == torch.float64 else grad.float()
        if self.kind == "sign":
            return grad.sign()
        if self.kind == "adam":
            return self._adam(grad)
        norm = grad.norm(dim=-1, keepdim=True)
        unit = torch.where(norm > 0, grad / norm, 0.0)
        return unit * grad.shape[-1] ** 0.5 if self.kind == "rms" else unit

    def keep(self, tokens: Tensor) -> None:
        """Forgets all tokens but those at `tokens` of the last direction."""
        if self._moments is not None:
            self._moments = tuple(x[tokens] for x in self._moments)

    def _adam(self, grad: Tensor) -> Tensor:
        if self._moments is None:
            self._moments = (torch.zeros_like(grad), torch.zeros_like(grad))
        self.count += 1
        (mean, square), (b1, b2) = self._moments, _BETAS
        mean.lerp_(grad, 1 - b1)
        square.lerp_(grad.square(), 1 - b2)
        scale = (square / (1 - b2**self.count)).sqrt() + _EPS
        return mean / (1 - b1**self.count) / scale


def project(delta: Tensor, radius: Tensor | float) -> Tensor:
    """The nearest point of each token's ball.

    Args:
        delta: [P, D].
        radius: of all balls, or [P]; may be infinite.
    """
    norm = delta.norm(dim=-1)
    outside = norm > radius
    factor = torch.where(outside, radius / torch.where(outside, norm, 1.0), 1.0)
    return delta * factor.unsqueeze(-1)


def boundary(delta: Tensor, radius: Tensor | float) -> float:
    """Share of tokens that lie on the surface of their ball, where projection matters."""
    if not delta.shape[0]:
        return 0.0
    return float((delta.norm(dim=-1) >= radius * _ON_BALL).double().mean())
