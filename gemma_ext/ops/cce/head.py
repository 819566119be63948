"""How the scores of a head come about, and which of its labels count."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch

from gemma_ext.ops.cce.inputs import check_number


@dataclass(frozen=True)
class Head:
    """s = softcap * tanh((logit_scale * e . c + bias) / softcap) / temperature.

    Attributes:
        softcap: positive, or None for no cap.
        temperature: positive.
        ignore_index: label of rows that take no part.

    Raises:
        TypeError: not a number. A tensor is refused too: its gradient would be lost.
        ValueError: a cap or temperature that is not positive.
    """

    softcap: float | None = None
    logit_scale: float = 1.0
    temperature: float = 1.0
    ignore_index: int = -100

    def __post_init__(self) -> None:
        if self.softcap is not None:
            check_number("softcap", self.softcap, "None or a number")
            if not self.softcap > 0:
                raise ValueError(f"expected softcap to be None or positive, got {self.softcap}")
        check_number("temperature", self.temperature)
        if not self.temperature > 0:
            raise ValueError(f"expected temperature to be positive, got {self.temperature}")
        check_number("logit_scale", self.logit_scale)
        if not isinstance(self.ignore_index, (Integral, torch.SymInt)):
            got = type(self.ignore_index).__name__
            raise TypeError(f"expected ignore_index to be an int, got {got}")

    def map(self) -> dict[str, Any]:
        """What makes the scores, as the twin in `gemma_ext.reference` takes it."""
        return {
            "softcap": self.softcap,
            "logit_scale": self.logit_scale,
            "temperature": self.temperature,
        }

    def scalars(self) -> dict[str, Any]:
        """The arguments of the ops, where a cap of 0 is none."""
        return {
            "softcap": float(self.softcap or 0.0),
            "logit_scale": float(self.logit_scale),
            "temperature": float(self.temperature),
            "ignore_index": self.ignore_index,
        }
