"""Which implementation serves a call."""

from __future__ import annotations

import torch

from gemma_ext import _loader


def is_reference(impl: str, device: torch.device, op: str) -> bool:
    """Whether `impl` asks for plain torch; refuses devices that have no kernel of `op`."""
    if impl not in ("auto", "reference"):
        raise ValueError(f"expected impl to be 'auto' or 'reference', got {impl!r}")
    if impl == "reference":
        return True
    if device.type not in ("cpu", "meta", "cuda"):
        raise ValueError(f"expected tensors on cpu, meta or cuda with impl='auto', got {device}")
    if device.type == "cuda" and (refusal := _loader.cuda_refusal(op)):
        raise NotImplementedError(refusal)
    return False
