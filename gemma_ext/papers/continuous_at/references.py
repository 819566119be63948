"""Mean log-probabilities under the model before training, by what they are of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from gemma_ext.files import replacing
from gemma_ext.lm.huggingface import evaluating
from gemma_ext.papers.continuous_at.prompts import Batch, Row
from gemma_ext.papers.continuous_at.target_loss import TargetLoss
from gemma_ext.progress import track


class References:
    """L0 of rows, computed once each, without perturbation and dropout.

    A value is found by the digest of its row's tokens, so it cannot be another row's.

    Args:
        path: JSON file that keeps them; what it holds is not computed again.
        model: what tells models apart; a file of another model is written over.
    """

    def __init__(self, path: Path | None = None, model: str = "") -> None:
        self.path, self.model = path, model
        self._values: dict[str, float] = {}
        if path is not None and path.exists():
            kept = json.loads(path.read_text())
            if kept.get("model") == model:
                self._values = kept["values"]

    @torch.no_grad()
    def compute(
        self, loss: TargetLoss, rows: Sequence[Row], *, batch: int = 16, show_progress: bool = True
    ) -> None:
        """Adds the rows that are not known, with the adapter of a peft model switched off."""
        missing = {digest(row): row for row in rows if digest(row) not in self._values}
        todo = sorted(missing.items(), key=lambda item: -len(item[1]))
        if not todo:
            return
        model = loss.model
        off = model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext()
        with evaluating(model), off:
            starts = range(0, len(todo), batch)
            for start in track(starts, "reference log-probabilities", show_progress):
                names, some = zip(*todo[start : start + batch], strict=True)
                means = loss.means(Batch(some, model.device))
                self._values.update(zip(names, (-means).tolist(), strict=True))
        if self.path is not None:
            with replacing(self.path) as beside:
                kept = {"model": self.model, "values": self._values}
                beside.write_text(json.dumps(kept, indent=1) + "\n")

    def __call__(self, rows: Sequence[Row]) -> Tensor:
        """Float32 [R].

        Raises:
            ValueError: a row that was not computed.
        """
        for row in rows:
            if digest(row) not in self._values:
                raise ValueError("rows: expected rows that were computed before, got another")
        return torch.tensor([self._values[digest(row)] for row in rows])


def digest(row: Row) -> str:
    """Of a row's prompt and target."""
    text = f"{list(row.prompt)} {list(row.target)}"
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
