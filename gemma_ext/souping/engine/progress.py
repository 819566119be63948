"""A bar for work that is measured in bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[int, int], None]  # (bytes done, bytes in all)


@contextmanager
def byte_bar(what: str, show: bool = True) -> Iterator[Progress]:
    """Shows bytes, bytes per second and the time left on stderr; yields `update(done, total)`.

    Raises:
        ImportError: `show` and rich is not installed.
    """
    if not show:
        yield lambda done, total: None
        return
    try:
        from rich import progress
        from rich.console import Console
    except ImportError:
        raise ImportError("the progress bar needs rich: pip install 'gemma_ext[merge]'") from None
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
