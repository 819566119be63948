"""Checks that the linear layers, norms and exits of a mixed-depth batch share."""

from __future__ import annotations

import torch
from torch import Tensor

from gemma_ext.ops.depth_batching.inputs import STORAGE, check_like, check_shape


def check_storage(name: str, x: Tensor, *, reference: bool) -> None:
    if x.dtype not in STORAGE and not (reference and x.dtype == torch.float64):
        raise TypeError(f"expected {name} to be float32, bfloat16 or float16, got {x.dtype}")


def check_index(name: str, x: Tensor, count: int, like: Tensor, dtype=torch.int32) -> None:
    """[count] integers on the device of `like`."""
    check_shape(name, x, (count,))
    check_like(name, x, like, dtype=False)
    if x.dtype != dtype:
        raise TypeError(f"expected {name} in {dtype}, got it in {x.dtype}")


def per_row(name: str, value: Tensor | float, n: int, like: Tensor) -> Tensor:
    """One number or [n], as [n] on the device of `like`; float32, or float64 beside float64."""
    wide = torch.promote_types(like.dtype, torch.float32)
    if not isinstance(value, Tensor):
        return torch.full((n,), float(value), dtype=wide, device=like.device)
    if value.dim() == 0:
        value = value.expand(n)
    check_shape(name, value, (n,))
    check_like(name, value, like, dtype=False)
    return value.to(wide)
