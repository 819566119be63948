"""What a tensor lets Python do."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor


def is_readable(t: Tensor) -> bool:
    """Whether Python may look at the values of `t` without waiting for a device."""
    return t.device.type == "cpu"


def has_values(t: Tensor) -> bool:
    """Whether `t` is more than a tracer's or a transform's stand-in."""
    stands_in = isinstance(t, (FakeTensor, FunctionalTensor))
    return not (t.is_meta or stands_in or torch._C._functorch.is_functorch_wrapped_tensor(t))
