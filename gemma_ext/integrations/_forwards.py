"""Put a forward in the place of another, so that it stays through what others do to a model."""

from __future__ import annotations

import functools
import inspect
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])
_LEVELS: weakref.WeakKeyDictionary[Callable[..., Any], int] = weakref.WeakKeyDictionary()


def stand_in(replaced: Callable[..., Any], level: int) -> Callable[[Function], Function]:
    """Decorate a forward to show the name and signature of the one it replaces.

    Unlike `functools.wraps` it sets no `__wrapped__`, along which accelerate's `unwrap_model` would
    look for the model's own forward and throw this one away, and copies no attributes.

    Args:
        level: 0, or more where others have wrapped forwards of ours that the new one lies above.
    """

    def decorate(forward: Function) -> Function:
        functools.update_wrapper(forward, replaced, updated=())
        del forward.__wrapped__
        forward.__signature__ = inspect.signature(replaced)
        _LEVELS[forward] = level
        return forward

    return decorate


def level_of(forward: Callable[..., Any] | None) -> int | None:
    """The level of a function or bound forward made by `stand_in`, None for any other."""
    function = getattr(forward, "__func__", forward)
    return _LEVELS.get(function) if isinstance(function, types.FunctionType) else None


def layers(forward: Callable[..., Any] | None) -> Iterator[Callable[..., Any]]:
    """A forward and those that its `__wrapped__` attributes lead to, as plain functions."""
    while forward is not None:
        yield getattr(forward, "__func__", forward)
        forward = getattr(forward, "__wrapped__", None)
