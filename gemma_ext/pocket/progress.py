"""One progress bar for everything here that takes longer than a breath."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from gemma_ext.pocket.extras import require


@contextmanager
def progress_bar(what: str, total: int, show: bool = True) -> Iterator[Callable[[int, str], None]]:
    """Shows a bar on stderr and yields `update(done, note)`; a terminal is not needed.

    Raises:
        ImportError: `show` and rich is not installed.
    """
    if not show:
        yield lambda done, note="": None
        return
    require("the progress bar", "demo", "rich")
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(what, total=total, note="")
        yield lambda done, note="": progress.update(task, completed=done, note=note)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Turns off the bars that transformers draws for every file it reads or writes."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
