"""Which heads have a fused loss, and what a refused one is."""

from __future__ import annotations

import itertools

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_QUANTISED = "a quantised head has no fused loss, keep it unquantised"


def check_head(head: nn.Module, owner: str, remedy: str) -> None:
    """Raise TypeError unless `head`, of the model `owner`, holds a [V, D] weight it can project by.

    Looks at the head as it is before it runs; `remedy` ends the message.
    """
    weight = getattr(head, "weight", None)
    if isinstance(weight, Tensor) and not _gathered_on_entry(head, weight):
        check_weight(weight, owner)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or isinstance(head, nn.Embedding):
        raise TypeError(
            f"expected the head of {owner} to be a projection with a [V, D] weight, "
            f"got {describe(head, remedy)}"
        )


def check_weight(weight: Tensor, owner: str) -> None:
    """Raise unless `weight` is a whole tensor whose values can be read now, in a floating dtype."""
    if _is_dtensor(weight):
        raise TypeError(
            f"expected the head of {owner} to have a plain weight, got a DTensor; of a tensor "
            f"parallel head use gemma_ext.distributed.vocab_parallel_linear_cross_entropy, and "
            f"under FSDP leave the head in the root unit"
        )
    if not weight.is_floating_point() or is_traceable_wrapper_subclass(weight):
        raise TypeError(
            f"expected the head of {owner} to have a floating weight, got {weight.dtype} "
            f"({type(weight).__name__}); {_QUANTISED}"
        )
    if hasattr(weight, "ds_id") or weight.device.type == "meta":
        raise TypeError(
            f"expected the weight of the head of {owner} to be in memory during the loss, got a "
            f"partitioned or offloaded one; keep the head out of ZeRO-3 and of offloading"
        )
    if weight.numel() and weight.untyped_storage().size() == 0:
        raise RuntimeError(
            f"expected the weight of the head of {owner} to be in memory during the loss, but it "
            f"was resharded; leave the head in the root FSDP unit"
        )


def describe(head: nn.Module, remedy: str) -> str:
    """The kind of a head that is refused, and what to do about it."""
    name = type(head).__name__
    if _is_quantised(head):
        return f"{name}; {_QUANTISED}"
    kind = ""
    if isinstance(head, nn.Embedding):
        kind = ", a lookup table"
    elif getattr(head, "weight", None) is None:
        parts = ", ".join(type(child).__name__ for child in head.children())
        kind = f", a module of {parts}" if parts else ", a module without a weight"
    return f"{name}{kind}; {remedy}"


def _is_quantised(head: nn.Module) -> bool:
    # packed weights: integers, or hidden behind a method as in torch.ao
    tensors = itertools.chain(head.parameters(), head.buffers())
    return callable(getattr(head, "weight", None)) or any(
        not x.is_floating_point() and x.dim() > 0 for x in tensors
    )


def _is_dtensor(weight: Tensor) -> bool:
    return type(weight).__name__ == "DTensor"


def _gathered_on_entry(head: nn.Module, weight: Tensor) -> bool:
    """Whether an FSDP unit of the head alone makes the weight a plain tensor when it is called."""
    if not _is_dtensor(weight):
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(head, FSDPModule)
