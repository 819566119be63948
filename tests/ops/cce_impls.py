"""The implementations a user can name, with their options bound."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gemma_ext
from gemma_ext.ops.cce import cce_rows

# Below fp32 rounding of every sum here: the filter's code runs, its error does not show.
TINY_EPS = 2.0**-24


@dataclass(frozen=True)
class Impl:
    """One implementation with its options bound."""

    name: str
    filter_eps: float | None

    def __str__(self) -> str:
        return self.name

    @property
    def options(self) -> dict[str, Any]:
        return {"impl": self.name, "filter_eps": self.filter_eps}

    @property
    def loss(self) -> Callable[..., Any]:
        return functools.partial(gemma_ext.linear_cross_entropy, **self.options)

    @property
    def logprobs(self) -> Callable[..., Any]:
        return functools.partial(gemma_ext.linear_logprobs, **self.options)

    @property
    def rows(self) -> Callable[..., Any]:
        return functools.partial(cce_rows, **self.options)


IMPLS = [Impl("reference", None), Impl("exact", None), Impl("cce", TINY_EPS)]
KERNELS = IMPLS[1:]
