"""One case of the loss benchmark on a card: data, truth, checks, and the bare products."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import cce_rows
import cce_stages
import torch
from torch import Tensor

from gemma_ext.bench import data, timing
from gemma_ext.bench.rows import Rows, compare_with_best
from gemma_ext.bench.subject import Case, Step, Subject
from gemma_ext.bench.timing import memory_of

BATCHES = 3  # inputs in rotation: no call finds its rows in the cache


class Head:
    """Inputs of a case in its dtype, and the truth about the first batch."""

    def __init__(self, case: Case, *, uncapped: bool) -> None:
        self.case, self.device = case, case.device
        head = data.head_data(
            case.data, case.n, case.d, case.v,
            softcap=case.softcap, seed=case.seed, device=case.device,
        )  # fmt: skip
        self.truths, errors = cce_stages.truths_of(head, case, uncapped=uncapped)
        self.yardstick = asdict(errors)
        self.c = head.c.to(case.torch_dtype, copy=True).requires_grad_()
        self.batches = [(self._leaf(head.e), head.targets)]
        for seed in range(1, BATCHES):
            e, targets = data.batch(
                head.c, case.data, case.n, softcap=case.softcap, seed=case.seed + 1 + seed
            )
            self.batches.append((self._leaf(e), targets))

    def _leaf(self, e: Tensor) -> Tensor:
        return e.to(self.c.dtype, copy=True).requires_grad_()

    def blank_row(self, name: str) -> dict[str, Any]:
        note = "the bare products, 1 forward and 3 in all" if name == cce_rows.FLOOR else ""
        return cce_rows.blank_row(self.case) | {"name": name, "note": note}

    def check(self, subject: Subject, row: dict[str, Any]) -> tuple[Step | None, str]:
        reason = subject.refuse(self.case)
        if reason is not None:
            return None, reason
        e, targets = self.batches[0]
        step = subject.make(self.case)
        step(e, self.c, targets).backward()  # compiles, tunes, loads
        e.grad = self.c.grad = None
        with memory_of(self.device) as memory:
            loss = step(e, self.c, targets)
            forward = memory.peak()
            loss.backward()
            peak = memory.peak()
        exact = self.truths["capped" if subject.capped else "uncapped"]
        found = cce_stages.findings(
            self.case, subject, step, exact, loss, e, self.c, (forward, peak)
        )
        e.grad = self.c.grad = None
        row |= cce_rows.check_columns(self.case, found)
        reason = cce_rows.red(self.case, subject, found, self.yardstick)
        if reason is not None:
            return None, reason
        return step, "" if subject.capped else "no softcap: another loss, run uncapped"

    def runs(self, steps: Mapping[str, Step]) -> dict[str, Callable[[timing.Mark], None]]:
        runs = {name: self._both_passes(step) for name, step in steps.items()}
        return runs | {cce_rows.FLOOR: self._bare_products()}

    def add_times(self, rows: Rows, timed: Mapping[str, Any], subjects: Sequence[Subject]) -> None:
        cce_rows.add_times(self.case, rows, timed)
        compare_with_best(rows, {s.name for s in subjects if not s.ours}, cce_rows.FLOOR)

    def bars(self, subject: Subject, row: Mapping[str, Any]) -> list[str]:
        return cce_rows.bars(self.case, subject, row, self.yardstick)

    def _both_passes(self, step: Step) -> Callable[[timing.Mark], None]:
        batches: Iterator[tuple[Tensor, Tensor]] = itertools.cycle(self.batches)

        def run(mark: timing.Mark) -> None:
            e, targets = next(batches)
            e.grad = self.c.grad = None
            loss = step(e, self.c, targets)
            mark()
            loss.backward()

        return run

    def _bare_products(self) -> Callable[[timing.Mark], None]:
        """Logits, dE and dC as three products into memory that is there."""
        batches = itertools.cycle([e.detach() for e, _ in self.batches])
        c = self.c.detach()
        logits = c.new_empty(self.case.n, len(c))
        de, dc = c.new_empty(self.case.n, c.shape[1]), torch.empty_like(c)

        def run(mark: timing.Mark) -> None:
            e = next(batches)
            torch.mm(e, c.T, out=logits)
            mark()
            torch.mm(logits, c, out=de)
            torch.mm(logits.T, e, out=dc)

        return run
