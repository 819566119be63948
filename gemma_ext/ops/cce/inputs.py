"""Checks of the tensors of a problem and of the way it is computed; autocast."""

from __future__ import annotations

import os
from dataclasses import dataclass
from numbers import Integral, Real

import torch
from torch import Tensor
from torch.utils._mode_utils import no_dispatch

from gemma_ext import _loader
from gemma_ext.ops import _devices

IMPLS = ("auto", "cce", "exact", "reference")
MEMORIES = ("default", "lean")
_KERNEL_DEVICES = ("cpu", "meta", "cuda")
_CUDA_REFUSAL = _loader.cuda_refusal("cce_forward")  # looked up once: a compiler traces the checks
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_INTEGERS = (Integral, torch.SymInt)
_NUMBERS = (Real, torch.SymInt, torch.SymFloat)
_AUTO = -1.0


@dataclass(frozen=True)
class Method:
    """How gradients are computed; see the table of `gemma_ext.ops.cce`.

    Raises:
        TypeError, ValueError: an unknown `impl` or `memory`, a `filter_eps` that is not "auto",
            None or a number in [0, 1), a `filter_seed` that is not an int.
    """

    impl: str = "auto"
    filter_eps: float | str | None = "auto"
    filter_seed: int = 0
    memory: str = "default"

    def __post_init__(self) -> None:
        if self.impl not in IMPLS:
            raise ValueError(f"expected impl to be one of {', '.join(IMPLS)}, got {self.impl!r}")
        if self.memory not in MEMORIES:
            raise ValueError(
                f"expected memory to be one of {', '.join(MEMORIES)}, got {self.memory!r}"
            )
        check_filter_eps(self.filter_eps)
        if isinstance(self.filter_seed, bool) or not isinstance(self.filter_seed, _INTEGERS):
            got = type(self.filter_seed).__name__
            raise TypeError(f"expected filter_seed to be an int, got {got}")

    @property
    def materialises(self) -> bool:
        """Whether the logits are held."""
        return self.impl == "reference"

    @property
    def lean(self) -> bool:
        return self.memory == "lean"

    def tau(self, dtype: torch.dtype) -> float:
        """Threshold for inputs of `dtype` as the ops take it: 0 is exact, negative their choice.

        The sampling error of "auto" is that of rounding in 16 bits, far above that of float32.
        """
        if self.impl == "exact" or not self.filter_eps:
            return 0.0
        if self.filter_eps == "auto":
            return 0.0 if dtype == torch.float32 else _AUTO
        return float(self.filter_eps)

    @property
    def seed(self) -> int:
        """`filter_seed` in the 64 bits of an op's argument."""
        return (self.filter_seed + 2**63) % 2**64 - 2**63


