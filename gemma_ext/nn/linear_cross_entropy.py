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
from gemma_ext.ops.vocab_state import VocabState

_PER_CALL = ("e", "c", "targets", "bias", "token_weights", "num_items_in_batch", "state")
_DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(linear_cross_entropy).parameters.items()
    if name not in _PER_CALL
}


class LinearCrossEntropy(nn.Module):
    """`gemma_ext.linear_cross_entropy` with its options bound.

    Args:
        stateful: carry a `VocabState`, which lets the gradient filter keep less at less error. Its
            buffers ([V] int64 and two [V] float32) are part of the `state_dict`.
        vocab_size: V of that state; None takes it from the first call or the loaded state.
        options: keyword options of `linear_cross_entropy`, except the arguments of one call.

    Raises:
        TypeError, ValueError: an unknown option, or a value that no call could take.

    Example:
        >>> loss_fn = LinearCrossEntropy(softcap=30.0, shift=True, stateful=True)
        >>> loss = loss_fn(hidden, lm_head.weight, labels)
    """

    def __init__(
        self, *, stateful: bool = False, vocab_size: int | None = None, **options: Any
    ) -> None:
        super().__init__()
        unknown = sorted(set(options) - set(_DEFAULTS))
        if unknown:
            raise TypeError(f"expected options among {', '.join(_DEFAULTS)}, got {unknown[0]!r}")
        for record in (Head, LossTerms, Method):
            names = {field.name for field in dataclasses.fields(record)}
            record(**{name: value for name, value in options.items() if name in names})
        self.options = options
        self.stateful = stateful
        self.state: VocabState | None = None
        if stateful and vocab_size is not None:
            self.state = VocabState(vocab_size)

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
        if self.stateful and self.state is None:
            self.state = VocabState(c.shape[0], device=c.device)
        if self.state is not None and self.state.order.device != c.device:
            self.state.to(c.device)
        return linear_cross_entropy(
            e,
            c,
            targets,
            bias=bias,
            token_weights=token_weights,
            num_items_in_batch=num_items_in_batch,
            state=self.state,
            **self.options,
        )

    def extra_repr(self) -> str:
        options = {**self.options, "stateful": True} if self.stateful else self.options
        return ", ".join(f"{name}={value!r}" for name, value in options.items())

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        order = state_dict.get(prefix + "state.order")
        if self.stateful and self.state is None and order is not None:
            self.state = VocabState(order.shape[0])
        super()._load_from_state_dict(state_dict, prefix, *args)
