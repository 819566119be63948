"""One case of the loss benchmark on a card: data, truth, checks and times in one process.

What is known is written down after every subject. An error that leaves the card unusable ends the
process; the result then names the subject, and the caller goes on without it.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cce_rows
import cce_stages
import torch
from torch import Tensor

from gemma_ext.bench import data, timing
from gemma_ext.bench.ceilings import measure_ceilings
from gemma_ext.bench.subject import Case, Step, Subject, Warm

BATCHES = 3  # inputs in rotation: no call finds its rows in the cache
SHARE_OF_CHECKS = 0.6  # of the time of a case; the rest is for timing


class Head:
    """Inputs of a case in its dtype, and the truth about the first batch."""

    def __init__(self, case: Case, *, uncapped: bool) -> None:
        head = data.head_data(
            case.data, case.n, case.d, case.v,
            softcap=case.softcap, seed=case.seed, device=case.device,
        )  # fmt: skip
        self.truths, self.yardstick = cce_stages.truths_of(head, case, uncapped=uncapped)
        self.c = head.c.to(case.torch_dtype, copy=True).requires_grad_()
        self.batches = [(self._leaf(head.e), head.targets)]
        for seed in range(1, BATCHES):
            e, targets = self._batch(head.c, case, case.n, seed)
            self.batches.append((self._leaf(e), targets))
        warm_e, warm_targets = self._batch(head.c, case, cce_stages.WARM_ROWS, BATCHES)
        self.warm = Warm(warm_e.to(case.torch_dtype), self.c, warm_targets)

    def _batch(self, c: Tensor, case: Case, rows: int, seed: int) -> tuple[Tensor, Tensor]:
        return data.batch(c, case.data, rows, softcap=case.softcap, seed=case.seed + 1 + seed)

    def _leaf(self, e: Tensor) -> Tensor:
        return e.to(self.c.dtype, copy=True).requires_grad_()


def run(
    result: Path,
    case: Case,
    names: list[str],
    *,
    deadline: float,
    check_only: bool,
    seconds: float,
    least: int,
    warmup: int,
) -> None:
    """Rows of the named subjects, written to ``result`` as {"rows", "yardstick", "lost"}.

    Args:
        deadline: seconds for the whole; subjects whose turn comes too late are not run.
        seconds: time to spend on timing. least, warmup: as in ``timing.interleave``.
    """
    start = time.monotonic()
    known = cce_stages.subjects()
    # ours first, what compiles last: time may run out
    subjects = sorted((known[name] for name in names), key=lambda s: (not s.ours, s.settle))
    head = Head(case, uncapped=any(not subject.capped for subject in subjects))
    rows = {name: {**cce_rows.blank_row(case), "name": name, "note": "not run"} for name in names}
    report = {"yardstick": asdict(head.yardstick), "lost": None}

    def write() -> None:
        beside = result.with_suffix(".part")
        beside.write_text(json.dumps(report | {"rows": list(rows.values())}))
        beside.replace(result)

    steps: dict[str, Step] = {}
    for subject in subjects:
        row = rows[subject.name]
        if time.monotonic() - start > SHARE_OF_CHECKS * deadline:
            row["note"] = "not run: out of time"
            continue
        try:
            row["note"] = check(case, subject, head, row, steps)
        except Exception as error:
            row["note"] = f"failed: {type(error).__name__}: {first_line(error)}"
            if not usable(case.device):
                report["lost"] = subject.name
                write()
                raise SystemExit(1) from error
        write()
    if steps and not check_only:
        left = deadline - (time.monotonic() - start)
        timed = run_times(case, head, steps, min(seconds, left / 2), least, warmup)
        rows[cce_rows.FLOOR] = {**cce_rows.blank_row(case), "name": cce_rows.FLOOR}
        rows[cce_rows.FLOOR]["note"] = "the bare products, 1 forward and 3 in all"
        cce_rows.add_times(case, rows, timed)
        cce_rows.compare_with_best(rows, {s.name for s in subjects if not s.ours})
    for subject in subjects:
        if subject.name in steps:
            found = cce_rows.bars(case, subject, rows[subject.name], report["yardstick"])
            rows[subject.name]["bars"] = "; ".join(found)
    write()


def check(
    case: Case, subject: Subject, head: Head, row: dict[str, Any], steps: dict[str, Step]
) -> str:
    """Fill a row with errors and memory, and keep the step if it is right; returns the note."""
    reason = subject.refuse(case)
    if reason is not None:
        return reason
    e, targets = head.batches[0]
    step = subject.make(case, head.warm)
    step(e, head.c, targets).backward()  # compiles, tunes, loads
    e.grad = head.c.grad = None
    with memory_of(case.device) as memory:
        loss = step(e, head.c, targets)
        forward = memory.peak()
        loss.backward()
        peak = memory.peak()
    exact = head.truths["capped" if subject.capped else "uncapped"]
    found = cce_stages.findings(case, subject, step, exact, loss, e, head.c, (forward, peak))
    e.grad = head.c.grad = None
    row |= cce_rows.check_columns(case, found)
    reason = cce_rows.red(case, subject, found, asdict(head.yardstick))
    if reason is not None:
        return reason
    steps[subject.name] = step
    return "" if subject.capped else "no softcap: another loss, run uncapped"


def run_times(
    case: Case, head: Head, steps: Mapping[str, Step], seconds: float, least: int, warmup: int
) -> dict[str, Any]:
    """Interleaved times of the steps and of the bare products, and the card's ceilings."""
    ceilings = measure_ceilings(case.device)
    runs = {name: both_passes(step, head) for name, step in steps.items()}
    runs[cce_rows.FLOOR] = bare_products(head)
    on_card = case.device == "cuda"
    measure = timing.measure_on_card if on_card else timing.measure
    timings = timing.interleave(runs, seconds=seconds, least=least, warmup=warmup, measure=measure)
    return {
        "ceilings": ceilings.as_dict(),
        "timings": {name: [asdict(run) for run in t.runs] for name, t in timings.items()},
    }


def both_passes(step: Step, head: Head) -> Callable[[timing.Mark], None]:
    batches: Iterator[tuple[Tensor, Tensor]] = itertools.cycle(head.batches)

    def run(mark: timing.Mark) -> None:
        e, targets = next(batches)
        e.grad = head.c.grad = None
        loss = step(e, head.c, targets)
        mark()
        loss.backward()

    return run


def bare_products(head: Head) -> Callable[[timing.Mark], None]:
    """Logits, dE and dC as three products into memory that is there."""
    batches = itertools.cycle([e.detach() for e, _ in head.batches])
    c = head.c.detach()
    rows = len(head.batches[0][0])
    logits, de, dc = c.new_empty(rows, len(c)), c.new_empty(rows, c.shape[1]), torch.empty_like(c)

    def run(mark: timing.Mark) -> None:
        e = next(batches)
        torch.mm(e, c.T, out=logits)
        mark()
        torch.mm(logits, c, out=de)
        torch.mm(logits.T, e, out=dc)

    return run


def memory_of(device: str) -> timing.CardMemory | timing.PeakMemory:
    return timing.CardMemory() if device == "cuda" else timing.PeakMemory()


def usable(device: str) -> bool:
    """Whether the card still works after an error."""
    if device != "cuda":
        return True
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else ""
