"""Lines of metrics: a file of JSON objects, TensorBoard, and what `train` returns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gemma_ext import files

METRICS = "history.jsonl"


class History:
    """Metrics of every logged step of a run.

    Attributes:
        folder: of the run.
        lines: one dict a step, "step" counted from 1. A mean of nothing is nan here and null in
            the file.

    Example:
        >>> trainer.train()["objective/scores"][-1]
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.lines: list[dict[str, float]] = []

    def __getitem__(self, name: str) -> list[float]:
        """The values under a name, step by step."""
        return [line[name] for line in self.lines if name in line]

    def __len__(self) -> int:
        return len(self.lines)

    def __iter__(self) -> Iterator[dict[str, float]]:
        return iter(self.lines)

    def read(self, until: int) -> None:
        """Takes up the lines of the folder up to a step; later ones are forgotten."""
        lines = files.read_metrics(self.folder / METRICS)
        self.lines = [line for line in lines if line["step"] <= until]

    def write(self) -> None:
        """The file as the lines are."""
        files.write_metrics(self.folder / METRICS, self.lines)

    def add(self, line: Mapping[str, float]) -> None:
        """One more line, here and in the file."""
        self.lines.append(dict(line))
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / METRICS).open("a", encoding="utf-8") as file:
            file.write(files.metric_line(self.lines[-1]))


def live_metrics(folder: str | Path, after: int = 0) -> Any:
    """A writer for TensorBoard, None where it is not installed.

    Args:
        after: step that a resumed run goes on from; what was told of later ones is taken back.
    """
    if find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=after + 1)
