"""Rows at different loops, layers and heads for tests of depth batching."""

from __future__ import annotations

import os
from itertools import accumulate

import torch
from torch import Tensor

from gemma_ext.ops.depth_batching.linear import Projection

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
IMPLS = ("auto", "reference")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IDS = ("fp32", "bf16", "fp16")
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def is_split(x: Tensor) -> bool:
    """Whether products of float32 are split: on a card, and in the device code on the host."""
    on_card = x.is_cuda or "GEMMA_EXT_TEST_OPS" in os.environ
    return on_card and x.dtype == torch.float32


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def offsets(*sizes: int) -> Tensor:
    """int32 seg_offsets of segments of these sizes."""
    return torch.tensor([0, *accumulate(sizes)], dtype=torch.int32)


def projection(
    features: int,
    width: int,
    loops: int = 2,
    rank: int = 0,
    *,
    bias: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Projection:
    scale = max(width, 1) ** -0.5
    made = [
        randn(features, width, seed=seed) * scale,
        randn(features, seed=seed + 1) if bias else None,
        randn(loops, rank, width, seed=seed + 2) * scale if rank else None,
        randn(loops, features, rank, seed=seed + 3) * max(rank, 1) ** -0.5 if rank else None,
    ]
    return Projection(*(x if x is None else x.to(device, dtype) for x in made))


def moved(p: Projection, dtype: torch.dtype | None = None, device: str = "cpu") -> Projection:
    given = (p.weight, p.bias, p.lora_a, p.lora_b)
    return Projection(*(x if x is None else x.to(device, dtype) for x in given))


def by_hand(x: Tensor, p: Projection, sizes: tuple[int, ...], scale: float = 1.0) -> Tensor:
    """float64 y, row by row; what comes between A and B is rounded as the ops say."""
    loops = [j for j, size in enumerate(sizes) for _ in range(size)]
    rows = []
    for i, row in enumerate(x.double()):
        y = p.weight.double() @ row
        if p.bias is not None:
            y = y + p.bias.double()
        if p.lora_a is not None and p.lora_a.shape[1] and i < len(loops):
            low = (scale * (p.lora_a[loops[i]].double() @ row)).to(x.dtype).double()
            y = y + p.lora_b[loops[i]].double() @ low
        rows.append(y)
    return torch.stack(rows) if rows else x.new_empty(0, p.weight.shape[0], dtype=torch.float64)


def close(got: Tensor, want: Tensor, size: Tensor | float, what: str = "") -> None:
    """Within float32 sums of terms of `size`, and one rounding to the dtype of `got`."""
    sums = 2.0**-15 if is_split(got) else 2.0**-20
    bound = UNIT[got.dtype] * want.abs() * 1.01 + size * sums
    off = (got.cpu().double() - want).abs()
    assert bool((off <= bound).all()), f"{what} off by {(off / bound).max():.3g} of what it may"
