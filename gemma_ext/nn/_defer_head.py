"""Make a head describe its logits instead of computing them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gemma_ext.nn._deferred_logits import DeferredLogits, LossOptions, Product
from gemma_ext.nn._head_checks import check_head, check_weight, describe


class _Thread(threading.local):
    """What the heads called by this thread are to do.

    Like the stack of modes that it drives, this belongs to a thread. It is no ContextVar, because
    torch.compile cannot trace the `set` of one.
    """

    def __init__(self) -> None:
        self.mode: Deferring | None = None


class Deferring(TorchFunctionMode):
    """Replaces `F.linear` into the vocabulary by its description while `head` runs.

    Attributes:
        entered: whether the head was called.
    """

    def __init__(self, head: nn.Module, options: LossOptions, on_loss: Callable[[], None]) -> None:
        super().__init__()
        self.head: nn.Module | None = head
        self.vocab = head.weight.shape[0]
        self.options = options
        self.on_loss = on_loss
        self.entered = False
        self.depth = 0

    def push(self) -> None:
        self.entered = True
        self.depth += 1
        self.__enter__()

    def pop(self) -> None:
        self.depth -= 1
        self.__exit__(None, None, None)

    def finish(self) -> None:
        """Leave the head wherever it was interrupted."""
        self.head = None
        while self.depth:
            self.pop()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.linear or self.head is None:
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
        product = Product(input, weight, dtype)
        return DeferredLogits((product,), bias, dtype, self.options, self.on_loss)


_THREAD = _Thread()


@contextlib.contextmanager
def defer_head(
    head: nn.Module, options: LossOptions, on_loss: Callable[[], None] = lambda: None
) -> Iterator[Deferring]:
    """Within the block, and in this thread, calls of `head` return `DeferredLogits`.

    The head runs as it is, hooks and adapters included; only its products into the vocabulary are
    deferred.

    Args:
        head: module whose `weight` is [V, D].
        options: of the loss.
        on_loss: called whenever a loss was computed from the deferred logits.

    Raises:
        TypeError: the head has no [V, D] weight in memory, or did not use `F.linear` with it.
    """
    check_head(head, options.owner, options.remedy)
    prepare_head(head)
    mode = Deferring(head, options, on_loss)
    outer = _THREAD.mode
    try:
        _THREAD.mode = mode
        yield mode
    finally:
        _THREAD.mode = outer
        # Ctrl-C inside the head skips its hooks
        mode.finish()


def is_deferred(head: nn.Module) -> bool:
    """Whether this thread is inside `defer_head` of `head`."""
    return _THREAD.mode is not None and _THREAD.mode.head is head


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


def _enter(head: nn.Module, args: tuple[Any, ...]) -> None:
    if is_deferred(head):
        _THREAD.mode.push()


def _leave(head: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    # depth 0: a hook before ours raised
    if not is_deferred(head) or not _THREAD.mode.depth:
        return
    _THREAD.mode.pop()
    if output is not None and not isinstance(output, DeferredLogits):
        raise TypeError(
            f"expected the head of {_THREAD.mode.options.owner} to be a product by F.linear, "
            f"got {describe(head, _THREAD.mode.options.remedy)}"
        )
