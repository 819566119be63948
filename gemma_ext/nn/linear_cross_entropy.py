"""Linear cross-entropy as a module."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from gemma_ext.ops.cce import LinearCrossEntropyOutput, linear_cross_entropy


class LinearCrossEntropy(nn.Module):
    """`gemma_ext.linear_cross_entropy` with its options bound.

    Args:
        options: keyword options of `linear_cross_entropy`, except the tensors of one call
            (bias, token_weights, num_items_in_batch, state).

    Example:
        >>> loss_fn = LinearCrossEntropy(softcap=30.0, shift=True)
        >>> loss = loss_fn(hidden, lm_head.weight, labels)
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
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
        """Loss of e [..., T, D] under c [V, D] against targets [..., T]."""
        return linear_cross_entropy(
            e,
            c,
            targets,
            bias=bias,
            token_weights=token_weights,
            num_items_in_batch=num_items_in_batch,
            **self.options,
        )
