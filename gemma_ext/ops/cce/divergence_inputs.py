"""Which divergence of which heads, and whether they fit each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gemma_ext.ops.cce.divergence_op import KINDS
from gemma_ext.ops.cce.head import Head
from gemma_ext.ops.cce.inputs import (
    Method,
    autocast_is_on,
    check_number,
    check_problem,
    check_tensor,
    check_vector,
)

SAME = "same"


@dataclass(frozen=True)
class Divergence:
    """Which divergence.

    Attributes:
        kind: of `KINDS`.
        beta: share of the teacher in the mixture of "jsd", in [0, 1].

    Raises:
        TypeError, ValueError: an unknown kind, a beta outside [0, 1].
    """

    kind: str = "forward_kl"
    beta: float = 0.5

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"expected kind to be one of {', '.join(KINDS)}, got {self.kind!r}")
        check_number("beta", self.beta)
        if not 0.0 <= self.beta <= 1.0:
            raise ValueError(f"expected beta in [0, 1], got {self.beta}")

    @property
    def proper(self) -> str:
        """The kind, where an end of the mixture is one of the two others."""
        if self.kind != "jsd" or 0.0 < self.beta < 1.0:
            return self.kind
        return "reverse_kl" if self.beta else "forward_kl"


def no_targets(e: Tensor) -> Tensor:
    check_tensor("e", e)
    return torch.zeros(e.shape[:-1], dtype=torch.int64, device=e.device)


def teacher_head(
    head: Head,
    softcap: float | str | None,
    logit_scale: float | str,
    temperature: float | str,
    *,
    role: str = "teacher",
) -> Head:
    """The teacher's map; "same" stands for the student's number.

    Raises:
        TypeError, ValueError: as `Head`, with names of the teacher's, which begin with `role`.
    """

    def number(name: str, value: object, same: object) -> object:
        if value == SAME and isinstance(value, str):
            return same
        if not (value is None and name == "softcap"):
            check_number(f"{role}_{name}", value, "'same' or a number")
            if name != "logit_scale" and not value > 0:
                raise ValueError(f"expected {role}_{name} to be positive, got {value}")
        return value

    return Head(
        number("softcap", softcap, head.softcap),
        number("logit_scale", logit_scale, head.logit_scale),
        number("temperature", temperature, head.temperature),
    )


def check_mix(ce_weight: float, temperature: float, shift: int, targets: Tensor | None) -> None:
    check_number("ce_weight", ce_weight)
    if targets is None and ce_weight:
        raise ValueError("expected targets with ce_weight, got None")
    if targets is None and shift:
        raise ValueError("expected targets with shift, got None")
    if ce_weight and temperature != 1.0:
        raise ValueError(
            f"expected temperature 1 with ce_weight, got {temperature}; "
            "add gemma_ext.linear_cross_entropy instead"
        )


def check_heads(
    e: Tensor,
    c: Tensor,
    teacher_e: Tensor,
    teacher_c: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    teacher_bias: Tensor | None,
    method: Method,
    *,
    role: str = "teacher",
) -> None:
    """Raise TypeError or ValueError unless both heads fit; the second's names begin with `role`."""
    check_problem(e, c, targets, bias, method)
    allowed = (torch.float32, torch.bfloat16, torch.float16)
    if method.materialises:
        allowed += (torch.float64,)
    for name, value in ((f"{role}_e", teacher_e), (f"{role}_c", teacher_c)):
        check_tensor(name, value)
        if value.device != e.device:
            raise ValueError(f"expected {name} on {e.device} like e, got {value.device}")
        if value.dtype not in allowed:
            raise TypeError(
                f"expected {name} to be float32, bfloat16 or float16 "
                f"(float64 with impl='reference'), got {value.dtype}"
            )
    if teacher_c.dtype != teacher_e.dtype and not autocast_is_on(e.device.type):
        raise TypeError(
            f"expected {role}_c to be {teacher_e.dtype} like {role}_e, got {teacher_c.dtype}"
        )
    if teacher_e.dim() < 1 or teacher_e.shape[:-1] != e.shape[:-1]:
        expected = ", ".join(str(size) for size in (*e.shape[:-1], "D"))
        raise ValueError(f"expected {role}_e to be [{expected}], got {list(teacher_e.shape)}")
    width = teacher_e.shape[-1]
    if teacher_c.dim() != 2 or teacher_c.shape[1] != width:
        raise ValueError(f"expected {role}_c to be [V, {width}], got {list(teacher_c.shape)}")
    if teacher_c.shape[0] != c.shape[0]:
        raise ValueError(
            f"expected {role}_c to have the {c.shape[0]} rows of c, got {teacher_c.shape[0]}"
        )
    check_vector(f"{role}_bias", teacher_bias, c.shape[0], e.device)
