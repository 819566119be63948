"""Worlds with known atoms: what a method finds can be held against what is there."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class World:
    """States m = D delta with K active atoms each.

    Attributes:
        atoms: [F, D] rows of equal length.
        k: active atoms of a state.
        smallest, largest: codes are uniform between these.
    """

    atoms: Tensor
    k: int
    smallest: float = 0.8
    largest: float = 1.0

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """States [N, D], and codes [N, K] with the atoms [N, K] they belong to."""
        keys = torch.rand(count, self.atoms.shape[0], generator=generator)
        indices = keys.topk(self.k, dim=1).indices
        values = torch.rand(count, self.k, generator=generator, dtype=self.atoms.dtype)
        values = self.smallest + (self.largest - self.smallest) * values
        states = torch.einsum("nk,nkd->nd", values, self.atoms[indices])
        return states, values, indices


def random_world(
    features: int, width: int, k: int, generator: torch.Generator, stretch: float = 1.0
) -> World:
    """Gaussian directions; `stretch` > 1 makes the space anisotropic by up to that factor.

    Under the plain inner product stretched atoms are far from orthogonal; under S they are as
    close to it as before.
    """
    atoms = torch.randn(features, width, generator=generator, dtype=torch.float64)
    atoms = torch.nn.functional.normalize(atoms, dim=1)
    mixing = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q
    scales = torch.logspace(0, math.log10(stretch), width, dtype=torch.float64)
    return World(atoms @ (mixing * scales) @ mixing.T, k)


def spikes_and_waves(width: int, k: int) -> World:
    """The identity beside Hadamard / sqrt(D), width a power of two: mu = 1 / sqrt(D) exactly.

    The atoms are a tight frame, so that the product they define is the plain one.

    Raises:
        ValueError: width is not a power of two.
    """
    if width < 1 or width & (width - 1):
        raise ValueError(f"width: expected a power of two, got {width}")
    h = torch.ones(1, 1, dtype=torch.float64)
    while h.shape[0] < width:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return World(torch.cat([torch.eye(width, dtype=torch.float64), h / math.sqrt(width)]), k)
