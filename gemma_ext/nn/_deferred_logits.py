"""Logits that are described, not computed.

Under `gemma_ext.nn._defer_head`, a head returns a `DeferredLogits` instead of a tensor:

    logits = scale * (sum_k x_k W_k^T + b)                      before a cap
    logits = cap * tanh(scale * (sum_k x_k W_k^T + b))          after one

The model's own code then scales, shifts, caps, casts, slices and reshapes that description, and the
cross-entropy it ends in becomes `gemma_ext.linear_cross_entropy` of (x, W). Nothing is assumed
about what a model does between head and loss: an operation that has no place in the two forms above
raises `DeferredLogitsError` with its name, so a loss is either the model's own or an error.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from gemma_ext.nn._head_checks import check_weight
from gemma_ext.ops.cce import linear_cross_entropy

OF_THE_HEAD = ("e", "c", "bias", "softcap", "logit_scale")
"""What of `DeferredLogits.head` stands for the logits; the rest is how a loss is computed."""


class DeferredLogitsError(NotImplementedError):
    """A model or its head does something to its logits that cannot be deferred."""


class _MissingAttribute(DeferredLogitsError, AttributeError):
    """The same for an attribute, so that `hasattr` and `getattr` with a default go on."""


@dataclasses.dataclass(frozen=True)
class LossOptions:
    """How a deferred cross-entropy is computed.

    Attributes:
        owner: class name of the model, for messages.
        impl, filter_eps, memory: as in `gemma_ext.linear_cross_entropy`.
        remedy: what to do about a refusal, for messages.
    """

    owner: str
    impl: str = "auto"
    filter_eps: float | str | None = "auto"
    memory: str = "default"
    remedy: str = "unpatch the model to train it with materialised logits"


class Product(NamedTuple):
    """hidden [..., D] times weight [V, D], computed in `dtype` as autocast had it at the head."""

    hidden: Tensor
    weight: Tensor
    dtype: torch.dtype


@dataclasses.dataclass(frozen=True, eq=False)
class DeferredLogits:
    """Stand-in for the [..., V] logits of a head; see the module for the formula.

    Attributes:
        terms: products whose sum is taken, of equal [..., V].
        bias: [V] or None.
        numerator, denominator: scale = numerator / denominator, kept apart so that dividing by a
            cap and multiplying by it again gives back exactly 1.
        cap: multiplier of the tanh, None before a tanh.
        dtype: what the materialised logits would have.
        options: of the loss; on_loss: called when a loss was computed from these logits.
    """

    terms: tuple[Product, ...]
    bias: Tensor | None
    dtype: torch.dtype
    options: LossOptions
    on_loss: Callable[[], None]
    numerator: float = 1.0
    denominator: float = 1.0
    cap: float | None = None

    @property
    def vocab(self) -> int:
        return self.terms[0].weight.shape[0]

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.terms[0].hidden.shape[:-1], self.vocab))

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def device(self) -> torch.device:
        return self.terms[0].weight.device

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
            terms=tuple(Product(x[rows], w[columns], dtype) for x, w, dtype in self.terms),
            bias=None if self.bias is None else self.bias[columns],
        )

    def __len__(self) -> int:
        return self.shape[0]

    def __mul__(self, other: Any) -> DeferredLogits:
        return self._scale(other, lambda a, b: a * b, "multiplication")

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> DeferredLogits:
        return self._scale(other, lambda a, b: a / b, "division")

    def __add__(self, other: Any) -> DeferredLogits:
        """Sum of two deferred projections, as in an adapter, or with a bias [V] or [1, ..., V]."""
        if self.cap is None and isinstance(other, DeferredLogits) and other.cap is None:
            return self._unscaled()._join(other._unscaled())
        if self.cap is None and isinstance(other, Tensor) and self._is_bias(other):
            return self._unscaled()._shift(other)
        shape = list(other.shape) if isinstance(other, (Tensor, DeferredLogits)) else None
        self._refuse(f"addition of {shape or type(other).__name__} to {list(self.shape)}")

    __radd__ = __add__

    def tanh(self) -> DeferredLogits:
        if self.cap is not None:
            self._refuse("a second tanh")
        return dataclasses.replace(self, cap=1.0)

    def logsumexp(self, dim: int = -1, keepdim: bool = False) -> Tensor:
        """Float32 log-sum-exp over the vocabulary, differentiable."""
        if dim % self.ndim != self.ndim - 1:
            self._refuse(f"logsumexp over dim {dim}")
        labels = torch.zeros(self.shape[:-1], dtype=torch.int64, device=self.device)
        with self.autocast_of_the_head():
            lse = linear_cross_entropy(
                **self.head(), targets=labels, reduction="none", return_lse=True, ignore_index=-100
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
        with self.autocast_of_the_head():
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
        lead = self.terms[0]
        for term in self.terms:
            # again: it may have been resharded since the head ran
            check_weight(term.weight, self.options.owner)
            lead = term if term.weight.shape[1] > lead.weight.shape[1] else lead
        # hidden states come to the head's device
        pairs = [
            (x.to(lead.weight.device, lead.dtype), w.to(lead.weight.device, lead.dtype))
            for x, w, _ in self.terms
        ]
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
            "memory": self.options.memory,
        }

    def autocast_of_the_head(self) -> torch.autocast:
        """A block without autocast: `head` has cast as autocast did where the head was called."""
        return torch.autocast(self.device.type, enabled=False)

    def of_hidden(self, hidden: Tensor) -> DeferredLogits:
        """What the same head would make of other hidden states [..., D]."""
        return self._map_hidden(lambda _: hidden)

    def in_float32(self) -> DeferredLogits:
        """The same logits with products of float32 hidden states and weights."""
        terms = tuple(term._replace(dtype=torch.float32) for term in self.terms)
        return dataclasses.replace(self, terms=terms, dtype=torch.float32)

    def materialize(self) -> Tensor:
        """The logits themselves, [..., V]."""
        with self.autocast_of_the_head():
            total = sum(F.linear(x.to(d), w.to(d)).to(self.dtype) for x, w, d in self.terms)
        if self.bias is not None:
            total = total + self.bias.to(self.dtype)
        total = total * self.numerator / self.denominator
        return total if self.cap is None else torch.tanh(total) * self.cap

    def _map_hidden(self, change: Callable[[Tensor], Tensor]) -> DeferredLogits:
        terms = tuple(term._replace(hidden=change(term.hidden)) for term in self.terms)
        return dataclasses.replace(self, terms=terms)

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

    def _join(self, other: DeferredLogits) -> DeferredLogits:
        if self.shape != other.shape:
            self._refuse(f"addition of {list(other.shape)} to {list(self.shape)}")
        biases = [bias for bias in (self.bias, other.bias) if bias is not None]
        return dataclasses.replace(
            self,
            terms=self.terms + other.terms,
            bias=sum(biases[1:], biases[0]) if biases else None,
            dtype=torch.promote_types(self.dtype, other.dtype),
        )

    def _is_bias(self, other: Tensor) -> bool:
        """Whether `other` adds the same number to one column of every row."""
        fits = 1 <= other.dim() <= self.ndim and other.shape[-1] == self.vocab == other.numel()
        return fits and other.is_floating_point()

    def _shift(self, row: Tensor) -> DeferredLogits:
        bias = row.reshape(-1).to(self.device)
        return dataclasses.replace(
            self,
            bias=bias if self.bias is None else self.bias + bias,
            dtype=torch.promote_types(self.dtype, row.dtype),
        )

    def _refuse(self, what: str) -> NoReturn:
        raise DeferredLogitsError(refusal(self.options, what))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not hasattr(Tensor, name):
            raise AttributeError(name)
        raise _MissingAttribute(refusal(self.options, f"Tensor.{name}"))

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        named = dict(kwargs or {})
        operands = (named.pop("input"), *args) if "input" in named else tuple(args)
        logits = _first((*operands, *named.values()))
        if func in _COMMUTATIVE and operands[0] is not logits:
            operands = operands[::-1]
        handler = _HANDLERS.get(func)
        name = getattr(func, "__name__", str(func))
        if handler is None or not isinstance(next(iter(operands), None), cls):
            logits._refuse(name)
        unknown = [key for key in named if key not in _KEYWORDS[func]]
        if unknown:
            logits._refuse(f"{name} with {', '.join(unknown)}")
        return handler(*operands, **named)


def refusal(options: LossOptions, what: str) -> str:
    """The one sentence that every refused operation raises."""
    return (
        f"{options.owner} or its head applies {what} to its logits, which has no fused form; "
        f"{options.remedy}"
    )


def _axes(item: Any) -> int:
    if item is None or item is Ellipsis:
        return 0
    if isinstance(item, Tensor) and item.dtype == torch.bool:
        return item.dim()
    return 1


def _first(values: Any) -> DeferredLogits | None:
    """The first deferred logits among arguments, looking into lists as those of `torch.cat`."""
    for value in values:
        if isinstance(value, DeferredLogits):
            return value
        if isinstance(value, (list, tuple)) and (found := _first(value)) is not None:
            return found
    return None


_HANDLERS: dict[Any, Callable[..., Any]] = {
    F.cross_entropy: DeferredLogits.cross_entropy,
    torch.tanh: DeferredLogits.tanh,
    F.tanh: DeferredLogits.tanh,
    torch.logsumexp: DeferredLogits.logsumexp,
    torch.reshape: DeferredLogits.reshape,
    torch.flatten: DeferredLogits.flatten,
    torch.mul: DeferredLogits.__mul__,
    torch.multiply: DeferredLogits.__mul__,
    Tensor.mul: DeferredLogits.__mul__,
    Tensor.__mul__: DeferredLogits.__mul__,
    Tensor.__rmul__: DeferredLogits.__mul__,
    torch.add: DeferredLogits.__add__,
    Tensor.add: DeferredLogits.__add__,
    Tensor.__add__: DeferredLogits.__add__,
    Tensor.__radd__: DeferredLogits.__add__,
    torch.div: DeferredLogits.__truediv__,
    torch.divide: DeferredLogits.__truediv__,
    torch.true_divide: DeferredLogits.__truediv__,
}
_COMMUTATIVE = frozenset(
    func
    for func, handler in _HANDLERS.items()
    if handler in (DeferredLogits.__mul__, DeferredLogits.__add__)
)
_KEYWORDS = {func: frozenset(inspect.signature(h).parameters) for func, h in _HANDLERS.items()}

_REFUSED = {
    "subtraction": ("__sub__", "__rsub__"),
    "negation": ("__neg__",),
    "an absolute value": ("__abs__",),
    "a reciprocal": ("__rtruediv__",),
    "floor division": ("__floordiv__", "__rfloordiv__"),
    "a remainder": ("__mod__", "__rmod__", "__divmod__", "__rdivmod__"),
    "a power": ("__pow__", "__rpow__"),
    "a matrix product": ("__matmul__", "__rmatmul__"),
    "a comparison": ("__lt__", "__le__", "__eq__", "__ne__", "__gt__", "__ge__", "__contains__"),
    "a bitwise operation": (
        *("__and__", "__rand__", "__or__", "__ror__", "__xor__", "__rxor__", "__invert__"),
        *("__lshift__", "__rlshift__", "__rshift__", "__rrshift__"),
    ),
    "item assignment": ("__setitem__", "__delitem__"),
    "conversion to a number": ("__bool__", "__int__", "__float__", "__complex__", "__index__"),
    "conversion to an array": ("__array__", "__dlpack__"),
    "rounding": ("__round__", "__trunc__", "__floor__", "__ceil__"),
}


def _refusing(what: str) -> Callable[..., NoReturn]:
    def operator(self: DeferredLogits, *args: Any, **kwargs: Any) -> NoReturn:
        self._refuse(what)

    return operator


def _method(func: Callable[..., Any]) -> Callable[..., DeferredLogits]:
    def method(self: DeferredLogits, *args: Any, **kwargs: Any) -> DeferredLogits:
        return self.__torch_function__(func, (), (self, *args), kwargs)

    return method


for _what, _names in _REFUSED.items():
    for _name in _names:
        setattr(DeferredLogits, _name, _refusing(_what))
for _func in (torch.mul, torch.multiply, torch.div, torch.divide, torch.true_divide, torch.add):
    setattr(DeferredLogits, _func.__name__, _method(_func))
# else numpy would multiply the rows one by one
DeferredLogits.__array_ufunc__ = None
