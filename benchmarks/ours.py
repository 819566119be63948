"""The implementations of gemma_ext that take part in the loss benchmark."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

import gemma_ext
from gemma_ext.bench.subject import Case, Step, Subject, Warm

FIGURES = ("kept_fraction", "dropped_mass", "dropped_mass_max", "eps")


class Ours:
    """``gemma_ext.linear_cross_entropy`` with an implementation, an eps, and maybe a state."""

    def __init__(self, impl: str, softcap: float, state: object | None) -> None:
        self.impl = impl
        self.softcap = softcap
        self.state = state
        self.stats: object | None = None

    def __call__(self, e: Tensor, c: Tensor, targets: Tensor) -> Tensor:
        out = gemma_ext.linear_cross_entropy(
            e,
            c,
            targets,
            softcap=self.softcap,
            impl=self.impl,
            state=self.state,
            return_stats=True,
        )
        self.stats = out.stats
        return out.loss

    def figures(self) -> dict[str, float]:
        if self.stats is None:
            return {}
        values = {name: getattr(self.stats, name) for name in FIGURES}
        return {name: float(value) for name, value in values.items() if value is not None}


def _make(impl: str, *, stateful: bool = False) -> Callable[[Case, Warm], Step]:
    def make(case: Case, warm: Warm) -> Step:
        if not stateful:
            return Ours(impl, case.softcap, None)
        step = Ours(impl, case.softcap, gemma_ext.VocabState(case.v))
        e = warm.e.detach().requires_grad_()
        step(e, warm.c.detach().requires_grad_(), warm.targets).backward()
        return step

    return make


SUBJECTS = [
    Subject("cce", _make("cce"), ours=True, bar="filtered"),
    Subject("cce+state", _make("cce", stateful=True), ours=True, bar="filtered"),
    Subject("exact", _make("exact"), ours=True, fused=True, bar="exact"),
    Subject("auto", _make("auto"), ours=True),
    Subject("reference", _make("reference"), ours=True),
]
