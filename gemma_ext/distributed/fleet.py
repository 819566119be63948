"""One function over many jobs: in this process, in local processes, or on a Ray cluster.

Every worker makes the function itself, once, so that a model is loaded where it runs; jobs and
results travel pickled. Results come in the order of the jobs, whoever computed them.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from gemma_ext.extras import require

Make = Callable[[], Callable[[Any], Any]]
Done = Callable[[int, Any], None]
_ATTEMPTS = 3  # of a job whose worker dies


class Fleet(Protocol):
    def map(self, jobs: Sequence[Any], done: Done | None = None) -> list[Any]:
        """The function of every job; `done(index, result)` is called as results come in.

        Raises:
            RuntimeError: workers died again and again. What the function raises comes through.
        """


@contextmanager
def open_fleet(
    make: Make, workers: int = 0, *, ray: str | None = None, threads: int = 1
) -> Iterator[Fleet]:
    """Workers that are there until the block ends.

    Args:
        make: called once in each worker, gives the function; picklable unless `workers` is 0.
        workers: processes, or Ray actors; 0 for none but this one.
        ray: address of a cluster, "auto" for the running one, "local" to start one here; None for
            local processes.
        threads: torch threads of each worker, this process included: results whose last bits
            depend on them are the same for any number of workers.

    Raises:
        ValueError: fewer than 0 workers, or none with `ray`.
        ImportError: `ray` is given and the package is missing.
    """
    if workers < (0 if ray is None else 1):
        least = 0 if ray is None else "1 with ray"
        raise ValueError(f"workers: expected at least {least}, got {workers}")
    if ray is not None:
        fleet = _RayActors(make, workers, ray, threads)
    elif workers:
        fleet = _Processes(make, workers, threads)
    else:
        fleet = _Here(make, threads)
    try:
        yield fleet
    finally:
        fleet.close()


class _Here:
    def __init__(self, make: Make, threads: int) -> None:
        self._make, self._threads, self._function = make, threads, None

    def map(self, jobs: Sequence[Any], done: Done | None = None) -> list[Any]:
        before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            self._function = self._function or self._make()
            results = []
            for index, job in enumerate(jobs):
                results.append(self._function(job))
                if done is not None:
                    done(index, results[-1])
            return results
        finally:
            torch.set_num_threads(before)

    def close(self) -> None:
        self._function = None


class _Processes:
    def __init__(self, make: Make, workers: int, threads: int) -> None:
        self._arguments = (make, threads)
        self._workers = workers
        self._pool = self._start()

    def _start(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(
            self._workers,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_prepare,
            initargs=self._arguments,
        )

    def map(self, jobs: Sequence[Any], done: Done | None = None) -> list[Any]:
        results: dict[int, Any] = {}
        for _ in range(_ATTEMPTS):
            left = [index for index in range(len(jobs)) if index not in results]
            try:
                futures = {self._pool.submit(_run, jobs[index]): index for index in left}
                for future in as_completed(futures):
                    index = futures[future]
                    results[index] = future.result()
                    if done is not None:
                        done(index, results[index])
                return [results[index] for index in range(len(jobs))]
            except BrokenProcessPool:
                self._pool.shutdown(wait=False, cancel_futures=True)
                self._pool = self._start()
            except BaseException:
                for future in futures:
                    future.cancel()
                raise
        raise RuntimeError(_died(_ATTEMPTS))

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


class _RayActors:
    def __init__(self, make: Make, workers: int, address: str, threads: int) -> None:
        require("a fleet on a cluster", "ray", "ray")
        import ray

        self._ray = ray
        self._started = not ray.is_initialized()
        if self._started:
            ray.init(address=None if address == "local" else address, log_to_driver=False)
        # spread: one node would otherwise be filled before the next
        actor = ray.remote(num_cpus=threads, scheduling_strategy="SPREAD")(_RemoteWorker)
        pickled = ray.cloudpickle.dumps(make)
        self._new = lambda: actor.remote(pickled, threads, sys.path)
        self._actors = [self._new() for _ in range(workers)]

    def map(self, jobs: Sequence[Any], done: Done | None = None) -> list[Any]:
        ray = self._ray
        results: dict[int, Any] = {}
        waiting = list(reversed(range(len(jobs))))
        attempts = [0] * len(jobs)
        idle, running = list(range(len(self._actors))), {}
        while waiting or running:
            while waiting and idle:
                index, actor = waiting.pop(), idle.pop()
                attempts[index] += 1
                running[self._actors[actor].run.remote(jobs[index])] = (index, actor)
            (ready,), _ = ray.wait(list(running), num_returns=1)
            index, actor = running.pop(ready)
            idle.append(actor)
            try:
                results[index] = ray.get(ready)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from error
            except ray.exceptions.RayActorError:
                if attempts[index] == _ATTEMPTS:
                    raise RuntimeError(_died(_ATTEMPTS)) from None
                self._actors[actor] = self._new()
                waiting.append(index)
                continue
            if done is not None:
                done(index, results[index])
        return [results[index] for index in range(len(jobs))]

    def close(self) -> None:
        for actor in self._actors:
            self._ray.kill(actor)
        if self._started:
            self._ray.shutdown()


class _Worker:
    def __init__(self, make: Make, threads: int) -> None:
        torch.set_num_threads(threads)
        self._make, self._function = make, None

    def run(self, job: Any) -> Any:
        # not in __init__: what fails there is an actor's death, not an error with a sentence
        self._function = self._function or self._make()
        return self._function(job)


class _RemoteWorker(_Worker):
    """Finds modules where the process that sent it does, as far as these places are here too."""

    def __init__(self, make: bytes, threads: int, path: list[str]) -> None:
        sys.path += [place for place in path if place not in sys.path and os.path.isdir(place)]
        super().__init__(lambda: pickle.loads(make)(), threads)


_worker: _Worker | None = None


def _prepare(make: Make, threads: int) -> None:
    global _worker
    _worker = _Worker(make, threads)


def _run(job: Any) -> Any:
    return _worker.run(job)


def _died(times: int) -> str:
    return f"fleet: a job's worker died {times} times (out of memory?); the job was not finished"
