"""A bar over an iterable."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def track(items: Iterable[T], what: str, show: bool) -> Iterable[T]:
    """The items, with a bar on stderr if it is asked for.

    Raises:
        ImportError: `show` and rich is not installed.
    """
    if not show:
        return items
    try:
        from rich.console import Console
        from rich.progress import track as bar
    except ImportError:
        raise ImportError("the progress bar needs rich: pip install 'gemma_ext[demo]'") from None
    return bar(items, description=what, console=Console(stderr=True))
