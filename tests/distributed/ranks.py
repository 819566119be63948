"""One rank of the distributed checks: `python ranks.py <checks module> <rank> <world> <folder>`.

Runs every check of the module in one process group and writes `<rank>.json`, {check: traceback or
null}. A failed check ends the run, for the ranks no longer agree on what comes next.
"""

from __future__ import annotations

import importlib
import json
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist


def checks_of(module: object, world: int) -> list[str]:
    """Names of the module's checks that want `world` ranks, in their order of definition."""
    return [
        name
        for name, value in vars(module).items()
        if name.startswith("check_") and world in getattr(value, "worlds", (2, 4))
    ]


def worlds(*sizes: int):
    """Limit a check to these numbers of ranks."""

    def mark(function):
        function.worlds = sizes
        return function

    return mark


def main(module_name: str, rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=30),
    )
    module = importlib.import_module(module_name)
    outcome: dict[str, str | None] = {}
    for name in checks_of(module, world):
        try:
            getattr(module, name)(rank, world)
            dist.barrier()
            outcome[name] = None
        except Exception:
            outcome[name] = traceback.format_exc()
            break
    (folder / f"{rank}.json").write_text(json.dumps(outcome))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
