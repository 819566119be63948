"""Everything a run depends on, in one file for each rank that is either whole or not there.

A checkpoint is complete when `checkpoint.json` names its step. That file is replaced once every
rank has written its own, so a run that is killed at any moment goes on from one step for all.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor

from gemma_ext import files
from gemma_ext.ppo.ranks import rank, world

POINTER = "checkpoint.json"


def write(folder: Path, step: int, run: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Writes the state of this rank; with the others, the checkpoint of a step.

    Args:
        run: settings that a resumed run has to share.
        state: tensors and plain values.
    """
    files.write_pickle(folder / _name(step, rank()), state)
    if world() > 1:
        dist.barrier()
    if rank() == 0:
        files.write_json(folder / POINTER, {"step": step, "world": world(), "run": dict(run)})
        for other in folder.glob("checkpoint-*.pt"):
            if not other.name.startswith(f"checkpoint-{step}-"):
                other.unlink(missing_ok=True)
        # what a killed run had half written, of whatever file
        for other in folder.glob("*.[0-9]*.tmp"):
            other.unlink(missing_ok=True)


def read(folder: Path, run: Mapping[str, Any]) -> dict[str, Any] | None:
    """The state of this rank in the checkpoint of the folder, None without one.

    Raises:
        ValueError: a checkpoint of another run.
    """
    place = folder / POINTER
    if not place.exists():
        return None
    kept = files.read_json(place)
    differing = [k for k in run if kept["run"].get(k) != run[k]]
    if kept["world"] != world():
        differing.append("number of ranks")
    if differing:
        raise ValueError(
            f"output_dir: {place} is of another run ({', '.join(differing)} differ); expected "
            "another folder or the same settings"
        )
    return files.read_pickle(folder / _name(kept["step"], rank()))


def _name(step: int, of_rank: int) -> str:
    return f"checkpoint-{step}-{of_rank}.pt"


def local(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """Values of parameters, of sharded ones this rank's part."""
    return [_part(p.detach()).clone() for p in parameters]


@torch.no_grad()
def restore(parameters: Iterable[nn.Parameter], kept: Iterable[Tensor]) -> None:
    for parameter, value in zip(parameters, kept, strict=True):
        _part(parameter).copy_(value)


def _part(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def random_states() -> dict[str, Any]:
    """Of torch, Python and, where it was imported, numpy; reward functions may draw from them."""
    found: dict[str, Any] = {"torch": torch.get_rng_state(), "python": _plain(random.getstate())}
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state_all()
    if "numpy" in sys.modules:
        kind, keys, *rest = sys.modules["numpy"].random.get_state()
        found["numpy"] = [kind, keys.tolist(), *rest]
    return found


def set_random_states(kept: Mapping[str, Any]) -> None:
    torch.set_rng_state(kept["torch"])
    version, internal, gauss = kept["python"]
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in kept and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(kept["cuda"])
    if "numpy" in kept:
        import numpy as np

        kind, keys, *rest = kept["numpy"]
        np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))


def _plain(state: tuple[Any, ...]) -> list[Any]:
    version, internal, gauss = state
    return [version, list(internal), gauss]
