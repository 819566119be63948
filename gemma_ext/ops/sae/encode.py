"""Encoders that go straight to sparse codes: no [N, F] tensor of pre-activations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gemma_ext.ops import _devices
from gemma_ext.ops.sae import inputs, op
from gemma_ext.ops.sae.codes import Codes, Encoding
from gemma_ext.ops.sae.impls import is_reference
from gemma_ext.reference import sae as reference

Aux = tuple[Tensor, int]


def encode_topk(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    k: int,
    scale: Tensor | None = None,
    by: str = "value",
    aux: Aux | None = None,
    sparse_grad: bool = False,
    impl: str = "auto",
) -> Encoding:
    """The k largest p = x . w + b of every token, best first; equal ones by the lower feature.

    What is compared is p * scale, or |p| * scale; what is returned is p, in float32 sums of the
    products, before any activation. A list of k is the beginning of a longer one (Multi-TopK).
    A token with a NaN lists its NaNs first; no other token is touched.

    Args:
        x: [..., D] float32, bfloat16 or float16, any strides.
        weight: [F, D] in the dtype of x, any strides.
        bias: [F]. A bias that is subtracted from x belongs here: b - W @ b_dec.
        k: 1 to F.
        scale: [F], norms of the decoder's rows; not differentiable.
        by: "value", or "magnitude" (AbsTopK).
        aux: (mask bool [F], k_aux): a second list, of the k_aux best among the features of the
            mask, by value. Behind the last of them, where there are fewer, entries do not count.
        sparse_grad: the gradient of weight as a sparse COO tensor of the features listed; not with
            impl="reference".
        impl: "auto", or "reference" for plain torch, which holds [N, F].

    Returns:
        Encoding with codes [N, k] and aux [N, k_aux]; both differentiable in x, weight and bias.

    Raises:
        ValueError, TypeError: an argument that does not fit.
    """
    if by not in ("value", "magnitude"):
        raise ValueError(f"expected by to be 'value' or 'magnitude', got {by!r}")
    e = _Encoder.enter(x, weight, bias, scale, aux, sparse_grad, impl, "sae_topk")
    inputs.check_count("k", k, e.features)
    magnitude = by == "magnitude"
    if e.reference:
        p = e.pre_activations()
        values, indices = reference.topk(p, reference.scores(p, scale, magnitude=magnitude), k)
        return Encoding(e.codes(values, indices), e.plain_aux(p))
    values, indices, *second = op.topk(
        e.x, e.weight, e.bias, e.scale, e.mask, k, e.k_aux, magnitude, sparse_grad=sparse_grad
    )
    return Encoding(e.codes(values, indices), e.aux_codes(*second))


def encode_group_max(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    groups: int,
    sparse_grad: bool = False,
    impl: str = "auto",
) -> Codes:
    """The largest p of each of `groups` runs of F / groups features: codes [N, groups].

    Arguments as of `encode_topk`; `groups` divides F.
    """
    e = _Encoder.enter(x, weight, bias, None, None, sparse_grad, impl, "sae_group_max")
    inputs.check_count("groups", groups, e.features)
    if e.features % groups:
        raise ValueError(f"expected groups to divide {e.features} features, got {groups}")
    if e.reference:
        return e.codes(*reference.group_max(e.pre_activations(), groups))
    return e.codes(*op.group_max(e.x, e.weight, e.bias, groups, sparse_grad=sparse_grad))


def encode_batch_topk(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    total: int,
    scale: Tensor | None = None,
    aux: Aux | None = None,
    sparse_grad: bool = False,
    impl: str = "auto",
) -> Encoding:
    """The `total` largest positive scores p * scale of all tokens together (BatchTopK).

    Exact; equal scores go by token, then by feature. Codes have room for `total` entries, of which
    offsets[N] count: fewer where fewer are positive. Those of a token ascend by feature. A token
    with NaN scores lists the first of them, ahead of every number.

    Arguments as of `encode_topk`; `total` is 0 to N * F.

    Returns:
        Encoding with codes [total] and min_positive, the smallest chosen score.
    """
    e = _Encoder.enter(x, weight, bias, scale, aux, sparse_grad, impl, "sae_batch_topk")
    inputs.check_count("total", total, e.x.shape[0] * e.features, least=0)
    if e.reference:
        p = e.pre_activations()
        found = reference.batch_topk(p, reference.scores(p, scale), total)
        values, indices, offsets, least = found
        return Encoding(e.codes(values, indices, offsets), e.plain_aux(p), least)
    values, indices, offsets, least, *second = op.batch_topk(
        e.x, e.weight, e.bias, e.scale, e.mask, total, e.k_aux, sparse_grad=sparse_grad
    )
    return Encoding(e.codes(values, indices, offsets), e.aux_codes(*second), least)


def encode_threshold(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    threshold: float | Tensor,
    scale: Tensor | None = None,
    inclusive: bool = False,
    margin: float | Tensor = 0.0,
    capacity: int | None = None,
    aux: Aux | None = None,
    sparse_grad: bool = False,
    impl: str = "auto",
) -> Encoding:
    """All entries with p * scale > threshold - margin, those of a token ascending by feature.

    ReLU has threshold 0. JumpReLU trains with margin = half the bandwidth, so that the window of
    its straight-through estimator is in the list. A token with NaN scores lists the first of them.

    Args:
        threshold, margin: numbers or [F]; not differentiable here.
        inclusive: >= in place of >.
        capacity: None for lists of the length that is needed, which waits for the device; or
            codes [N, capacity] with counts. A token with more entries raises where its count can
            be read without waiting, and has NaN values elsewhere; nothing is left out silently.

        The others as of `encode_topk`.

    Raises:
        ValueError, TypeError: an argument that does not fit; a token with more than `capacity`
            entries.
    """
    e = _Encoder.enter(x, weight, bias, scale, aux, sparse_grad, impl, "sae_threshold")
    limit = inputs.per_feature("threshold", threshold, weight)
    limit = limit - inputs.per_feature("margin", margin, weight)
    if capacity is not None:
        inputs.check_count("capacity", capacity, e.features)
    if e.reference:
        p = e.pre_activations()
        score = reference.scores(p, scale)
        values, indices, offsets = reference.threshold(p, score, limit, inclusive=inclusive)
        counts, second = offsets.diff(), e.plain_aux(p)
        if capacity is not None:
            values, indices = reference.padded(values, indices, offsets, capacity)
    else:
        room = -1 if capacity is None else capacity
        values, indices, offsets, counts, *found = op.threshold(
            e.x,
            e.weight,
            e.bias,
            e.scale,
            limit.float(),
            e.mask,
            inclusive,
            room,
            e.k_aux,
            sparse_grad=sparse_grad,
        )
        second = e.aux_codes(*found)
    if capacity is None:
        return Encoding(e.codes(values, indices, offsets), second)
    _check_room(counts, capacity)
    return Encoding(e.codes(values, indices, counts=counts.clamp(max=capacity)), second)


def _check_room(counts: Tensor, capacity: int) -> None:
    if torch.compiler.is_compiling() or not _devices.has_values(counts):
        return
    if not _devices.is_readable(counts) or counts.numel() == 0:
        return
    most, at = counts.max(0)
    if most > capacity:
        raise ValueError(
            f"expected at most {capacity} entries a token by capacity, "
            f"got {int(most)} in token {int(at)}"
        )


@dataclass(frozen=True)
class _Encoder:
    """The arguments that every encoder has, checked: x [N, D]."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    scale: Tensor | None
    mask: Tensor | None
    k_aux: int
    shape: torch.Size
    reference: bool

    @classmethod
    def enter(
        cls,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: Tensor | None,
        aux: Aux | None,
        sparse_grad: bool,
        impl: str,
        name: str,
    ) -> _Encoder:
        inputs.check_encoder(x, weight, bias, scale, reference=impl == "reference")
        plain = is_reference(impl, x.device, name)
        if plain and sparse_grad:
            raise ValueError("expected sparse_grad to be False with impl='reference', got True")
        mask, k_aux = inputs.check_aux(aux, weight)
        x, weight, bias = inputs.to_autocast(x, weight, bias)
        shape = x.shape[:-1]
        flat = x.reshape(shape.numel(), x.shape[-1])
        return cls(flat, weight, bias, scale, mask, k_aux, shape, plain)

    @property
    def features(self) -> int:
        return self.weight.shape[0]

    def pre_activations(self) -> Tensor:
        return reference.pre_activations(self.x, self.weight, self.bias)

    def codes(
        self,
        values: Tensor,
        indices: Tensor,
        offsets: Tensor | None = None,
        counts: Tensor | None = None,
    ) -> Codes:
        return Codes(values, indices, offsets, self.shape, self.features, counts)

    def plain_aux(self, p: Tensor) -> Codes | None:
        if self.mask is None:
            return None
        score = reference.scores(p, self.scale)
        return self.aux_codes(*reference.masked_topk(p, score, self.mask, self.k_aux))

    def aux_codes(self, values: Tensor, indices: Tensor) -> Codes | None:
        if self.mask is None:
            return None
        counts = self.mask.sum().clamp(max=self.k_aux).expand(self.x.shape[0])
        return self.codes(values, indices, counts=counts)
