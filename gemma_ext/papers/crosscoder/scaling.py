"""Latent Scaling: how much of a chat latent the base model has after all, for all latents at once.

For latent j with chat direction v = d_j^chat and code f_nj, and a target Y [N, D],

    beta_j(Y) = argmin_beta sum_n ||beta f_nj v - Y_n||^2
              = sum_n f_nj <v, Y_n> / (||v||^2 C_j),     C_j = sum_n f_nj^2.

| target         | Y^m                    | ratio beta^base / beta^chat                     |
|----------------|------------------------|-------------------------------------------------|
| error          | x^m - x^^m + f_j d_j^m | nu_error; high: a penalty shrank d_j^base       |
| reconstruction | x^^m                   | nu_reconstruction; high: others write it too    |
| activation     | x^m                    |                                                 |

The released code builds Y for each latent, [J, N, D]. With eps = x - x^ the error's regression is

    beta_j^m = sum_n f_nj <v, eps_n^m> / (||v||^2 C_j) + <v, d_j^m> / ||v||^2,

so that all latents together take <v_j, rows_n> of the active entries (`ops.sae.dots`): one pass,
O(N L0 D).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gemma_ext.ops import sae
from gemma_ext.papers.crosscoder.norms import BASE, CHAT

PLAUSIBLE = (-0.1, 2.0)  # ratios outside are left out of rankings, as in the release


@dataclass(frozen=True)
class Betas:
    """Regressions of all latents, [F, M] float64; nan where a latent was never active.

    Attributes:
        error, reconstruction, activation: by target.
        energy: [F] sum of f^2.
        fired: [F] int64, tokens that a latent was active in.
    """

    error: Tensor
    reconstruction: Tensor
    activation: Tensor
    energy: Tensor
    fired: Tensor

    @property
    def nu_error(self) -> Tensor:
        """[F]; high where shrinkage hid the latent from the base model."""
        return self.error[:, BASE] / self.error[:, CHAT]

    @property
    def nu_reconstruction(self) -> Tensor:
        """[F]; high where other latents write the direction in the base model."""
        return self.reconstruction[:, BASE] / self.reconstruction[:, CHAT]

    def specific(self, error: float = 0.2, reconstruction: float = 0.5) -> Tensor:
        """[F] bool: chat only by the criterion of the paper's plots."""
        return (self.nu_error < error) & (self.nu_reconstruction < reconstruction)

    def plausible(self) -> Tensor:
        """[F] bool: both ratios within `PLAUSIBLE`."""
        low, high = PLAUSIBLE
        inside = [(nu >= low) & (nu <= high) for nu in (self.nu_error, self.nu_reconstruction)]
        return inside[0] & inside[1]

    def rank_sum(self, among: Tensor) -> Tensor:
        """Combined rank of the latents `among` [J], small for chat specific ones.

        Returns:
            [J] rank(nu_error) + rank(nu_reconstruction), each from 0.
        """
        ranks = [nu[among].argsort().argsort() for nu in (self.nu_error, self.nu_reconstruction)]
        return ranks[0] + ranks[1]


class LatentScaling:
    """Sums of one pass over activations.

    Args:
        decoder: [F, M, D] decoders d_j^m.
        directions: [F, D] v_j; the chat decoders where None. Random ones are the paper's control.
        impl: of the ops; "reference" takes float64.

    Raises:
        ValueError: shapes that do not fit.

    Example:
        >>> scaling = LatentScaling(decoder)
        >>> for x in batches:                       # [N, M, D]
        ...     codes = crosscoder.encode(x)
        ...     scaling.add(codes, x, crosscoder(x))
        >>> nu = scaling.betas().nu_error
    """

    def __init__(
        self, decoder: Tensor, directions: Tensor | None = None, impl: str = "auto"
    ) -> None:
        if decoder.dim() != 3:
            raise ValueError(f"decoder: expected [F, M, D], got {list(decoder.shape)}")
        features, sources, width = decoder.shape
        self.decoder = decoder.detach()
        self.directions = self.decoder[:, CHAT] if directions is None else directions.detach()
        if self.directions.shape != (features, width):
            raise ValueError(
                f"directions: expected [{features}, {width}], got {list(self.directions.shape)}"
            )
        self.directions = self.directions.contiguous()
        self.impl = impl
        zeros = {"dtype": torch.float64, "device": decoder.device}
        self.energy = torch.zeros(features, **zeros)
        self.error = torch.zeros(features, sources, **zeros)
        self.reconstruction = torch.zeros(features, sources, **zeros)
        self.fired = torch.zeros(features, dtype=torch.int64, device=decoder.device)

    @torch.no_grad()
    def add(self, codes: sae.Codes, x: Tensor, reconstruction: Tensor) -> None:
        """Takes a batch in.

        Args:
            codes: of N tokens, values f.
            x, reconstruction: [N, M, D] activations, and x^ with its bias, in the units of the
                crosscoder.

        Raises:
            ValueError: x is not [N, M, D].
        """
        expected = (codes.tokens, *self.decoder.shape[1:])
        if x.shape != expected or reconstruction.shape != expected:
            raise ValueError(
                f"x: expected x and reconstruction to be {list(expected)}, "
                f"got {list(x.shape)} and {list(reconstruction.shape)}"
            )
        active = codes.indices[codes.mask & (codes.values != 0)].long()
        self.fired += torch.bincount(active, minlength=codes.features)
        self.energy += self._sums(codes, codes.values)
        for m in range(x.shape[1]):
            self.error[:, m] += self._against(codes, x[:, m] - reconstruction[:, m])
            self.reconstruction[:, m] += self._against(codes, reconstruction[:, m])

    def betas(self) -> Betas:
        """The regressions over all batches."""
        v = self.directions.double()
        squared = v.square().sum(-1)
        scale = (squared * self.energy)[:, None]
        own = torch.einsum("fd,fmd->fm", v, self.decoder.double()) / squared[:, None]
        return Betas(
            error=torch.where(scale > 0, self.error / scale + own, torch.nan),
            reconstruction=self.reconstruction / scale,
            activation=(self.error + self.reconstruction) / scale,
            energy=self.energy,
            fired=self.fired,
        )

    def _against(self, codes: sae.Codes, rows: Tensor) -> Tensor:
        """sum_n f_nj <v_j, rows_n> [F]."""
        rows = rows.to(self.directions.dtype)
        along = sae.dots(codes, self.directions, rows, impl=self.impl)
        return self._sums(codes, along.to(codes.values.dtype))

    def _sums(self, codes: sae.Codes, factors: Tensor) -> Tensor:
        """sum_n f_nj factor_nj [F]."""
        weighed = codes.with_values(codes.values * factors)
        nothing = self.directions.new_empty(*codes.shape, 0)
        return sae.scatter(weighed, nothing, impl=self.impl)[1].double()
