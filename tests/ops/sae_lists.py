"""Random codes with all their oddities, and the dense float64 formulas they are compared with."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gemma_ext.ops.sae import Codes

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
FORMS = ("padded", "counts", "csr")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IDS = ("fp32", "bf16", "fp16")
EPS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@dataclass
class Problem:
    """Codes of N tokens, a dictionary, and rows beside them."""

    codes: Codes
    weight: Tensor
    bias: Tensor
    rows: Tensor

    def leaves(self) -> dict[str, Tensor]:
        found = {
            "values": self.codes.values,
            "weight": self.weight,
            "bias": self.bias,
            "rows": self.rows,
        }
        return {name: x.detach().clone().requires_grad_() for name, x in found.items()}

    def wide(self) -> Problem:
        """The same numbers in float64."""
        codes = self.codes.with_values(self.codes.values.double())
        return Problem(codes, self.weight.double(), self.bias.double(), self.rows.double())

    def to(self, device: str) -> Problem:
        c = self.codes
        moved = [None if x is None else x.to(device) for x in (c.offsets, c.counts)]
        codes = Codes(
            c.values.to(device), c.indices.to(device), moved[0], c.shape, c.features, moved[1]
        )
        return Problem(codes, *(x.to(device) for x in (self.weight, self.bias, self.rows)))


def problem(
    n: int | tuple[int, ...],
    k: int,
    features: int,
    width: int,
    *,
    form: str = "padded",
    dtype: torch.dtype = torch.float32,
    hot: int | None = None,
    seed: int = 0,
) -> Problem:
    """Repeated indices, values of 0, tokens without an entry and entries of nobody are all there.

    `hot` is a feature that most tokens have.
    """
    g = torch.Generator().manual_seed(seed + 31 * k + 1009 * features + width)
    shape = torch.Size((n,) if isinstance(n, int) else n)
    tokens = shape.numel()
    indices = torch.randint(0, features, (tokens, k), generator=g, dtype=torch.int32)
    if hot is not None and k:
        indices[torch.rand(tokens, generator=g) < 0.9, 0] = hot
    values = torch.randn(tokens, k, generator=g)
    values[torch.rand(tokens, k, generator=g) < 0.1] = 0
    counts = torch.randint(0, k + 1, (tokens,), generator=g)
    offsets = None
    if form == "csr":
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        inside = torch.arange(k) < counts.unsqueeze(-1)
        behind = 3  # entries of nobody, which must not be looked at
        values = torch.cat([values[inside], torch.full((behind,), torch.nan)])
        indices = torch.cat([indices[inside], torch.full((behind,), -7, dtype=torch.int32)])
    if form == "counts":
        outside = torch.arange(k) >= counts.unsqueeze(-1)
        values[outside] = torch.nan
        indices[outside] = -7
    codes = Codes(values, indices, offsets, shape, features, counts if form == "counts" else None)
    return Problem(
        codes,
        torch.randn(features, width, generator=g).to(dtype),
        torch.randn(width, generator=g),
        torch.randn(*shape, width, generator=g).to(dtype),
    )


def safe(codes: Codes) -> Codes:
    """Entries of nobody made 0 at index 0, as the formulas in plain torch want them."""
    return replace(
        codes,
        values=torch.where(codes.mask, codes.values, 0.0),
        indices=torch.where(codes.mask, codes.indices, 0),
    )


def dense(codes: Codes, values: Tensor) -> Tensor:
    """f [N, F] in float64, one entry after the other."""
    f = torch.zeros(codes.tokens, codes.features, dtype=torch.float64)
    for n, at, feature in listed(codes):
        one = torch.zeros_like(f)
        one[n, feature] = 1
        f = f + one * values.reshape(-1)[at].double()
    return f


def listed(codes: Codes) -> list[tuple[int, int, int]]:
    """(token, flat place, feature) of every entry, in order."""
    found = []
    indices = codes.indices.reshape(-1).tolist()
    for n in range(codes.tokens):
        if codes.offsets is not None:
            places = range(int(codes.offsets[n]), int(codes.offsets[n + 1]))
        else:
            k = codes.values.shape[1]
            used = k if codes.counts is None else int(codes.counts[n])
            places = range(n * k, n * k + used)
        found += [(n, at, indices[at]) for at in places]
    return found


def assert_close(got: Tensor, want: Tensor, terms: int, what: str = "") -> None:
    """Within rounding: of the result in its dtype, and of sums of `terms` float32 products."""
    assert got.shape == want.shape, (what, got.shape, want.shape)
    got, limit = got.detach().cpu(), EPS.get(got.dtype, 2.0**-24)
    size = want.detach().double().abs().max().clamp(min=1e-6) if want.numel() else 0
    # errors of float sums add up like a walk; 8 of their standard deviations
    bound = limit * want.detach().double().abs() * 2 + 8 * 2.0**-24 * max(terms, 1) ** 0.5 * size
    error = (got.double() - want.detach().double()).abs()
    assert bool((error <= bound).all()), (what, float((error / bound).max()))
