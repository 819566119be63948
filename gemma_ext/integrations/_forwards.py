"""Put a forward in the place of another, so that it stays through what others do to a model."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])
_OURS: weakref.WeakSet[Callable[..., Any]] = weakref.WeakSet()


def stand_in(replaced: Callable[..., Any]) -> Callable[[Function], Function]:
    """Decorate a forward to show the name and signature of the one it replaces.

    Unlike `functools.wraps` it sets no `__wrapped__`, along which accelerate's `unwrap_model` would
    look for the model's own forward and throw this one away, and copies no attributes.
    """

    def decorate(forward: Function) -> Function:
        functools.update_wrapper(forward, replaced, updated=())
        del forward.__wrapped__
        forward.__signature__ = inspect.signature(replaced)
        _OURS.add(forward)
        return forward

    return decorate


def is_ours(forward: Callable[..., Any] | None) -> bool:
    """Whether a function or bound forward was made by `stand_in`, and is not a wrapper of one."""
    return getattr(forward, "__func__", forward) in _OURS


def layers(forward: Callable[..., Any] | None) -> Iterator[Callable[..., Any]]:
    """A forward and those that its `__wrapped__` attributes lead to, as plain functions."""
    while forward is not None:
        yield getattr(forward, "__func__", forward)
        forward = getattr(forward, "__wrapped__", None)
