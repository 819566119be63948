"""Sparse codes: which features are active in each token, and how much."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Codes:
    """The entries of a sparse [N, F] matrix, token by token; N tokens, F features.

    Attributes:
        values: float32, [N, K] or [nnz]; the differentiable part.
        indices: int32 in [0, F), same shape. Where one is repeated in a token, its values add.
        offsets: int64 [N + 1], entries offsets[n] to offsets[n + 1] are those of token n and what
            lies behind offsets[N] counts for nothing; None for K entries a token.
        shape: leading shape of the tokens; N is its product.
        features: F.
        counts: int64 [N], entries of a token that count, where they are not K; None with offsets.

    Raises:
        ValueError, TypeError: parts that do not fit together.
    """

    values: Tensor
    indices: Tensor
    offsets: Tensor | None
    shape: torch.Size
    features: int
    counts: Tensor | None = None

    def __post_init__(self) -> None:
        if self.indices.dtype != torch.int32:
            raise TypeError(f"expected indices to be int32, got {self.indices.dtype}")
        if self.values.shape != self.indices.shape:
            raise ValueError(
                f"expected values to be {list(self.indices.shape)} like indices, "
                f"got {list(self.values.shape)}"
            )
        n = self.tokens
        if self.offsets is None:
            if self.values.dim() != 2 or self.values.shape[0] != n:
                raise ValueError(
                    f"expected values to be [{n}, K] without offsets, got {list(self.values.shape)}"
                )
            return
        if self.values.dim() != 1:
            raise ValueError(
                f"expected values to be [nnz] with offsets, got {list(self.values.shape)}"
            )
        if self.offsets.dtype != torch.int64 or tuple(self.offsets.shape) != (n + 1,):
            raise ValueError(
                f"expected offsets to be int64 [{n + 1}], "
                f"got {self.offsets.dtype} {list(self.offsets.shape)}"
            )

    @property
    def tokens(self) -> int:
        """N."""
        n = 1
        for size in self.shape:
            n *= size
        return n

    def with_values(self, values: Tensor) -> Codes:
        """The same entries with other values."""
        return replace(self, values=values)

    def rows(self) -> Tensor:
        """int64, shape of values: the token of each entry; N - 1 behind the last."""
        device = self.values.device
        if self.offsets is None:
            return torch.arange(self.tokens, device=device).unsqueeze(-1).expand(self.values.shape)
        place = torch.arange(self.values.shape[0], device=device)
        at = torch.searchsorted(self.offsets[1:], place, right=True)
        return at.clamp(max=max(self.tokens - 1, 0))

    @property
    def mask(self) -> Tensor:
        """bool, shape of values: which entries count."""
        size = self.values.shape[-1]
        place = torch.arange(size, device=self.values.device)
        if self.offsets is not None:
            return place < self.offsets[-1]
        if self.counts is not None:
            return place < self.counts.unsqueeze(-1)
        return torch.ones_like(self.indices, dtype=torch.bool)

    @property
    def count(self) -> Tensor:
        """int64 [N], entries that count in each token."""
        if self.offsets is not None:
            return self.offsets.diff()
        if self.counts is not None:
            return self.counts
        return self.indices.new_full((self.tokens,), self.values.shape[-1], dtype=torch.int64)

    def dense(self) -> Tensor:
        """[*shape, F], differentiable; for tests and small dictionaries."""
        out = self.values.new_zeros(self.tokens * self.features)
        at = self.rows() * self.features + self.indices
        values = torch.where(self.mask, self.values, 0.0)
        if self.tokens:
            out = out.index_add(0, at.flatten(), values.flatten())
        return out.view(*self.shape, self.features)


@dataclass(frozen=True)
class Encoding:
    """What one pass over a dictionary finds.

    Attributes:
        codes: the entries chosen.
        aux: the second list, of latents that `aux` allows.
        min_positive: float32 [], the smallest chosen score of `encode_batch_topk`; inf without any.
    """

    codes: Codes
    aux: Codes | None = None
    min_positive: Tensor | None = None
