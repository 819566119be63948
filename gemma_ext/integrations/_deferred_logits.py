"""Logits that are described, not computed.

Under `gemma_ext.integrations._defer_head`, a head returns a `DeferredLogits` instead of a tensor:

    logits = scale * (sum_k x_k W_k^T + b)                      before a cap
    logits = cap * tanh(scale * (sum_k x_k W_k^T + b))          after one

The model's own code then scales, caps, casts, slices and reshapes that description, and the
cross-entropy it ends in becomes `gemma_ext.linear_cross_entropy` of (x, W). Nothing is assumed
about what a model does between head and loss: an operation that has no place in the two forms above
raises `DeferredLogitsError` with its name, so a loss is either the model's own or an error.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from gemma_ext.ops.cce import linear_cross_entropy


class DeferredLogitsError(NotImplementedError):
    """A model or its head does something to its logits that cannot be deferred."""


@dataclasses.dataclass(frozen=True)
class LossOptions:
    """How a deferred cross-entropy is computed.

    Attributes:
        owner: class name of the model, for messages.
        impl, filter_eps, state: as in `gemma_ext.linear_cross_entropy`.
    """

    owner: str
    impl: str = "auto"
    filter_eps: float | str | None = "auto"
    state: Any = None


@dataclasses.dataclass(frozen=True, eq=False)
class DeferredLogits:
    """Stand-in for the [..., V] logits of a head; see the module for the formula.

    Attributes:
        terms: pairs of hidden states [..., D_k] and weights [V, D_k].
        bias: [V] or None.
        numerator, denominator: scale = numerator / denominator, kept apart so that dividing by a
            cap and multiplying by it again gives back exactly 1.
        cap: multiplier of the tanh, None before a tanh.
        dtype: what the materialised logits would have.
        options: of the loss; on_loss: called when a loss was computed from these logits.
    """

    terms: tuple[tuple[Tensor, Tensor], ...]
    bias: Tensor | None
    dtype: torch.dtype
    options: LossOptions
    on_loss: Callable[[], None]
    numerator: float = 1.0
    denominator: float = 1.0
    cap: float | None = None

    @property
    def vocab(self) -> int:
        return self.terms[0][1].shape[0]

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.terms[0][0].shape[:-1], self.vocab))

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def device(self) -> torch.device:
        return self.terms[0][1].device

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.ndim

    def is_floating_point(self) -> bool:
        return True

    def to(self, *args: Any, **kwargs: Any) -> DeferredLogits:
        """Change the dtype; the device is the head's, wherever the logits are wanted."""
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.dtype):
                return dataclasses.replace(self, dtype=value)
            if isinstance(value, (Tensor, DeferredLogits)):
                return dataclasses.replace(self, dtype=value.dtype)
        return self

    def type_as(self, other: Tensor) -> DeferredLogits:
        return self.to(other.dtype)

    def float(self) -> DeferredLogits:
        return self.to(torch.float32)

    def half(self) -> DeferredLogits:
        return self.to(torch.float16)

    def bfloat16(self) -> DeferredLogits:
        return self.to(torch.bfloat16)

    def contiguous(self) -> DeferredLogits:
        return self

    def view(self, *shape: Any) -> DeferredLogits:
        """Reshape everything before the vocabulary axis."""
        if len(shape) == 1 and not isinstance(shape[0], int):
            (shape,) = shape
        rows = math.prod(self.shape[:-1])
        keeps = shape[-1] == self.vocab if shape else False
        if not keeps and not (shape and shape[-1] == -1 and math.prod(shape[:-1]) == rows):
            self._refuse(f"view({', '.join(map(str, shape))})")
        return self._map_hidden(lambda x: x.reshape(*shape[:-1], x.shape[-1]))

    reshape = view

    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> DeferredLogits:
        if end_dim % self.ndim == self.ndim - 1:
            self._refuse(f"flatten({start_dim}, {end_dim})")
        return self._map_hidden(lambda x: x.flatten(start_dim, end_dim))

    def __getitem__(self, index: Any) -> DeferredLogits:
        items = index if isinstance(index, tuple) else (index,)
        used = sum(_axes(item) for item in items)
        dotted = any(item is Ellipsis for item in items)
        if used < self.ndim and (not dotted or items[-1] is Ellipsis):
            return self._map_hidden(lambda x: x[items])
        rows, columns = (*items[:-1], slice(None)), items[-1]
        if columns == slice(None):
            return self._map_hidden(lambda x: x[rows])
        if not isinstance(columns, slice):
            self._refuse("indexing of the vocabulary")
        return dataclasses.replace(
            self,
            terms=tuple((x[rows], w[columns]) for x, w in self.terms),
            bias=None if self.bias is None else self.bias[columns],
            options=dataclasses.replace(self.options, state=None),
        )

    def __mul__(self, factor: Any) -> DeferredLogits:
        return self._scale(factor, lambda a, b: a * b, "multiplication")

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> DeferredLogits:
        return self._scale(divisor, lambda a, b: a / b, "division")

    def __add__(self, other: Any) -> DeferredLogits:
        """Sum of two deferred projections, as in an adapter on the head."""
        if not isinstance(other, DeferredLogits) or self.cap is not None or other.cap is not None:
            self._refuse("addition")
        a, b = self._unscaled(), other._unscaled()
        if a.shape != b.shape:
            self._refuse(f"addition of {list(b.shape)} to {list(a.shape)}")
        biases = [bias for bias in (a.bias, b.bias) if bias is not None]
        return dataclasses.replace(
            a,
            terms=a.terms + b.terms,
            bias=sum(biases[1:], biases[0]) if biases else None,
            dtype=torch.promote_types(a.dtype, b.dtype),
        )

    def tanh(self) -> DeferredLogits:
        if self.cap is not None:
            self._refuse("a second tanh")
        return dataclasses.replace(self, cap=1.0)

    def logsumexp(self, dim: int = -1, keepdim: bool = False) -> Tensor:
        """Float32 log-sum-exp over the vocabulary, differentiable."""
        if dim % self.ndim != self.ndim - 1:
            self._refuse(f"logsumexp over dim {dim}")
        head = self.head()
        labels = torch.zeros(self.shape[:-1], dtype=torch.int64, device=self.device)
        lse = linear_cross_entropy(
            **head, targets=labels, reduction="none", return_lse=True, ignore_index=-100
        ).lse
        return lse.unsqueeze(-1) if keepdim else lse

    def cross_entropy(
        self,
        target: Tensor,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """`torch.nn.functional.cross_entropy` of these logits [N, V] or [V], in float32."""
        if size_average is not None or reduce is not None:
            self._refuse("cross_entropy with size_average or reduce")
        if target.is_floating_point() or self.ndim > 2:
            self._refuse(
                f"cross_entropy of logits {list(self.shape)} with {target.dtype} targets "
                f"{list(target.shape)}"
            )
        self.on_loss()
        return linear_cross_entropy(
            **self.head(),
            targets=target.to(self.device),
            ignore_index=ignore_index,
            reduction=reduction,
            weight=weight,
            label_smoothing=label_smoothing,
        )

    def head(self) -> dict[str, Any]:
        """Arguments of `linear_cross_entropy` that stand for these logits, without the targets.

        Several terms are joined along D, so that sum_k x_k W_k^T is one product; this copies the
        weights once.
        """
        for _, weight in self.terms:
            # again: it may have been resharded since the head ran
            check_weight(weight, self.options.owner)
        lead = self.terms[0][1]
        for _, weight in self.terms:
            lead = weight if weight.shape[1] > lead.shape[1] else lead
        pairs = [_like(x, w, lead) for x, w in self.terms]
        state = self.options.state
        if state is not None and state.order.device != lead.device:
            state.to(lead.device)  # the model was moved, or its head was offloaded before the loss
        scale = self.numerator / self.denominator
        if self.cap is not None:
            scale = self.numerator * self.cap / self.denominator
        return {
            "e": pairs[0][0] if len(pairs) == 1 else torch.cat([x for x, _ in pairs], dim=-1),
            "c": pairs[0][1] if len(pairs) == 1 else torch.cat([w for _, w in pairs], dim=-1),
            "bias": self.bias if self.bias is None or scale == 1.0 else self.bias * scale,
            "softcap": self.cap,
            "logit_scale": scale,
            "impl": self.options.impl,
            "filter_eps": self.options.filter_eps,
            "state": state,
        }

    def materialize(self) -> Tensor:
        """The logits themselves, [..., V]."""
        total = sum(F.linear(x.to(w.dtype), w).to(self.dtype) for x, w in self.terms)
        if self.bias is not None:
            total = total + self.bias.to(self.dtype)
        total = total * self.numerator / self.denominator
        return total if self.cap is None else torch.tanh(total) * self.cap

    def _map_hidden(self, change: Callable[[Tensor], Tensor]) -> DeferredLogits:
        return dataclasses.replace(self, terms=tuple((change(x), w) for x, w in self.terms))

    def _scale(self, factor: Any, apply: Callable[[Any, Any], Any], what: str) -> DeferredLogits:
        if isinstance(factor, Tensor):
            if factor.numel() != 1:
                self._refuse(f"{what} by a tensor {list(factor.shape)}")
            if self.cap is None:
                # the factor may be trained: it stays a tensor, on the side of the hidden states
                factor = factor.reshape(())
                scaled = self._map_hidden(lambda x: apply(x, factor.to(x.device)).to(x.dtype))
                bias = None if self.bias is None else apply(self.bias, factor)
                return dataclasses.replace(scaled, bias=bias)
            if factor.requires_grad:
                self._refuse(f"{what} by a trained tensor after a tanh")
            factor = factor.item()
        if isinstance(factor, bool) or not isinstance(factor, (int, float)):
            self._refuse(f"{what} by a {type(factor).__name__}")
        if self.cap is not None:
            return dataclasses.replace(self, cap=apply(self.cap, factor))
        if apply(1.0, 2.0) > 1.0:
            return dataclasses.replace(self, numerator=self.numerator * factor)
        return dataclasses.replace(self, denominator=self.denominator * factor)

    def _unscaled(self) -> DeferredLogits:
        scale = self.numerator / self.denominator
        if scale == 1.0:
            return self
        scaled = self._map_hidden(lambda x: x * scale)
        bias = None if self.bias is None else self.bias * scale
        return dataclasses.replace(scaled, bias=bias, numerator=1.0, denominator=1.0)

    def _refuse(self, what: str) -> None:
        raise DeferredLogitsError(_refusal(self.options.owner, what))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not hasattr(Tensor, name):
            raise AttributeError(name)
        raise AttributeError(_refusal(self.options.owner, f"Tensor.{name}"))

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        handler = _HANDLERS.get(func)
        if handler is not None:
            return handler(*args, **kwargs)
        owner = next(a for a in args if isinstance(a, cls)).options.owner
        raise DeferredLogitsError(_refusal(owner, getattr(func, "__name__", str(func))))


def _refusal(owner: str, what: str) -> str:
    return (
        f"{owner} or its head applies {what} to its logits, which has no fused form; "
        f"unpatch the model to train it with materialised logits"
    )


def _axes(item: Any) -> int:
    if item is None or item is Ellipsis:
        return 0
    if isinstance(item, Tensor) and item.dtype == torch.bool:
        return item.dim()
    return 1


def _like(hidden: Tensor, weight: Tensor, lead: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states on the head's device; both in the head's dtype unless autocast chooses it."""
    if torch.is_autocast_enabled(lead.device.type):
        return hidden.to(lead.device), weight.to(lead.device)
    return hidden.to(lead), weight.to(lead)


def check_weight(weight: Tensor, owner: str) -> None:
    """Raise unless `weight` is a tensor whose values can be read now, in a floating dtype."""
    sharded = type(weight).__name__ == "DTensor"
    if not weight.is_floating_point() or (is_traceable_wrapper_subclass(weight) and not sharded):
        raise TypeError(
            f"expected the head of {owner} to have a floating weight, got {weight.dtype} "
            f"({type(weight).__name__}); a quantised head has no fused loss, keep it unquantised"
        )
    if hasattr(weight, "ds_id") or weight.device.type == "meta":
        raise TypeError(
            f"expected the weight of the head of {owner} to be in memory during the loss, got a "
            f"partitioned or offloaded one; keep the head out of ZeRO-3 and of offloading"
        )
    if not sharded and weight.numel() and weight.untyped_storage().size() == 0:
        raise RuntimeError(
            f"expected the weight of the head of {owner} to be in memory during the loss, but it "
            f"was resharded; leave the head in the root FSDP unit"
        )


def _cross_entropy(input: DeferredLogits, target: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return input.cross_entropy(target, *args, **kwargs)


def _commute(operation: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda a, b: operation(a, b) if isinstance(a, DeferredLogits) else operation(b, a)


_multiply = _commute(DeferredLogits.__mul__)
_add = _commute(DeferredLogits.__add__)

_HANDLERS: dict[Any, Callable[..., Any]] = {
    F.cross_entropy: _cross_entropy,
    torch.tanh: DeferredLogits.tanh,
    F.tanh: DeferredLogits.tanh,
    torch.logsumexp: DeferredLogits.logsumexp,
    torch.reshape: DeferredLogits.reshape,
    torch.flatten: DeferredLogits.flatten,
    torch.mul: _multiply,
    Tensor.mul: _multiply,
    Tensor.__mul__: _multiply,
    Tensor.__rmul__: _multiply,
    torch.add: _add,
    Tensor.add: _add,
    Tensor.__add__: _add,
    Tensor.__radd__: _add,
    torch.div: DeferredLogits.__truediv__,
}
