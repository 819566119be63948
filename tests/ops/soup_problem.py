"""Models to merge, and what they are compared by."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from gemma_ext.ops.souping import Part

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MANTISSA = {torch.float32: 24, torch.bfloat16: 8, torch.float16: 11}
LOWEST = {torch.float32: -149, torch.bfloat16: -133, torch.float16: -24}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def models(
    shape: Sequence[int],
    count: int,
    *,
    dtype: torch.dtype | Sequence[torch.dtype] = torch.bfloat16,
    spread: float = 4e-4,
    base: bool = True,
    out: torch.dtype | None = None,
    name: str = "layers.0.weight",
    seed: int = 0,
    device: str = "cpu",
) -> Part:
    """`count` fine-tunes of one base, std 0.02, moved by std `spread`; fresh random numbers."""
    g = generator(seed)
    dtypes = [dtype] * (count + 1) if isinstance(dtype, torch.dtype) else list(dtype)
    start = 0.02 * torch.randn(tuple(shape), generator=g, dtype=torch.float64)
    start = start.to(dtypes[count])
    moved = [
        (start.double() + spread * torch.randn(tuple(shape), generator=g, dtype=torch.float64)).to(
            d
        )
        for d in dtypes[:count]
    ]
    return Part(
        [x.to(device) for x in moved],
        start.to(device) if base else None,
        torch.full(tuple(shape), torch.nan, dtype=out or dtypes[count], device=device),
        name,
    )


def lattice(shape: Sequence[int], count: int, *, seed: int = 0, device: str = "cpu") -> Part:
    """Fine-tunes whose deltas are few multiples of 2^-12: sums are exact and ties are many."""
    g = generator(seed)
    start = torch.randint(-64, 65, tuple(shape), generator=g).float() * 2.0**-12
    moved = [
        start + torch.randint(-9, 10, tuple(shape), generator=g).float() * 2.0**-12
        for _ in range(count)
    ]
    return Part(
        [x.to(device) for x in moved],
        start.to(device),
        torch.full(tuple(shape), torch.nan, device=device),
        "lattice",
    )


def pieces(part: Part, cuts: Sequence[int]) -> list[Part]:
    """The part, flattened and cut at these positions."""
    n = part.sources[0].numel() if part.sources else part.base.numel()
    edges = [0, *cuts, n]
    flat = [None if x is None else x.reshape(-1) for x in (*part.sources, part.base)]
    out = None if part.out is None else part.out.view(-1)
    return [
        Part(
            [x[a:b] for x in flat[:-1]],
            None if flat[-1] is None else flat[-1][a:b],
            None if out is None else out[a:b],
            part.name,
            part.offset + a,
            part.models,
        )
        for a, b in itertools.pairwise(edges)
    ]


def ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance of neighbours of `dtype` at float64 x, by its exponent."""
    _, exponent = torch.frexp(x)
    exponent = (exponent - MANTISSA[dtype]).clamp(min=LOWEST[dtype])
    return torch.ldexp(torch.ones_like(x), exponent)


def check_rounded(got: Tensor, want: Tensor, *, share: float = 0.9999, slack: float = 1e-3) -> None:
    """Whether `got` is float64 `want` rounded once: within (0.5 + slack) ulp, nearly everywhere."""
    got, want = got.detach().cpu(), want.detach().cpu().reshape(got.shape)
    rounded = got.double()
    assert torch.equal(rounded.isnan(), want.isnan())
    infinite = rounded.isinf()
    assert (want[infinite].abs() >= torch.finfo(got.dtype).max * (1 - 2.0**-12)).all()
    known = ~want.isnan() & ~infinite
    error = (rounded - want)[known].abs() / ulp(want[known], got.dtype)
    if error.numel():
        right = (error <= 0.5 + slack).double().mean()
        assert right >= share, f"{right:.6f} of the elements within {0.5 + slack} ulp"
        worst = (rounded - want)[known].abs().max() / ulp(want[known].abs().max(), got.dtype)
        assert worst <= 1.0 + slack, f"{worst:.4f} ulp of the largest"


def bits(x: Tensor) -> Tensor:
    """As integers, so that signs of zero and NaN count."""
    x = x.detach().cpu().contiguous()
    return x.view(
        {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    )


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    assert a.dtype == b.dtype
    assert torch.equal(bits(a), bits(b))
