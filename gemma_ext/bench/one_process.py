"""All subjects of a case in one process, on a card: checks, then times.

What is known is written down after every subject. An error that leaves the card unusable ends the
process; the result then names the subject, and `stages.Stages.case` goes on without it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch

from gemma_ext.bench import timing
from gemma_ext.bench.ceilings import measure_ceilings
from gemma_ext.bench.rows import Rows
from gemma_ext.bench.subject import Step, Subject
from gemma_ext.files import write_text

SHARE_OF_CHECKS = 0.6  # of the time of a case; the rest is for timing


class Problem(Protocol):
    """The part of a family: inputs of a case, and what is right about them.

    Attributes:
        device: "cpu" or "cuda".
        yardstick: errors that are printed with the table and that bars compare with.
    """

    device: str
    yardstick: Mapping[str, float]

    def blank_row(self, name: str) -> dict[str, Any]:
        """Every column, empty, with "note" and "bars"."""
        ...

    def check(self, subject: Subject, row: dict[str, Any]) -> tuple[Step | None, str]:
        """Fill a row with errors and memory; the step if it is right, and the note."""
        ...

    def runs(self, steps: Mapping[str, Step]) -> dict[str, Callable[[timing.Mark], None]]:
        """What is timed: the steps, and rows of the problem's own such as the bare products."""
        ...

    def add_times(self, rows: Rows, timed: Mapping[str, Any], subjects: Sequence[Subject]) -> None:
        """Fill rates and ratios."""
        ...

    def bars(self, subject: Subject, row: Mapping[str, Any]) -> list[str]: ...


def run(
    result: Path,
    subjects: Sequence[Subject],
    make: Callable[[], Problem],
    *,
    deadline: float,
    check_only: bool,
    seconds: float,
    least: int,
    warmup: int,
) -> None:
    """Rows of the subjects, written to ``result`` as {"rows", "yardstick", "lost"}.

    Args:
        make: makes the problem.
        deadline: seconds for the whole; subjects whose turn comes too late are not run.
        seconds: time to spend on timing. least, warmup: as in ``timing.interleave``.
    """
    start = time.monotonic()
    problem = make()
    rows = {s.name: problem.blank_row(s.name) | {"note": "not run"} for s in subjects}
    report = {"yardstick": problem.yardstick, "lost": None}

    def write() -> None:
        write_text(result, json.dumps(report | {"rows": list(rows.values())}))

    steps: dict[str, Step] = {}
    # ours first, what compiles last: time may run out
    for subject in sorted(subjects, key=lambda s: (not s.ours, s.settle)):
        row = rows[subject.name]
        if time.monotonic() - start > SHARE_OF_CHECKS * deadline:
            row["note"] = "not run: out of time"
            continue
        try:
            step, row["note"] = problem.check(subject, row)
        except Exception as error:
            row["note"] = f"failed: {type(error).__name__}: {first_line(error)}"
            if not usable(problem.device):
                report["lost"] = subject.name
                write()
                raise SystemExit(1) from error
        else:
            if step is not None:
                steps[subject.name] = step
        write()
    if steps and not check_only:
        left = deadline - (time.monotonic() - start)
        timed = run_times(problem, steps, min(seconds, left / 2), least, warmup)
        for name in timed["timings"].keys() - rows.keys():
            rows[name] = problem.blank_row(name)
        problem.add_times(rows, timed, subjects)
    for subject in subjects:
        if subject.name in steps:
            rows[subject.name]["bars"] = "; ".join(problem.bars(subject, rows[subject.name]))
    write()


def run_times(
    problem: Problem, steps: Mapping[str, Step], seconds: float, least: int, warmup: int
) -> dict[str, Any]:
    """Interleaved times of what the problem runs, and the ceilings."""
    ceilings = measure_ceilings(problem.device)
    timings = timing.interleave(
        problem.runs(steps),
        seconds=seconds,
        least=least,
        warmup=warmup,
        measure=timing.measure_of(problem.device),
    )
    return {
        "ceilings": ceilings.as_dict(),
        "timings": {name: [asdict(run) for run in t.runs] for name, t in timings.items()},
    }


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