def check_tensor(name: str, value: object) -> None:
    """Raise TypeError unless `value` is a plain tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"expected {name} to be a tensor, got {type(value).__name__}")
    if type(value).__name__ == "DTensor":
        raise TypeError(
            f"expected {name} to be a plain tensor, got DTensor; use gemma_ext.distributed: "
            "vocab_parallel_linear_cross_entropy if all ranks hold the same tokens, "
            "gather_head(c) if not"
        )


def check_vector(name: str, value: Tensor | None, size: int, device: torch.device) -> None:
    """Raise unless `value` is None or a floating [size] tensor on `device`."""
    if value is None:
        return
    check_tensor(name, value)
    if value.device != device:
        raise ValueError(f"expected {name} on {device} like e, got {value.device}")
    if not value.is_floating_point():
        raise TypeError(f"expected {name} to be floating, got {value.dtype}")
    if value.dim() != 1 or value.shape[0] != size:
        raise ValueError(f"expected {name} to be [{size}], got {list(value.shape)}")


def check_problem(
    e: Tensor, c: Tensor, targets: Tensor, bias: Tensor | None, method: Method
) -> None:
    """Raise TypeError or ValueError unless e [..., D], c [V, D], targets [...], bias [V] fit."""
    for name, value in (("e", e), ("c", c), ("targets", targets)):
        check_tensor(name, value)
        if value.device != e.device:
            raise ValueError(f"expected {name} on {e.device} like e, got {value.device}")
    if not method.materialises:
        _check_device(e.device, method.impl)
    allowed = _KERNEL_DTYPES + ((torch.float64,) if method.materialises else ())
    for name, value in (("e", e), ("c", c)):
        if value.dtype not in allowed:
            raise TypeError(
                f"expected {name} to be float32, bfloat16 or float16 "
                f"(float64 with impl='reference'), got {value.dtype}"
            )
    if c.dtype != e.dtype and not autocast_is_on(e.device.type):
        raise TypeError(f"expected c to be {e.dtype} like e, got {c.dtype}")
    if targets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"expected targets to be int32 or int64, got {targets.dtype}")
    if e.dim() < 1:
        raise ValueError("expected e to be [..., D], got a 0-d tensor")
    if c.dim() != 2 or c.shape[1] != e.shape[-1]:
        raise ValueError(f"expected c to be [V, {e.shape[-1]}], got {list(c.shape)}")
    if c.shape[0] < 1:
        raise ValueError("expected c to have at least one row, got 0")
    if targets.shape != e.shape[:-1]:
        raise ValueError(f"expected targets to be {list(e.shape[:-1])}, got {list(targets.shape)}")
    check_vector("bias", bias, c.shape[0], e.device)


def check_labels(
    targets: Tensor, vocab: int, ignore_index: int, *, offset: int = 0, wait: bool = False
) -> None:
    """Raise ValueError naming the first label outside [0, vocab) that is not `ignore_index`.

    Its flat position is counted from `offset`. Where reading labels waits for a device they are
    looked at only with `wait`, or with GEMMA_EXT_CHECK_LABELS=1 in the environment; in a trace or
    inside a transform of torch.func never.
    """
    if torch.compiler.is_compiling() or not _devices.has_values(targets):
        return
    asked = os.environ.get("GEMMA_EXT_CHECK_LABELS", "0") not in ("", "0")
    if not (wait or asked or _devices.is_readable(targets)):
        return
    with no_dispatch():  # no part of what is traced or counted
        flat = targets.reshape(-1)
        bad = ((flat < 0) | (flat >= vocab)) & (flat != ignore_index)
        if not bool(bad.any()):
            return
        position = int(bad.nonzero()[0])
        label = int(flat[position])
    raise ValueError(
        f"expected targets in [0, {vocab}) or ignore_index {ignore_index}, "
        f"got {label} at flat position {position + offset}"
    )


def to_autocast(e: Tensor, c: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The three in the autocast dtype where autocast is on, as it would be for `F.linear`.

    Differentiable: gradients come back in the dtypes of the arguments.
    """
    kind = e.device.type
    if not autocast_is_on(kind):
        return e, c, bias
    dtype = torch.get_autocast_dtype(kind)
    return e.to(dtype), c.to(dtype), None if bias is None else bias.to(dtype)


def autocast_is_on(device_type: str) -> bool:
    # torch knows no autocast on meta and raises when asked
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def _check_device(device: torch.device, impl: str) -> None:
    if device.type not in _KERNEL_DEVICES:
        raise ValueError(
            f"expected e on {' or '.join(_KERNEL_DEVICES)} with impl={impl!r}, got {device}; "
            "impl='reference' runs anywhere and holds the logits"
        )
    if device.type == "cuda" and _CUDA_REFUSAL:
        raise NotImplementedError(f"{_CUDA_REFUSAL}, which holds the logits")


def check_filter_eps(filter_eps: object) -> None:
    """Raise unless `filter_eps` is "auto", None or a number in [0, 1)."""
    if filter_eps is None or filter_eps == "auto":
        return
    if isinstance(filter_eps, (str, bool)) or not isinstance(filter_eps, (int, float)):
        raise TypeError(f"expected filter_eps to be 'auto', None or a float, got {filter_eps!r}")
    if not 0.0 <= filter_eps < 1.0:
        raise ValueError(f"expected filter_eps in [0, 1), got {filter_eps}")


def check_number(name: str, value: object, what: str = "a number") -> None:
    """Raise TypeError unless `value` is a real number; a bool is none."""
    if isinstance(value, bool) or not isinstance(value, _NUMBERS):
        raise TypeError(f"expected {name} to be {what}, got {type(value).__name__}")
