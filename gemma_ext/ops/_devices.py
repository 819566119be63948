"""What the device of a tensor lets Python do."""

from __future__ import annotations

from torch import Tensor
from torch.nn import Parameter


def is_readable(t: Tensor) -> bool:
    """Whether `t` has values (a tracer's stand-in has none) that are had without waiting."""
    return t.device.type == "cpu" and type(t) in (Tensor, Parameter)
