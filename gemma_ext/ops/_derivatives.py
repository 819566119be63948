"""Which derivatives an operator has: those its caller gives it, and for the rest a refusal.

An operator that lacks an autograd kernel gives zeros in forward mode and drops terms of second
derivatives, silently. Every operator of this package is registered here instead.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

from gemma_ext import _loader

_LIBRARY = torch.library.Library("gemma_ext", "IMPL")
_REMEDY = (
    "gemma_ext.linear_cross_entropy with impl='reference' has derivatives of every order and mode, "
    "and holds the logits"
)


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """`function.apply(*args)`, which refuses forward mode."""
    if not torch.compiler.is_compiling():
        return _without_forward_mode(function).apply(*args)
    # a compiler traces no function that says anything about forward mode
    wanted = any(isinstance(x, Tensor) and x.requires_grad for x in args)
    return (function.apply if wanted and torch.is_grad_enabled() else function.forward)(*args)


def once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A `backward` that uses what torch cannot differentiate, with gradients that refuse it."""

    @functools.wraps(backward)
    def call(ctx: Any, *grads: Tensor | None) -> Any:
        with torch.no_grad():
            found = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return found
        name = backward.__qualname__.partition(".")[0]
        return tuple(x if x is None else _Once.apply(x, _trigger(x), name) for x in found)

    return call


def _trigger(like: Tensor) -> Tensor:
    return like.new_empty(0).requires_grad_()


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, trigger: Tensor, name: str) -> Tensor:
        ctx.name = name
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        raise _refusal(ctx.name, "derivative of this order")


@functools.cache
def _without_forward_mode(function: type[torch.autograd.Function]) -> type:
    def jvp(ctx: Any, *tangents: Any) -> None:
        raise _refusal(function.__name__, "forward-mode derivative")

    return type(function.__name__, (function,), {"jvp": staticmethod(jvp)})


def _refusal(name: str, what: str, remedy: str = _REMEDY) -> NotImplementedError:
    return NotImplementedError(f"{name} has no {what}; {remedy}")


def refuse_derivatives(name: str, remedy: str = _REMEDY) -> None:
    """Make `gemma_ext::name` raise when a derivative of it is asked for, of its gradients too.

    The `remedy` says who has one.

    Raises:
        ImportError: the library that is loaded has no such op.
    """
    op = _loader.find_op(name)

    def below(keys: torch.DispatchKeySet, *args: Any) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keys & torch._C._after_autograd_keyset, *args)

    # of one level: a kernel is below the transforms of torch.func, which have done their part
    class Refused(torch.autograd.function._SingleLevelFunction):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
            # a transform of torch.func further out differentiates what this one calls
            with torch.enable_grad():
                return below(*args)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> None:
            raise _refusal(name, "derivative of this order", remedy)

    def kernel(keys: torch.DispatchKeySet, *args: Any) -> tuple[Tensor, ...]:
        listed = [x for each in args if isinstance(each, (list, tuple)) for x in each]
        tensors = [x for x in (*args, *listed) if isinstance(x, Tensor)]
        if any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
            raise _refusal(name, "forward-mode derivative", remedy)
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            hidden = any(isinstance(x, Tensor) and x.requires_grad for x in listed)
            if hidden or not op._schema.returns:  # nothing to hang a refusal on
                raise _refusal(name, "derivative", remedy)
            with enable_single_level_autograd_function():
                return Refused.apply(keys, *args)
        return below(keys, *args)

    _LIBRARY.impl(name, kernel, "Autograd", with_keyset=True)
