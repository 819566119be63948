"""Errors of nested reconstructions: prefixes of a dictionary, or of a token's own list."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gemma_ext.ops.sae import decode_inputs as inputs
from gemma_ext.ops.sae import decode_nested_op as op
from gemma_ext.ops.sae.codes import Codes
from gemma_ext.ops.sae.impls import is_reference
from gemma_ext.reference import sae_products as formulas


def nested_errors(
    codes: Codes,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    widths: Sequence[int] | None = None,
    by: str | None = None,
    unit_norm: bool = False,
    impl: str = "auto",
) -> Tensor:
    """|x^_m - target|^2 of every prefix m, x^_m = bias + the entries of levels up to m.

    One pass over the rows of `weight` forward and one backward, whatever the number of levels: an
    entry's gradient is that of the suffix sum s_j = sum_{m >= j} 2 w_m (x^_m - target)
    (sae-kernels 2.1). Differentiable once in codes.values, weight, bias and target.

    Args:
        codes, weight, bias, unit_norm, impl: as `decode`.
        target: [*shape, D].
        widths: ascending widths of a Matryoshka dictionary: level m holds the features below
            widths[m]; features from the last width on are in no level.
        by: "rank" in place of widths: level m holds the first m + 1 entries of a token's list
            (HierarchicalTopK), which has to be [N, K].

    Returns:
        float32 [*shape, levels]; levels is len(widths) or K.

    Raises:
        ValueError, TypeError: as `decode`, and levels that do not fit.
    """
    reference = is_reference(impl, inputs.device_of(codes), "sae_nested")
    inputs.check_dictionary(codes, weight, bias, reference)
    inputs.check_rows("target", target, codes, weight.shape[1], reference)
    if (widths is None) == (by is None):
        raise ValueError(f"expected either widths or by='rank', got {widths!r} and {by!r}")
    widths = _checked(codes, by) if widths is None else _ascending(widths, codes.features)
    rows = target.reshape(-1, target.shape[-1])
    count = len(widths) if by is None else codes.values.shape[1]
    if not reference:
        squared = op.nested(codes, weight, bias, rows, widths, unit_norm)
    else:
        dtype = inputs.accumulation(codes.values, weight)
        entries = inputs.flat(codes, dtype)
        squared = formulas.nested_errors(
            *entries,
            _levels(codes, widths, by).reshape(-1),
            inputs.with_gradient(codes, weight, unit_norm, False).to(dtype),
            None if bias is None else bias.to(dtype),
            rows.to(dtype),
            count,
        )
    return squared.reshape(*codes.shape, count)


def _checked(codes: Codes, by: str | None) -> list[int]:
    if by != "rank":
        raise ValueError(f"expected by to be 'rank', got {by!r}")
    if codes.offsets is not None:
        raise ValueError("expected codes [N, K] with by='rank', got rows of any length")
    return []


def _ascending(widths: Sequence[int], features: int) -> list[int]:
    widths = [int(w) for w in widths]
    edges = [0, *widths, features]
    if not widths or any(a >= b for a, b in zip(edges[:-2], widths, strict=True)):
        raise ValueError(f"expected widths to ascend from above 0, got {widths}")
    if widths[-1] > features:
        raise ValueError(f"expected widths up to {features}, got {widths[-1]}")
    return widths


def _levels(codes: Codes, widths: list[int], by: str | None) -> Tensor:
    """int64 of the shape of the values: the first level that holds an entry."""
    if by == "rank":
        k = codes.values.shape[1]
        return torch.arange(k, device=codes.values.device).expand(codes.values.shape)
    edges = torch.tensor(widths, device=codes.values.device)
    return torch.searchsorted(edges, codes.indices.long(), right=True)
