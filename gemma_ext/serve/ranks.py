"""The processes of a tensor-parallel engine on one machine: rank 0 serves, the others follow it.

What they tell each other is pickled, so nobody else may reach them.
"""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from gemma_ext.serve.parallel import Leader, ShardedRunner, follow, shard_weights
from gemma_ext.serve.runner import Sizes
from gemma_ext.serve.weights import Weights

# an idle server asks nothing for days; a rank that dies closes its connections, which is noticed
_PATIENCE = timedelta(days=365)
_START = timedelta(minutes=10)  # until all ranks have read the model


class Ranks:
    """Rank 0 of a group that it starts.

    Args:
        weights: of the whole model.
        read: gives them in another rank; picklable.
        count: of ranks.
        backend: "gloo" for CPUs, "nccl" for cards.
        sizes, options: of every rank's runner.

    Attributes:
        runner: for an engine of this process; every call reaches all ranks.

    Raises:
        ValueError: a model that does not split.
    """

    def __init__(
        self,
        weights: Weights,
        read: Callable[[int], Weights],
        count: int,
        backend: str,
        sizes: Sizes,
        options: dict[str, Any],
    ) -> None:
        shard_weights(weights, 0, count)  # what does not split is told before others start
        _stay_inside()
        # in a folder of this user's alone: a port would be open to everybody on the network
        self._folder = tempfile.TemporaryDirectory(prefix="gemma_ext-ranks-")
        path = os.path.join(self._folder.name, "store")
        start = multiprocessing.get_context("spawn").Process
        self._processes = [
            start(target=_follow, args=(read, rank, count, path, backend, sizes, options))
            for rank in range(1, count)
        ]
        try:
            for process in self._processes:
                process.daemon = True
                process.start()
            group = _join(0, count, path, backend)
            runner = _runner(weights, 0, count, sizes, options)
        except BaseException:
            self._end(0.0)
            raise
        self.runner = Leader(runner, group)

    def close(self) -> None:
        """Lets the other ranks go."""
        with contextlib.suppress(RuntimeError):  # of a rank that is gone already
            self.runner.stop()
        dist.destroy_process_group()
        self._end(10.0)

    def _end(self, seconds: float) -> None:
        for process in self._processes:
            if process.pid is not None:
                process.join(seconds)
                process.terminate()
                process.join()
        self._folder.cleanup()


def _follow(
    read: Callable[[int], Weights],
    rank: int,
    count: int,
    path: str,
    backend: str,
    sizes: Sizes,
    options: dict[str, Any],
) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // count))
    weights = read(rank)
    group = _join(rank, count, path, backend)
    follow(_runner(weights, rank, count, sizes, options), group)
    dist.destroy_process_group()


def _stay_inside() -> None:
    """Gloo listens on the loopback interface alone, here and in processes started from here."""
    names = [name for _, name in socket.if_nameindex() if name.startswith("lo")]
    if names:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", names[0])


def _join(rank: int, count: int, path: str, backend: str) -> dist.ProcessGroup:
    """Gives the group for what is asked; tensors go through the default one."""
    store = dist.FileStore(path, count)
    store.set_timeout(_START)
    dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=_PATIENCE)
    if backend == "gloo":
        return dist.group.WORLD
    return dist.new_group(backend="gloo", timeout=_PATIENCE)


def _runner(
    weights: Weights, rank: int, count: int, sizes: Sizes, options: dict[str, Any]
) -> ShardedRunner:
    mine = shard_weights(weights, rank, count)
    return ShardedRunner(mine, sizes, dist.group.WORLD, **options)
