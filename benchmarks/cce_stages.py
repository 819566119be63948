"""Stages of the loss benchmark, each in a process of its own: ``cce_stages.py STAGE FOLDER ...``.

prepare  makes the data of a shape and its exact loss and sampled gradients
check    one subject: a single step, its errors, its peak memory
time     all subjects that passed, interleaved, and the machine's ceilings
card     all of it for one case on a card (``cce_card.py``)
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import baselines
import ours
import torch
from baselines.eager import eager_loss
from torch import Tensor

from gemma_ext.bench import data, one_process, timing, truth
from gemma_ext.bench.ceilings import measure_ceilings
from gemma_ext.bench.subject import DTYPES, Case, Step, Subject

YARDSTICK_ROWS = 512
WARM_MEMORY_ROWS = 16


def subjects() -> dict[str, Subject]:
    """All subjects by name: peers first, then ours."""
    return {subject.name: subject for subject in [*baselines.discover(), *ours.SUBJECTS]}


def prepare(folder: Path, case: Case, *, uncapped: bool) -> None:
    """Write data.pt and truth.pt; float32 whatever the dtype of the case."""
    torch.set_num_threads(case.threads)
    head = data.head_data(case.data, case.n, case.d, case.v, softcap=case.softcap, seed=case.seed)
    truths, yardstick = truths_of(head, case, uncapped=uncapped)
    torch.save(
        {
            "e": head.e,
            "c": head.c,
            "targets": head.targets,
        },
        folder / "data.pt",
    )
    torch.save({name: _plain(value) for name, value in truths.items()}, folder / "truth.pt")
    (folder / "yardstick.json").write_text(json.dumps(asdict(yardstick)))


def truths_of(
    head: data.HeadData, case: Case, *, uncapped: bool
) -> tuple[dict[str, truth.Truth], truth.Errors]:
    """Truths by whether the softcap is on, and the errors that eager bf16 makes."""
    sample = truth.sample_for(head.targets, case.v)
    lse = truth.row_lse(head.e, head.c, case.softcap)
    truths = {"capped": truth.exact(head.e, head.c, head.targets, lse, sample, case.softcap)}
    yardstick = eager_bf16_errors(head, lse, case.softcap)
    if uncapped:
        lse = truth.row_lse(head.e, head.c, None)
        truths["uncapped"] = truth.exact(head.e, head.c, head.targets, lse, sample, None)
    return truths, yardstick


def eager_bf16_errors(head: data.HeadData, lse: Tensor, softcap: float) -> truth.Errors:
    """Errors that eager bf16 makes on the first rows: the bar of the gradient error."""
    part = slice(0, YARDSTICK_ROWS)
    targets = head.targets[part]
    sample = truth.sample_for(targets, len(head.c))
    exact = truth.exact(head.e[part], head.c, targets, lse[part], sample, softcap)
    e = head.e[part].bfloat16().requires_grad_()
    c = head.c.bfloat16().requires_grad_()
    loss = eager_loss(e, c, targets, softcap)
    loss.backward()
    return truth.errors(exact, loss.item(), e.grad[sample.rows], c.grad[sample.columns])


def check(folder: Path, case: Case, name: str) -> dict[str, Any]:
    """One step of a subject: loss, errors, peak memory, figures."""
    torch.set_num_threads(case.threads)
    subject = subjects()[name]
    e, c, targets = load(folder, case.dtype)
    step = subject.make(case)
    if subject.settle:
        step(e, c, targets).backward()
    else:
        _touch_libraries(step, e, c, targets)
    e.grad = c.grad = None
    with timing.PeakMemory() as memory:
        loss = step(e, c, targets)
        forward = memory.peak()
        loss.backward()
        peak = memory.peak()
    exact = truth_of(folder, subject.capped)
    return findings(case, subject, step, exact, loss, e, c, (forward, peak))


def findings(
    case: Case,
    subject: Subject,
    step: Step,
    exact: truth.Truth,
    loss: Tensor,
    e: Tensor,
    c: Tensor,
    memory: tuple[int, int],
) -> dict[str, Any]:
    """What a check found, from the loss, the gradients of the leaves, and the peak bytes of the
    forward and of both passes."""
    sample = exact.sample
    found = truth.errors(exact, loss.item(), e.grad[sample.rows], c.grad[sample.columns])
    forward, peak = memory
    return {
        "loss": loss.item(),
        "errors": asdict(found),
        "peak": peak,
        # The gradients are the caller's result, all the rest is the price of the implementation.
        "extra": max(0 if subject.fused else forward, peak - case.gradient_bytes),
        "figures": step.figures(),
    }


def run_times(
    folder: Path, case: Case, names: list[str], *, seconds: float, least: int, warmup: int
) -> dict[str, Any]:
    """Interleaved times of the named subjects."""
    torch.set_num_threads(case.threads)
    ceilings = measure_ceilings()
    e, c, targets = load(folder, case.dtype)
    known = subjects()
    steps = {name: _both_passes(known[name].make(case), e, c, targets) for name in names}
    timings = timing.interleave(steps, seconds=seconds, least=least, warmup=warmup)
    return {
        "ceilings": ceilings.as_dict(),
        "timings": {name: [asdict(run) for run in t.runs] for name, t in timings.items()},
    }


def load(folder: Path, dtype: str) -> tuple[Tensor, Tensor, Tensor]:
    """Leaves e and c in the dtype of the case, and targets."""
    stored = torch.load(folder / "data.pt", mmap=True, weights_only=True)
    kind = DTYPES[dtype]
    e = stored["e"].to(kind, copy=True).requires_grad_()
    c = stored["c"].to(kind, copy=True).requires_grad_()
    return e, c, stored["targets"].clone()


def truth_of(folder: Path, capped: bool) -> truth.Truth:
    stored = torch.load(folder / "truth.pt", weights_only=True)["capped" if capped else "uncapped"]
    sample = truth.Sample(stored["rows"], stored["columns"], stored["weights"])
    return truth.Truth(sample, stored["loss"], stored["de"], stored["dc"])


def _plain(value: truth.Truth) -> dict[str, Any]:
    sample = value.sample
    return {
        "rows": sample.rows,
        "columns": sample.columns,
        "weights": sample.weights,
        "loss": value.loss,
        "de": value.de,
        "dc": value.dc,
    }


def _both_passes(
    step: Step, e: Tensor, c: Tensor, targets: Tensor
) -> Callable[[timing.Mark], None]:
    def run(mark: timing.Mark) -> None:
        e.grad = c.grad = None
        loss = step(e, c, targets)
        mark()
        loss.backward()

    return run


def _touch_libraries(step: Step, e: Tensor, c: Tensor, targets: Tensor) -> None:
    """Run a few rows, so that lazily loaded code and thread pools are not counted as the step's."""
    step(e[:WARM_MEMORY_ROWS], c, targets[:WARM_MEMORY_ROWS]).backward()


def main(arguments: list[str]) -> None:
    stage, folder = arguments[0], Path(arguments[1])
    job = json.loads((folder / "job.json").read_text())
    case = Case(**job["case"])
    if stage == "prepare":
        prepare(folder, case, uncapped=job["uncapped"])
        return
    if stage == "check":
        result = check(folder, case, arguments[2])
    elif stage == "time":
        result = run_times(folder, case, job["names"], **job["timing"])
    elif stage == "card":
        import cce_card  # which leans on this module

        known = subjects()
        chosen = [known[name] for name in job["names"]]
        uncapped = any(not subject.capped for subject in chosen)
        make = partial(cce_card.Head, case, uncapped=uncapped)
        one_process.run(folder / "result.json", chosen, make, **job["effort"])
        return
    else:
        raise SystemExit(f"stage: expected prepare, check, time or card, got {stage}")
    (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])
