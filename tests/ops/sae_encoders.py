"""Encoders whose products are exact, so that ties abound, and a plain oracle of selection."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from gemma_ext.ops.sae import Codes

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
IMPLS = ("auto", "reference")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IDS = ("fp32", "bf16", "fp16")


@dataclass
class Problem:
    """x [N, D], weight [F, D], bias and scale [F], mask bool [F]."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    scale: Tensor
    mask: Tensor

    def to(self, device: str) -> Problem:
        return Problem(*(getattr(self, f.name).to(device) for f in fields(self)))

    def wide(self) -> Problem:
        return replace(self, x=self.x.double(), weight=self.weight.double())

    @property
    def p(self) -> Tensor:
        """All pre-activations, float64 [N, F]."""
        return self.x.cpu().double() @ self.weight.cpu().double().T + self.bias.cpu().double()


def problem(
    n: int,
    width: int,
    features: int,
    *,
    dtype: torch.dtype = torch.float32,
    exact: bool = True,
    seed: int = 0,
    device: str = "cpu",
) -> Problem:
    """Small whole numbers, or normal ones unless `exact`; scales are powers of two."""
    g = torch.Generator().manual_seed(seed + 7 * n + 1009 * features + width)
    if exact:
        x = torch.randint(-3, 4, (n, width), generator=g)
        weight = torch.randint(-3, 4, (features, width), generator=g)
        bias = torch.randint(-3, 4, (features,), generator=g).float()
    else:
        x = torch.randn(n, width, generator=g)
        weight = torch.randn(features, width, generator=g) / max(width, 1) ** 0.5
        bias = torch.randn(features, generator=g) / 4
    scale = 2.0 ** torch.randint(-1, 2, (features,), generator=g)
    mask = torch.rand(features, generator=g) < 0.2
    return Problem(x.to(dtype), weight.to(dtype), bias, scale, mask).to(device)


def topk(score: Tensor, k: int, mask: Tensor | None = None) -> list[list[int]]:
    """The features of every row, best first: NaN, then larger scores, then lower features."""
    numbers = score.numpy() + 0.0  # no -0
    nan = np.isnan(numbers)
    left_out = np.zeros_like(nan) if mask is None else ~mask.numpy() & np.ones_like(nan)
    features = np.broadcast_to(np.arange(score.shape[1]), nan.shape)
    order = np.lexsort((features, -np.where(nan, 0, numbers), ~nan, left_out), axis=-1)
    allowed = score.shape[1] if mask is None else int(mask.sum())
    return order[:, : min(k, allowed)].tolist()


def positions(codes: Codes) -> list[list[int]]:
    """The features that count in every row, in the order of the list."""
    counts = codes.count.tolist()
    if codes.offsets is None:
        return [row[:c] for row, c in zip(codes.indices.tolist(), counts, strict=True)]
    ends = codes.offsets.tolist()
    indices = codes.indices.tolist()
    return [indices[a:b] for a, b in itertools.pairwise(ends)]


def check(codes: Codes, p: Tensor, want: list[list[int]]) -> None:
    """`codes` list exactly `want`, with the values of p; what does not count is 0."""
    assert positions(codes) == want
    assert codes.values.dtype == torch.float32
    assert codes.indices.dtype == torch.int32
    values, mask = codes.values.detach().cpu().double(), codes.mask.cpu()
    rows, indices = codes.rows().cpu(), codes.indices.cpu().long()
    assert torch.equal(values[mask], p[rows[mask], indices[mask]])
    assert not values[~mask].any()
    assert not indices[~mask].any()
