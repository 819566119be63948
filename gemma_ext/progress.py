"""Bars on stderr for work that takes longer than a breath; a terminal is not needed.

All raise an ImportError with its remedy where one is to be shown and rich is not installed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from gemma_ext.extras import require

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

T = TypeVar("T")
Advance = Callable[..., None]  # (count, note="")
Moved = Callable[[int, int], None]  # (bytes done, bytes in all)


@contextmanager
def progress_bar(what: str, total: int | None, show: bool = True) -> Iterator[Advance]:
    """Counts things, with a note on the last; yields `advance(count, note="")`.

    Args:
        total: None for a number that is not known.
    """
    if not show:
        yield lambda count, note="": None
        return
    with _drawn(what, total, "MofNCompleteColumn", "TimeElapsedColumn", note="") as (bar, task):
        yield lambda count, note="": bar.update(task, advance=count, note=note)


@contextmanager
def byte_bar(what: str, show: bool = True) -> Iterator[Moved]:
    """Shows bytes, bytes per second and the time left; yields `update(done, total)`."""
    if not show:
        yield lambda done, total: None
        return
    with _drawn(what, None, "DownloadColumn", "TransferSpeedColumn") as (bar, task):
        yield lambda done, total: bar.update(task, completed=done, total=total)


def track(items: Iterable[T], what: str, show: bool = True) -> Iterator[T]:
    """The items, with a bar if it is asked for."""
    with progress_bar(what, len(items) if isinstance(items, Sized) else None, show) as advance:
        for item in items:
            yield item
            advance(1)


@contextmanager
def _drawn(
    what: str, total: int | None, *columns: str, **fields: Any
) -> Iterator[tuple[Progress, TaskID]]:
    require("the progress bar", "demo", "rich")
    from rich import progress
    from rich.console import Console

    shown = [
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        *(getattr(progress, name)() for name in columns),
        progress.TimeRemainingColumn(),
        *(progress.TextColumn(f"{{task.fields[{name}]}}") for name in fields),
    ]
    with progress.Progress(*shown, console=Console(stderr=True)) as bar:
        yield bar, bar.add_task(what, total=total, **fields)
