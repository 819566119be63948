"""Runs the checks of a module in gloo process groups: `python ranks.py <checks module> <folder>`.

The ranks are forked from one process that has imported everything, for each number of ranks in
turn. Rank r of w writes `<w>-<r>.json`, {check: traceback or null}. A failed check ends the run of
its group, for the ranks no longer agree on what comes next.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

WORLDS = (2, 4)
_LIMIT_S = 120


def worlds(*sizes: int) -> Callable[[Callable], Callable]:
    """Limit a check to these numbers of ranks."""

    def mark(function: Callable) -> Callable:
        function.worlds = sizes
        return function

    return mark


def main(module_name: str, folder: Path) -> None:
    torch.set_num_threads(1)
    module = importlib.import_module(module_name)
    checks = {name: f for name, f in vars(module).items() if name.startswith("check_")}
    fork = multiprocessing.get_context("fork")
    for world in WORLDS:
        mine = {n: f for n, f in checks.items() if world in getattr(f, "worlds", WORLDS)}
        ranks = [
            fork.Process(target=_run, args=(mine, rank, world, folder)) for rank in range(world)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(_LIMIT_S)
            process.kill()


def _run(checks: dict[str, Callable], rank: int, world: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / f'store-{world}'}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=30),
    )
    outcome: dict[str, str | None] = {}
    for name, check in checks.items():
        try:
            check(rank, world)
            dist.barrier()
            outcome[name] = None
        except Exception:
            outcome[name] = traceback.format_exc()
            break
    (folder / f"{world}-{rank}.json").write_text(json.dumps(outcome))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
