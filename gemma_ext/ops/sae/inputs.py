"""Checks of what an encoder takes; autocast."""

from __future__ import annotations

from numbers import Integral, Real

import torch
from torch import Tensor

STORAGE = (torch.float32, torch.bfloat16, torch.float16)
_NUMBERS = (Real, torch.SymInt, torch.SymFloat)


def check_encoder(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, *, reference: bool
) -> None:
    """Raise unless x [..., D], weight [F, D], bias and scale [F] fit."""
    for name, value in (("x", x), ("weight", weight)):
        if not isinstance(value, Tensor):
            raise TypeError(f"expected {name} to be a Tensor, got {type(value).__name__}")
        if value.dtype not in STORAGE and not (reference and value.dtype == torch.float64):
            raise TypeError(
                f"expected {name} to be float32, bfloat16 or float16 "
                f"(float64 with impl='reference'), got {value.dtype}"
            )
    if weight.device != x.device:
        raise ValueError(f"expected weight on {x.device} like x, got it on {weight.device}")
    if weight.dtype != x.dtype and not autocasts(x.device):
        raise TypeError(f"expected weight to be {x.dtype} like x, got {weight.dtype}")
    if x.dim() < 1:
        raise ValueError("expected x to be [..., D], got a 0-d tensor")
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"expected weight to be [F, {x.shape[-1]}], got {list(weight.shape)}")
    if not 1 <= weight.shape[0] < 2**31:
        raise ValueError(f"expected weight to have 1 to 2^31 - 1 rows, got {weight.shape[0]}")
    check_vector("bias", bias, weight)
    check_vector("scale", scale, weight)


def check_vector(name: str, value: Tensor | None, weight: Tensor) -> None:
    """Raise unless `value` is None or floating [F], where `weight` lies."""
    if value is None:
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"expected {name} to be a Tensor, got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"expected {name} to be floating, got {value.dtype}")
    if value.device != weight.device:
        raise ValueError(f"expected {name} on {weight.device} like x, got it on {value.device}")
    if tuple(value.shape) != (weight.shape[0],):
        raise ValueError(f"expected {name} to be [{weight.shape[0]}], got {list(value.shape)}")


def check_aux(aux: tuple[Tensor, int] | None, weight: Tensor) -> tuple[Tensor | None, int]:
    """The mask and the length of a second list, or (None, 0)."""
    if aux is None:
        return None, 0
    mask, k = aux
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"expected the mask of aux to be a bool Tensor, got {got}")
    if tuple(mask.shape) != (weight.shape[0],) or mask.device != weight.device:
        raise ValueError(
            f"expected the mask of aux to be [{weight.shape[0]}] on {weight.device}, "
            f"got {list(mask.shape)} on {mask.device}"
        )
    check_count("the length of aux", k, weight.shape[0])
    return mask, k


def check_count(name: str, value: int, most: int, *, least: int = 1) -> None:
    """Raise unless `value` is an int in [least, most]."""
    if isinstance(value, bool) or not isinstance(value, (Integral, torch.SymInt)):
        raise TypeError(f"expected {name} to be an int, got {type(value).__name__}")
    if not least <= value <= most:
        raise ValueError(f"expected {name} in [{least}, {most}], got {value}")


def per_feature(name: str, value: float | Tensor, weight: Tensor) -> Tensor:
    """float32 [F] of a number or [F], at least; not differentiable."""
    if isinstance(value, Tensor) and value.dim():
        check_vector(name, value, weight)
        return value.detach().to(torch.promote_types(value.dtype, torch.float32))
    if isinstance(value, bool) or not isinstance(value, (*_NUMBERS, Tensor)):
        raise TypeError(f"expected {name} to be a number or a Tensor, got {type(value).__name__}")
    if not isinstance(value, Tensor) and value != value:
        raise ValueError(f"expected {name} to be a number, got nan")
    wide = torch.promote_types(weight.dtype, torch.float32)
    if isinstance(value, Tensor):
        return value.detach().to(weight.device, wide).expand(weight.shape[0])
    return torch.full((weight.shape[0],), value, dtype=wide, device=weight.device)


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on; torch knows none on meta and raises when asked."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def to_autocast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    """x and weight in the autocast dtype where autocast is on, as `F.linear` takes them."""
    if not autocasts(x.device):
        return x, weight, bias
    dtype = torch.get_autocast_dtype(x.device.type)
    return x.to(dtype), weight.to(dtype), bias
