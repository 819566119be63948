"""Linear cross-entropy as a module."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from torch import Tensor, nn

from gemma_ext.ops.cce import (
    Head,
    LinearCrossEntropyOutput,
    LossTerms,
    Method,
    linear_cross_entropy,
)
from gemma_ext.ops.vocab_state import warn_ignored

_PER_CALL = ("e", "c", "targets", "bias", "token_weights", "num_items_in_batch", "state")
_DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(linear_cross_entropy).parameters.items()
    if name not in _PER_CALL
}


class LinearCrossEntropy(nn.Module):
    """`gemma_ext.linear_cross_entropy` with its options bound.

    Args:
        options: keyword options of `linear_cross_entropy`, except the arguments of one call.

    Raises:
        TypeError, ValueError: an unknown option, or a value that no call could take.

    Example:
        >>> loss_fn = LinearCrossEntropy(softcap=30.0, shift=True)
        >>> loss = loss_fn(hidden, lm_head.weight, labels)
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        for name in ("stateful", "vocab_size"):
            if options.pop(name, None):
                warn_ignored(name)
        unknown = sorted(set(options) - set(_DEFAULTS))
        if unknown:
            raise TypeError(f"expected options among {', '.join(_DEFAULTS)}, got {unknown[0]!r}")
        for record in (Head, LossTerms, Method):
            names = {field.name for field in dataclasses.fields(record)}
            record(**{name: value for name, value in options.items() if name in names})
        self.options = options

    def forward(
        self,
        e: Tensor,
        c: Tensor,
        targets: Tensor,
        bias: Tensor | None = None,
        *,
        token_weights: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
    ) -> Tensor | LinearCrossEntropyOutput:
        """Loss of e [..., T, D] under c [V, D] against targets [..., T]; see the function."""
        return linear_cross_entropy(
            e,
            c,
            targets,
            bias=bias,
            token_weights=token_weights,
            num_items_in_batch=num_items_in_batch,
            **self.options,
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        # checkpoints of a module that was stateful
        for name in [key for key in state_dict if key.startswith(f"{prefix}state.")]:
            del state_dict[name]
        super()._load_from_state_dict(state_dict, prefix, *args)
