"""Which implementation serves a call."""

from __future__ import annotations

import torch

from gemma_ext import _loader

_CUDA_REFUSAL = _loader.cuda_refusal("soup_")


def is_reference(impl: str, device: torch.device | None = None) -> bool:
    """Whether `impl` asks for the formulas in plain torch; refuses devices without kernels."""
    if impl not in ("auto", "reference"):
        raise ValueError(f"expected impl to be 'auto' or 'reference', got {impl!r}")
    if impl == "reference":
        return True
    if device is not None and device.type not in ("cpu", "cuda"):
        raise ValueError(f"expected tensors on cpu or cuda with impl='auto', got {device}")
    if device is not None and device.type == "cuda" and _CUDA_REFUSAL:
        raise NotImplementedError(_CUDA_REFUSAL)
    return False
