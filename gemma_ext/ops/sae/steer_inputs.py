"""Checks of what steering takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from gemma_ext.ops.sae.steer_requests import Requests

STORAGE = (torch.float32, torch.bfloat16, torch.float16)
WIDE = (*STORAGE, torch.float64)


def table(name: str, x: Tensor, like: Tensor) -> None:
    """Rows of directions: [S, D] as the decoder."""
    if not isinstance(x, Tensor) or x.dtype not in WIDE:
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"expected {name} to be float32, bfloat16 or float16, got {got}")
    if x.dim() != 2 or x.shape != like.shape:
        expected = "[S, D]" if x is like else str(list(like.shape))
        raise ValueError(f"expected {name} to be {expected}, got {list(x.shape)}")
    if x.dtype != like.dtype or x.device != like.device:
        raise ValueError(
            f"expected {name} in {like.dtype} on {like.device} like decoder, "
            f"got it in {x.dtype} on {x.device}"
        )


def numbers(name: str, value: Tensor | float, decoder: Tensor, *, batched: bool = False) -> Tensor:
    """One number or [S], as [S]; if `batched` also [B, S], as [B or 1, S]."""
    count = decoder.shape[0]
    wide = torch.promote_types(decoder.dtype, torch.float32)
    x = torch.as_tensor(value, device=decoder.device).to(wide)
    if x.dim() > 1 + batched or (x.dim() and x.shape[-1] != count):
        shapes = f"[{count}] or [B, {count}]" if batched else f"[{count}]"
        raise ValueError(f"expected {name} to be one number or {shapes}, got {list(x.shape)}")
    if not batched:
        return x.expand(count)
    return x.reshape(-1, x.shape[-1] if x.dim() else 1).expand(-1, count)


def check_x(x: Tensor, requests: Requests) -> tuple[int, int]:
    """(B, T) of x [B, T, D] or [T, D]."""
    width = requests.decoder.shape[1]
    if x.dim() not in (2, 3) or x.shape[-1] != width:
        raise ValueError(f"expected x to be [B, T, {width}] or [T, {width}], got {list(x.shape)}")
    if x.device != requests.decoder.device:
        raise ValueError(
            f"expected x on {requests.decoder.device} like the steering, got it on {x.device}"
        )
    batch = 1 if x.dim() == 2 else x.shape[0]
    if not requests.shared and requests.count != batch:
        raise ValueError(f"expected {batch} requests like x has, got {requests.count}")
    return batch, x.shape[-2]


def check_dtypes(x: Tensor, requests: Requests, *, reference: bool) -> None:
    for name, dtype in (("x", x.dtype), ("decoder", requests.decoder.dtype)):
        if dtype not in (WIDE if reference else STORAGE):
            raise TypeError(f"expected {name} to be float32, bfloat16 or float16, got {dtype}")


def check_state(state: Tensor | None, batch: int, x: Tensor) -> None:
    if state is None:
        return
    if state.dtype != torch.int32 or tuple(state.shape) != (batch,) or state.device != x.device:
        raise ValueError(
            f"expected state to be int32 [{batch}] on {x.device}, "
            f"got {state.dtype} {list(state.shape)} on {state.device}"
        )


def check_mask(name: str, mask: Tensor | None, batch: int, tokens: int, x: Tensor) -> Tensor | None:
    """bool [B, T] or None."""
    if mask is None:
        return None
    if mask.dtype != torch.bool or mask.numel() != batch * tokens or mask.device != x.device:
        raise ValueError(
            f"expected {name} to be bool [{batch}, {tokens}] on {x.device}, "
            f"got {mask.dtype} {list(mask.shape)} on {mask.device}"
        )
    return mask.reshape(batch, tokens)
