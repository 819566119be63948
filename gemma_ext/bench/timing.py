"""Interleaved timing, and peak memory that a sampling thread cannot miss; CPU first, cards below.

Times: subjects run in turn (A B C, C B A, A B C, ...) in one process, so that a slow spell of the
machine hits all of them; medians, and ratios paired inside a round.

Memory: the kernel's own high-water mark of resident memory (VmHWM), reset right before the step.
Run the process under ``memory_environment()``: then malloc writes to every byte when it is
allocated, so memory that is reserved and not touched counts too, and freed blocks go back to the
system at once instead of hiding in the baseline.

On a card times are those of CUDA events and memory is what torch's allocator has handed out.
"""

from __future__ import annotations

import ctypes
import gc
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Mark = Callable[[], None]


@dataclass(frozen=True)
class Measurement:
    """Seconds of one run: wall time of the forward, wall time and processor time of the whole."""

    forward: float
    total: float
    cpu: float


@dataclass(frozen=True)
class Timing:
    """Runs of one subject in the order of the rounds."""

    runs: tuple[Measurement, ...]

    @property
    def forward(self) -> float:
        return statistics.median(run.forward for run in self.runs)

    @property
    def total(self) -> float:
        return statistics.median(run.total for run in self.runs)

    @property
    def cpu(self) -> float:
        return statistics.median(run.cpu for run in self.runs)

    @property
    def spread(self) -> float:
        """(slowest - fastest) / median of the wall time."""
        totals = [run.total for run in self.runs]
        return (max(totals) - min(totals)) / self.total


def measure(step: Callable[[Mark], None]) -> Measurement:
    """Run ``step`` once; it calls its argument between forward and backward."""
    middle = 0.0

    def mark() -> None:
        nonlocal middle
        middle = time.perf_counter()

    gc.collect()
    cpu = time.process_time()
    start = time.perf_counter()
    step(mark)
    end = time.perf_counter()
    return Measurement((middle or end) - start, end - start, time.process_time() - cpu)


def whole(step: Callable[[], object]) -> Callable[[Mark], None]:
    """A call without a forward of its own, as `measure` and `measure_on_card` take it."""

    def run(mark: Mark) -> None:
        mark()
        step()

    return run


def interleave(
    steps: Mapping[str, Callable[[Mark], None]],
    *,
    seconds: float = 60.0,
    least: int = 3,
    most: int = 30,
    warmup: int = 1,
    measure: Callable[[Callable[[Mark], None]], Measurement] = measure,
) -> dict[str, Timing]:
    """Rounds over all steps until ``seconds`` are spent, between ``least`` and ``most`` of them.

    Args:
        steps: what is timed, by name.
        warmup: calls of each step that are not counted.
        measure: times one call.
    """
    for step in steps.values():
        for _ in range(warmup):
            measure(step)
    runs: dict[str, list[Measurement]] = {name: [] for name in steps}
    start = time.perf_counter()
    for turn in range(most):
        if turn >= least and time.perf_counter() - start > seconds:
            break
        order = list(steps) if turn % 2 == 0 else list(reversed(steps))
        for name in order:
            runs[name].append(measure(steps[name]))
    return {name: Timing(tuple(measured)) for name, measured in runs.items()}


def paired_ratio(base: Timing, other: Timing, what: str = "total") -> float:
    """Median over rounds of base time / other time: above 1, ``other`` is the faster."""
    return statistics.median(
        getattr(a, what) / getattr(b, what) for a, b in zip(base.runs, other.runs, strict=True)
    )


def memory_environment() -> dict[str, str]:
    """Environment for a process whose peak memory is measured."""
    return {
        "GLIBC_TUNABLES": "glibc.malloc.perturb=165",
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }


class PeakMemory:
    """Resident bytes above the level at entry.

    Raises:
        RuntimeError: where the kernel does not let a process reset its high-water mark.
    """

    def __enter__(self) -> PeakMemory:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        try:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")
        except OSError as error:
            raise RuntimeError(f"peak memory: cannot reset VmHWM ({error})") from error
        self._base = _status("VmRSS")
        return self

    def __exit__(self, *exception: object) -> None:
        return None

    def peak(self) -> int:
        """Bytes of the highest level since entry, above the level at entry."""
        return max(_status("VmHWM") - self._base, 0)


def measure_on_card(step: Callable[[Mark], None]) -> Measurement:
    """As ``measure``, by events on the current stream; the step marks once."""
    start, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
    torch.cuda.synchronize()
    cpu = time.process_time()
    start.record()
    step(middle.record)
    end.record()
    end.synchronize()
    forward, total = (start.elapsed_time(event) / 1e3 for event in (middle, end))
    return Measurement(forward, total, time.process_time() - cpu)


class CardMemory:
    """Bytes of device memory in use above the level at entry."""

    def __enter__(self) -> CardMemory:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self._base = torch.cuda.memory_allocated()
        return self

    def __exit__(self, *exception: object) -> None:
        return None

    def peak(self) -> int:
        """Bytes of the highest level since entry, above the level at entry."""
        return torch.cuda.max_memory_allocated() - self._base


def measure_of(device: str) -> Callable[[Callable[[Mark], None]], Measurement]:
    """`measure_on_card` or `measure`."""
    return measure_on_card if device == "cuda" else measure


def memory_of(device: str) -> PeakMemory | CardMemory:
    return CardMemory() if device == "cuda" else PeakMemory()


def total_memory(device: str = "cpu") -> int:
    """Bytes of physical memory of the machine, or of its current card."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[1]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _status(field: str) -> int:
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status: expected a line {field}, got none")
