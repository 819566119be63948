"""A problem whose answer is known: experts are random, fitness is the distance to a mix of them."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from gemma_ext.papers.genome.evaluation import Evaluator, Outcome
from gemma_ext.papers.genome.materialise import Materialiser
from gemma_ext.papers.genome.pool import Pool

MIX = (0.6, 0.3, 0.1, 0.0, 0.0)


def toy_pool(experts: int = 5, seed: int = 0) -> Pool:
    g = torch.Generator().manual_seed(seed)
    return Pool([{"x": torch.randn(8, 3, generator=g)} for _ in range(experts)])


@dataclass(frozen=True)
class Toy:
    """Makes the evaluator; picklable.

    Attributes:
        folder: of finished genomes; also counts the scorings.
        pause: seconds of each.
        dies: whose first worker ends itself in the middle, once.
    """

    folder: Path | None = None
    pause: float = 0.0
    dies: bool = False

    def __call__(self) -> Evaluator:
        pool = toy_pool()
        target = sum(w * expert["x"] for w, expert in zip(MIX, pool.experts, strict=True))
        out = {"x": torch.empty(8, 3)}

        def score(split: str) -> Outcome:
            time.sleep(self.pause)
            if self.folder is not None:
                with (self.folder / "scored").open("a") as file:
                    file.write(f"{split}\n")
            if self.dies and not (self.folder / "died").exists():
                (self.folder / "died").touch()
                os._exit(1)
            error = float((out["x"] - target).square().sum())
            shift = 0.0 if split == "validation" else 0.5
            return Outcome({"near": -error, "far": error - shift})

        return Evaluator(Materialiser(pool, self.folder), out, score)


WEIGHTS = {"near": 1.0, "far": 0.0}


def scored(folder: Path) -> int:
    path = folder / "scored"
    return len(path.read_text().splitlines()) if path.exists() else 0
