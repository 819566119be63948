"""What a benchmark measures: a case (shape, dtype, data) and the subjects that run on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Case:
    """One line of a table: N tokens, D model width, V vocabulary, storage dtype, kind of data.

    ``device`` is "cpu" or "cuda".
    """

    n: int
    d: int
    v: int
    dtype: str
    data: str
    softcap: float = 30.0
    seed: int = 0
    threads: int = 2
    device: str = "cpu"

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def itemsize(self) -> int:
        return self.torch_dtype.itemsize

    @property
    def logits_bytes(self) -> int:
        """Bytes of the fp32 [N, V] logits, the unit that peak memory is compared with."""
        return 4 * self.n * self.v

    @property
    def gradient_bytes(self) -> int:
        """Bytes of dE [N, D] and dC [V, D], which every subject has to return."""
        return self.itemsize * self.d * (self.n + self.v)

    @property
    def flops(self) -> float:
        """Dense work of forward and backward: three products of 2 N V D."""
        return 6.0 * self.n * self.v * self.d

    def label(self) -> str:
        return f"N={self.n} D={self.d} V={self.v} {self.dtype} {self.data}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Step(Protocol):
    """A loss ready to be called again and again on the same shapes."""

    def __call__(self, e: Tensor, c: Tensor, targets: Tensor) -> Tensor: ...

    def figures(self) -> dict[str, float]:
        """Numbers of the last call besides the loss (kept fraction), or nothing."""
        ...


@dataclass
class Plain:
    """A loss function without figures of its own."""

    loss: Callable[[Tensor, Tensor, Tensor], Tensor]

    def __call__(self, e: Tensor, c: Tensor, targets: Tensor) -> Tensor:
        return self.loss(e, c, targets)

    def figures(self) -> dict[str, float]:
        return {}


def no_objection(case: Case) -> str | None:
    return None


@dataclass(frozen=True)
class Subject:
    """An implementation under measurement.

    Attributes:
        name: name of the row.
        make: builds the step for a case.
        refuse: a sentence when the case cannot run here, else None.
        capped: False when the implementation has no softcap and is run without it.
        ours: True for gemma_ext.
        fused: True when the forward already makes the gradients.
        settle: True when the first full-size call must not count (it compiles).
        bar: name of the speed bar that applies, "filtered", "exact" or None.
    """

    name: str
    make: Callable[[Case], Step]
    refuse: Callable[[Case], str | None] = no_objection
    capped: bool = True
    ours: bool = False
    fused: bool = False
    settle: bool = False
    bar: str | None = None
