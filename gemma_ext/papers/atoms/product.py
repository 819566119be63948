"""The atomic inner product: an ordinary one after whitening.

    <u, v>_S = u' S v,   S = C^-1,   C = L L'        =>   <u, v>_S = (L^-1 u) . (L^-1 v)

No inverse is formed. With atoms as rows d_i, a_i = ||d_i||_S, unit rows w_i = L^-1 d_i / a_i, the
encoder of the threshold-activated SAE is  e_i = S d_i / a_i^2 = L^-T w_i / a_i,  so that
e_i . sum_j c_j d_j = c_i + sum_{j != i} c_j (a_j / a_i) w_i . w_j.
The division by a_i^2 is what the windows of the paper need: without it the gain of an atom is D / F
on average (D' S D is a projector of rank D).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AtomicProduct:
    """An inner product of vectors [D].

    Attributes:
        factor: [D, D] float64, lower triangular L of the moment C = L L'.
        condition: of C.
    """

    factor: Tensor
    condition: float

    def whiten(self, x: Tensor) -> Tensor:
        """L^-1 applied to rows [..., D]; float64."""
        rows = x.double().reshape(-1, x.shape[-1])
        return torch.linalg.solve_triangular(self.factor, rows.T, upper=False).T.reshape(x.shape)

    def colour(self, w: Tensor) -> Tensor:
        """L applied to rows [..., D]: the inverse of `whiten`."""
        return w.double() @ self.factor.T

    def norms(self, atoms: Tensor) -> Tensor:
        """||d_i||_S [F] of rows [F, D]."""
        return self.whiten(atoms).norm(dim=-1)

    def unit(self, atoms: Tensor) -> Tensor:
        """Whitened rows of length one [F, D]: their plain products are cosines under S."""
        return torch.nn.functional.normalize(self.whiten(atoms), dim=-1, eps=0.0)

    def encoder(self, atoms: Tensor) -> Tensor:
        """Rows e_i = S d_i / ||d_i||_S^2 [F, D]."""
        white = self.whiten(atoms)
        white = white / white.square().sum(-1, keepdim=True)
        return torch.linalg.solve_triangular(self.factor.T, white.T, upper=True).T


def atomic_product(moment: Tensor, *, shrinkage: float = 0.0) -> AtomicProduct:
    """The product of a moment C [D, D].

    Args:
        moment: symmetric, positive definite once shrunk.
        shrinkage: adds shrinkage * trace(C) / D to the diagonal. Any value above 0 ends the
            invariance under linear maps of the states; 1e-4 is enough for a residual stream with a
            few huge dimensions.

    Raises:
        ValueError: not square, a negative shrinkage, or not positive definite.
    """
    if moment.dim() != 2 or moment.shape[0] != moment.shape[1]:
        raise ValueError(f"moment: expected a square matrix, got {list(moment.shape)}")
    if shrinkage < 0:
        raise ValueError(f"shrinkage: expected 0 or more, got {shrinkage}")
    c = moment.double().clone()
    c.diagonal().add_(shrinkage * c.diagonal().mean())
    spectrum = torch.linalg.eigvalsh(c)
    factor, failed = torch.linalg.cholesky_ex(c)
    if failed or spectrum[0] <= 0:
        raise ValueError(
            f"moment: expected a positive definite matrix, got a smallest eigenvalue of "
            f"{spectrum[0]:.3g}; raise shrinkage"
        )
    return AtomicProduct(factor, float(spectrum[-1] / spectrum[0]))


def product_of(atoms: Tensor) -> AtomicProduct:
    """The product that atoms [F, D] define themselves, S = (sum_i d_i d_i')^-1.

    Raises:
        ValueError: the atoms do not span the space.
    """
    d = atoms.double()
    return atomic_product(d.T @ d)
