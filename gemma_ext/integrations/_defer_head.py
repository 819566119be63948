"""Make a head describe its logits instead of computing them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gemma_ext.integrations._deferred_logits import DeferredLogits, LossOptions, check_weight

_DEFERRING = "_gemma_ext_deferring"


@contextlib.contextmanager
def defer_head(
    head: nn.Module, options: LossOptions, on_loss: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Within the block, calls of `head` return `DeferredLogits`.

    The head runs as it is, hooks and adapters included; only its products into the vocabulary are
    deferred.

    Args:
        head: module whose `weight` is [V, D].
        options: of the loss.
        on_loss: called whenever a loss was computed from the deferred logits.

    Raises:
        TypeError: the head has no [V, D] weight, or did not use `F.linear` with it.
    """
    mode = _Deferring(vocab_size(head, options.owner), options, on_loss)
    prepare_head(head)
    setattr(head, _DEFERRING, mode)
    try:
        yield
    finally:
        setattr(head, _DEFERRING, None)


def prepare_head(head: nn.Module) -> None:
    """Put two hooks on a head, idle outside `defer_head`; they stay until `release_head`.

    They are not added and removed with every block, because a compiled model would then meet a new
    head, and recompile, at every step.
    """
    if _enter not in head._forward_pre_hooks.values():
        head.register_forward_pre_hook(_enter)
        head.register_forward_hook(_leave, always_call=True)


def release_head(head: nn.Module) -> None:
    """Remove the hooks of `prepare_head`."""
    for hooks in (head._forward_pre_hooks, head._forward_hooks):
        for key in [key for key, hook in hooks.items() if hook in (_enter, _leave)]:
            del hooks[key]
            head._forward_hooks_always_called.pop(key, None)
    vars(head).pop(_DEFERRING, None)


def vocab_size(head: nn.Module, owner: str) -> int:
    """V of a head with a [V, D] weight; TypeError for any other head of the model `owner`."""
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise TypeError(
            f"expected the head of {owner} to have a [V, D] weight, got {type(head).__name__}; "
            f"a quantised head has no fused loss, keep it unquantised"
        )
    return weight.shape[0]


class _Deferring(TorchFunctionMode):
    """Replaces `F.linear` into the vocabulary by its description."""

    def __init__(self, vocab: int, options: LossOptions, on_loss: Callable[[], None]) -> None:
        super().__init__()
        self.vocab = vocab
        self.options = options
        self.on_loss = on_loss
        self.entered = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.linear:
            return func(*args, **kwargs)
        return self._linear(*args, **kwargs)

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
        if weight.dim() != 2 or weight.shape[0] != self.vocab:
            return F.linear(input, weight, bias)
        check_weight(weight, self.options.owner)
        kind = weight.device.type
        dtype = weight.dtype
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        return DeferredLogits(((input, weight),), bias, dtype, self.options, self.on_loss)


def _enter(head: nn.Module, args: tuple[Any, ...]) -> None:
    mode = getattr(head, _DEFERRING, None)
    if mode is not None:
        mode.entered += 1
        mode.__enter__()


def _leave(head: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    mode = getattr(head, _DEFERRING, None)
    # not entered if a hook before ours raised
    if mode is None or not mode.entered:
        return
    mode.entered -= 1
    mode.__exit__(None, None, None)
    if output is not None and not isinstance(output, DeferredLogits):
        raise TypeError(
            f"expected the head of {mode.options.owner} to be a product by F.linear, got "
            f"{type(head).__name__}; a quantised head has no fused loss, keep it unquantised"
        )
