"""Where the time of the loss goes on a card, kernel by kernel.

python benchmarks/profile_cce.py --shape 8192,2304,256000 --data plaw-2.5 --impl cce exact
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import gemma_ext
from gemma_ext.bench import report
from gemma_ext.bench.data import DATA_KINDS, head_data
from gemma_ext.bench.options import shape_of
from gemma_ext.bench.subject import DTYPES

STEPS = 3
MOST_KERNELS = 16
ACTIVITIES = {
    "cpu": [ProfilerActivity.CPU],
    "cuda": [ProfilerActivity.CPU, ProfilerActivity.CUDA],
}
COLUMNS = {
    "kernel": ("kernel", ""),
    "launches": ("launches", ".0f"),
    "ms": ("ms", ".3f"),
    "share": ("share", ".1%"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", type=shape_of, default=(8192, 2304, 256000), metavar="N,D,V")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--data", choices=DATA_KINDS, default="plaw-2.5")
    parser.add_argument("--impl", nargs="+", choices=["cce", "exact"], default=["cce", "exact"])
    options = parser.parse_args()
    head = head_data(options.data, *options.shape, device=options.device)
    e, c = (t.to(DTYPES[options.dtype]).requires_grad_() for t in (head.e, head.c))
    print(report.header(report.machine(options.device)))
    for impl in options.impl:

        def step(impl: str = impl) -> None:
            e.grad = c.grad = None
            gemma_ext.linear_cross_entropy(e, c, head.targets, softcap=30.0, impl=impl).backward()

        step()
        with profile(activities=ACTIVITIES[options.device]) as trace:
            for _ in range(STEPS):
                step()
            if options.device == "cuda":
                torch.cuda.synchronize()
        n, d, v = options.shape
        print(f"\n## {impl}, N={n} D={d} V={v} {options.dtype} {options.data}: one step")
        times = "self_device_time_total" if options.device == "cuda" else "self_cpu_time_total"
        print(report.table(kernels(trace.key_averages(), times), COLUMNS), flush=True)


def kernels(events: Iterable[Any], times: str = "self_device_time_total") -> list[dict[str, Any]]:
    """The longest kernels of a profile of STEPS steps, per step, and all of them together.

    ``times`` is the attribute of an event with its own time in microseconds.
    """
    found = sorted(((getattr(e, times), e) for e in events), key=lambda pair: -pair[0])
    found = [(microseconds, event) for microseconds, event in found if microseconds > 0]
    total = sum(microseconds for microseconds, _ in found)
    rows = [
        {
            "kernel": short_name(event.key),
            "launches": event.count / STEPS,
            "ms": microseconds / STEPS / 1e3,
            "share": microseconds / total,
        }
        for microseconds, event in found[:MOST_KERNELS]
    ]
    return [*rows, {"kernel": "all", "ms": total / STEPS / 1e3}]


def short_name(kernel: str) -> str:
    """A kernel's name without return type, namespaces and arguments; at most 60 characters."""
    head = re.sub(r"\(anonymous namespace\)::|\w+::", "", kernel.removeprefix("void "))
    return head.split("(", 1)[0][:60]


if __name__ == "__main__":
    main()
