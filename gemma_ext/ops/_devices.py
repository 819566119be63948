"""What the device of a tensor lets Python do."""

from __future__ import annotations

from torch import Tensor


def is_readable(t: Tensor) -> bool:
    """Whether Python may look at the values of `t` without waiting for a device."""
    return t.device.type == "cpu"
