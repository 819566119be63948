"""Reconstructions from sparse codes, and their errors."""

from __future__ import annotations

from torch import Tensor

from gemma_ext.ops.sae import decode_inputs as inputs
from gemma_ext.ops.sae import decode_op as op
from gemma_ext.ops.sae.codes import Codes
from gemma_ext.ops.sae.impls import is_reference
from gemma_ext.reference import sae_products as formulas


def decode(
    codes: Codes,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    unit_norm: bool = False,
    sparse_grad: bool = False,
    impl: str = "auto",
) -> Tensor:
    """out_n = bias + sum_j v_nj weight[i_nj], in float32, added in the order of the list.

    Costs N K D multiply-adds and no memory beside the result; a token without entries is the bias
    exactly, and repeated indices add. Differentiable once in codes.values, weight and bias: the
    gradient of a value is <g_n, weight[i]>, also where the value is 0 (a ReLU's mask is its
    caller's). Sums over tokens have a fixed order: results are the same bits in every run and on
    any number of threads.

    Args:
        codes: of tokens [*shape] over F features.
        weight: [F, D], float32, bfloat16 or float16; a transposed view is copied.
        bias: [D].
        unit_norm: the gradient of `weight` leaves out what is parallel to each row
            (sae-kernels 5a), as rows that are kept at norm 1 want it.
        sparse_grad: the gradient of `weight` is sparse COO of the rows that codes name; on a GPU
            its size is waited for.
        impl: "auto", or "reference" for plain torch, which holds [N, K, D].

    Returns:
        [*shape, D] in the dtype of `weight`.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit; RuntimeError by the kernel for
            indices and offsets out of range.

    Example:
        >>> codes = encode_topk(x, encoder, encoder_bias, k=64).codes  # x [B, T, D]
        >>> decode(codes.with_values(codes.values.relu()), decoder, bias)  # [B, T, D]
    """
    reference = is_reference(impl, inputs.device_of(codes), "sae_decode")
    inputs.check_dictionary(codes, weight, bias, reference)
    if not reference:
        out = op.decode(codes, weight, bias, unit_norm, sparse_grad)
    else:
        out = _plain(codes, weight, bias, unit_norm, sparse_grad).to(weight.dtype)
    return out.reshape(*codes.shape, weight.shape[1])


def decode_error(
    codes: Codes,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    unit_norm: bool = False,
    sparse_grad: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """What a reconstruction leaves of `target`, and its square, without the reconstruction.

    residual = target - decode(codes, weight, bias), squared = sum_D residual^2 before rounding.
    Differentiable once through both, in codes.values, weight, bias and target.

    Args:
        target: [*shape, D], of any of the three dtypes.
        codes, weight, bias, unit_norm, sparse_grad, impl: as `decode`.

    Returns:
        (residual [*shape, D] in the dtype of `weight`, squared float32 [*shape]).

    Raises:
        ValueError, TypeError: as `decode`.
    """
    reference = is_reference(impl, inputs.device_of(codes), "sae_decode_error")
    inputs.check_dictionary(codes, weight, bias, reference)
    inputs.check_rows("target", target, codes, weight.shape[1], reference)
    rows = target.reshape(-1, target.shape[-1])
    if not reference:
        residual, squared = op.decode_error(codes, weight, bias, rows, unit_norm, sparse_grad)
    else:
        error = rows - _plain(codes, weight, bias, unit_norm, sparse_grad)
        residual, squared = error.to(weight.dtype), error.square().sum(-1)
    return residual.reshape(target.shape), squared.reshape(codes.shape)


def _plain(
    codes: Codes, weight: Tensor, bias: Tensor | None, unit_norm: bool, sparse_grad: bool
) -> Tensor:
    dtype = inputs.accumulation(codes.values, weight)
    values, rows, indices = inputs.flat(codes, dtype)
    weight = inputs.with_gradient(codes, weight, unit_norm, sparse_grad).to(dtype)
    bias = None if bias is None else bias.to(dtype)
    return formulas.decode(values, rows, indices, weight, bias, codes.tokens)
