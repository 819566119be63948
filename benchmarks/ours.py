"""The implementations of gemma_ext that take part in the loss benchmark."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

import gemma_ext
from gemma_ext.bench.subject import Case, Step, Subject

FIGURES = ("kept_fraction", "eps")


class Ours:
    """``gemma_ext.linear_cross_entropy`` with an implementation."""

    def __init__(self, impl: str, softcap: float, memory: str = "default") -> None:
        self.options = {"impl": impl, "softcap": softcap, "memory": memory}
        self.stats: object | None = None

    def __call__(self, e: Tensor, c: Tensor, targets: Tensor) -> Tensor:
        out = gemma_ext.linear_cross_entropy(e, c, targets, return_stats=True, **self.options)
        self.stats = out.stats
        return out.loss

    def figures(self) -> dict[str, float]:
        if self.stats is None:
            return {}
        values = {name: getattr(self.stats, name) for name in FIGURES}
        return {name: float(value) for name, value in values.items() if value is not None}


def _make(impl: str, memory: str = "default") -> Callable[[Case], Step]:
    return lambda case: Ours(impl, case.softcap, memory)


SUBJECTS = [
    Subject("cce", _make("cce"), ours=True, bar="filtered"),
    Subject("exact", _make("exact"), ours=True, fused=True, bar="exact"),
    Subject("lean", _make("cce", "lean"), ours=True),
    Subject("lean-exact", _make("exact", "lean"), ours=True, fused=True),
    Subject("auto", _make("auto"), ours=True),
    Subject("reference", _make("reference"), ours=True),
]
