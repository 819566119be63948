"""The two other products of sparse codes with rows: dots, and the transpose."""

from __future__ import annotations

import torch
from torch import Tensor

from gemma_ext.ops.sae import decode_inputs as inputs
from gemma_ext.ops.sae import decode_op as op
from gemma_ext.ops.sae.codes import Codes
from gemma_ext.ops.sae.impls import is_reference
from gemma_ext.reference import sae_products as formulas


def dots(codes: Codes, weight: Tensor, rows: Tensor, *, impl: str = "auto") -> Tensor:
    """<rows_n, weight[i_nj]> of every entry, its value left out; no gradient.

    Args:
        codes: of tokens [*shape] over F features.
        weight: [F, D].
        rows: [*shape, D].
        impl: "auto", or "reference" for plain torch, which holds [N, K, D].

    Returns:
        float32 of the shape of codes.values; 0 for entries of nobody.

    Raises:
        ValueError, TypeError: as `decode`.
    """
    reference = is_reference(impl, inputs.device_of(codes), "sae_decode_backward")
    inputs.check_dictionary(codes, weight, None, reference)
    inputs.check_rows("rows", rows, codes, weight.shape[1], reference)
    rows = rows.detach().reshape(-1, rows.shape[-1])
    codes, weight = codes.with_values(codes.values.detach()), weight.detach()
    if not reference:
        return op.dots(codes, weight, rows)
    dtype = inputs.accumulation(codes.values, weight)
    values, tokens, indices = inputs.flat(codes, dtype)
    found = formulas.dots(values, tokens, indices, weight.to(dtype), rows.to(dtype))
    return found.reshape(codes.values.shape)


def scatter(codes: Codes, rows: Tensor, *, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """f^T g: sum_n f_ni rows_n of every feature, and sum_n f_ni; no gradient.

    The transpose of `decode`, in float32 and an order fixed by the codes. [F, D] is allocated;
    with rows of width 0 only the sums over tokens are.

    Args:
        codes: of tokens [*shape] over F features.
        rows: [*shape, D].
        impl: "auto", or "reference" for plain torch, which holds [N, K, D].

    Returns:
        (float32 [F, D], float32 [F]).

    Raises:
        ValueError, TypeError: as `decode`.
    """
    reference = is_reference(impl, inputs.device_of(codes), "sae_scatter")
    inputs.check_rows("rows", rows, codes, None, reference)
    rows = rows.detach().reshape(codes.tokens, rows.shape[-1])
    detached = codes.with_values(codes.values.detach())
    if not reference:
        return op.scatter(detached, rows)
    dtype = inputs.accumulation(codes.values, rows)
    entries = inputs.flat(detached, dtype)
    with torch.no_grad():
        return formulas.scatter(*entries, rows.to(dtype), codes.features)
