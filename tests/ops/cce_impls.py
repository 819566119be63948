"""The implementations a user can name, with their options bound, on every device there is."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import gemma_ext
from gemma_ext.ops.cce import cce_rows

# Below fp32 rounding of every sum here: the filter's code runs, its error does not show.
TINY_EPS = 2.0**-24
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


@dataclass(frozen=True)
class Impl:
    """One implementation with its options bound."""

    name: str
    filter_eps: float | str | None
    device: str = "cpu"

    def __str__(self) -> str:
        return self.name if self.device == "cpu" else f"{self.name}-{self.device}"

    @property
    def options(self) -> dict[str, Any]:
        return {"impl": self.name, "filter_eps": self.filter_eps}

    @property
    def loss(self) -> Callable[..., Any]:
        return self._bound(gemma_ext.linear_cross_entropy)

    @property
    def logprobs(self) -> Callable[..., Any]:
        return self._bound(gemma_ext.linear_logprobs)

    @property
    def rows(self) -> Callable[..., Any]:
        return self._bound(cce_rows)

    def _bound(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        bound = functools.partial(fn, **self.options)
        return bound if self.device == "cpu" else on_device(bound, self.device)


def on_device(fn: Callable[..., Any], device: str) -> Callable[..., Any]:
    """``fn`` on copies of its tensors with the same strides on ``device``, and its results back
    on the CPU, where their gradients arrive too."""

    def call(*args: Any, **options: Any) -> Any:
        args = [_there(value, device) for value in args]
        options = {name: _there(value, device) for name, value in options.items()}
        return _back(fn(*args, **options))

    return call


def _there(value: Any, device: str) -> Any:
    if not isinstance(value, Tensor) or not value.dim():
        return value
    return value.to(device) if torch.compiler.is_compiling() else _Copy.apply(value, device)


def _back(value: Any) -> Any:
    if isinstance(value, tuple):
        parts = map(_back, value)
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value.cpu() if isinstance(value, Tensor) else value


class _Copy(torch.autograd.Function):
    """A copy of the storage a tensor lies in, and of the way it lies there."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, device: str) -> Tensor:
        size = t.untyped_storage().nbytes() // t.element_size()
        whole = t.detach().as_strided((size,), (1,), 0).to(device, copy=True)
        return whole.as_strided(t.shape, t.stride(), t.storage_offset())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.cpu(), None


IMPLS = [
    impl
    for device in DEVICES
    for impl in (
        Impl("reference", None, device),
        Impl("exact", None, device),
        Impl("cce", TINY_EPS, device),
    )
]
KERNELS = [impl for impl in IMPLS if impl.name != "reference"]
