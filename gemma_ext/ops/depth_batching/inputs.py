"""Checks of what the ops of rows and pages take, and which implementation serves a call."""

from __future__ import annotations

import torch
from torch import Tensor

from gemma_ext import _loader
from gemma_ext.reference.depth_batching import PAGE

STORAGE = (torch.float32, torch.bfloat16, torch.float16)


def is_reference(impl: str, like: Tensor, op: str) -> bool:
    """Whether plain torch serves the call: asked for, or for float64, which has no kernels."""
    if impl not in ("auto", "reference"):
        raise ValueError(f"expected impl to be 'auto' or 'reference', got {impl!r}")
    if impl == "reference" or like.dtype == torch.float64:
        return True
    if like.device.type not in ("cpu", "meta", "cuda"):
        raise ValueError(
            f"expected tensors on cpu, meta or cuda with impl='auto', got {like.device}"
        )
    if like.device.type == "cuda" and (refusal := _loader.cuda_refusal(op)):
        raise NotImplementedError(refusal)
    return False


def check_floats(name: str, x: Tensor) -> None:
    if x.dtype not in (*STORAGE, torch.float64):
        raise TypeError(f"expected {name} to be float32, bfloat16 or float16, got {x.dtype}")


def check_like(name: str, x: Tensor, like: Tensor, *, dtype: bool = True) -> None:
    """On the device of `like`, and in its dtype."""
    if x.device != like.device:
        raise ValueError(f"expected {name} on {like.device}, got it on {x.device}")
    if dtype and x.dtype != like.dtype:
        raise TypeError(f"expected {name} in {like.dtype}, got it in {x.dtype}")


def check_shape(name: str, x: Tensor, shape: tuple[int | str, ...]) -> None:
    """Letters of the shape stand for any size."""
    fits = x.dim() == len(shape) and all(
        isinstance(want, str) or want == got for want, got in zip(shape, x.shape, strict=True)
    )
    if not fits:
        expected = ", ".join(map(str, shape))
        raise ValueError(f"expected {name} to be [{expected}], got {list(x.shape)}")


def check_ints(name: str, x: Tensor, shape: tuple[int | str, ...], like: Tensor) -> None:
    """An int32 tensor of the shape on the device of `like`."""
    if x.dtype != torch.int32:
        raise TypeError(f"expected {name} to be int32, got {x.dtype}")
    check_shape(name, x, shape)
    if x.device != like.device:
        raise ValueError(f"expected {name} on {like.device}, got it on {x.device}")


def check_pool(kv_pool: Tensor) -> None:
    check_floats("kv_pool", kv_pool)
    check_shape("kv_pool", kv_pool, ("L", "pages", 2, "n_kv", PAGE, "hd"))
    if not kv_pool.is_contiguous():
        raise ValueError("expected kv_pool to be contiguous: it is written in place")


def check_rows(
    kv_pool: Tensor, block_tables: Tensor, row_req: Tensor, row_pos: Tensor, row_loop: Tensor
) -> int:
    """n."""
    check_pool(kv_pool)
    check_ints("block_tables", block_tables, ("R", "max_pages"), kv_pool)
    check_ints("row_req", row_req, ("n",), kv_pool)
    n = row_req.shape[0]
    check_ints("row_pos", row_pos, (n,), kv_pool)
    check_ints("row_loop", row_loop, (n,), kv_pool)
    return n


def check_marks(fill_mark: Tensor | None, kv_pool: Tensor) -> None:
    if fill_mark is None:
        return
    if fill_mark.dtype != torch.uint8:
        raise TypeError(f"expected fill_mark to be uint8, got {fill_mark.dtype}")
    check_shape("fill_mark", fill_mark, (kv_pool.shape[1], PAGE))
    if fill_mark.device != kv_pool.device:
        raise ValueError(f"expected fill_mark on {kv_pool.device}, got it on {fill_mark.device}")
    if not fill_mark.is_contiguous():
        raise ValueError("expected fill_mark to be contiguous: it is written in place")
