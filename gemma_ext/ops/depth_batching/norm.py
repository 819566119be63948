"""Rows of the hidden bank and their RMS norms, in one pass."""

from __future__ import annotations

from torch import Tensor

from gemma_ext.ops.depth_batching import linear_op
from gemma_ext.ops.depth_batching.inputs import check_like, check_shape, is_reference
from gemma_ext.ops.depth_batching.linear_inputs import check_index, check_storage
from gemma_ext.reference import depth_batching_linear as formulas


def gather_rms_norm(
    bank: Tensor,
    slots: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-6,
    plus_one: bool = False,
    impl: str = "auto",
) -> Tensor:
    """bank[s] / sqrt(mean bank[s]^2 + eps) * weight for the slots s of n rows, rounded once.

    Args:
        bank: [S, D] float32, bfloat16 or float16: the hidden bank.
        slots: int32 [n]; a negative one gives a row of zeros.
        weight: [D]; the norm has its dtype.
        eps: under the root.
        plus_one: 1 + weight in place of weight, as Gemma has it.
        impl: "auto", or "reference" for plain torch, which also takes float64.

    Returns:
        [n, D] in the dtype of `weight`.

    Raises:
        ValueError, TypeError: what does not fit; on the CPU also a slot of S or more.
    """
    reference = is_reference(impl, bank, "depth_gather_rms_norm")
    _check_bank(bank, slots, weight, reference=reference)
    if reference:
        return formulas.gather_rms_norm(bank, slots, weight, eps, plus_one=plus_one)
    return linear_op.gather_rms_norm(bank, slots, weight, eps, plus_one)


def scatter_rms_norm(
    bank: Tensor,
    slots: Tensor,
    y: Tensor,
    weight: Tensor | None = None,
    *,
    next_weight: Tensor | None = None,
    eps: float = 1e-6,
    plus_one: bool = False,
    impl: str = "auto",
) -> Tensor | None:
    """bank[s] += norm(y), in place, for the slots s of n rows; one rounding.

    Args:
        bank: [S, D], changed in place.
        slots: int32 [n], all different; rows of a negative one are left out.
        y: [n, D] of any of the three dtypes.
        weight: [D] of the norm of y, the post-norm of Gemma 2 and 3; without it y itself is added.
        next_weight: [D] of a norm of what bank[s] is then, the next layer's input norm.
        eps, plus_one: of both norms, as `gather_rms_norm` has them.
        impl: "auto", or "reference" for plain torch, which also takes float64.

    Returns:
        With `next_weight` the norm [n, D] in its dtype, the bits that `gather_rms_norm` would give;
        else None.

    Raises:
        ValueError, TypeError: what does not fit; on the CPU also a slot of S or more, or one that
            two rows share.
    """
    reference = is_reference(impl, bank, "depth_scatter_rms_norm")
    _check_bank(bank, slots, next_weight, name="next_weight", reference=reference)
    if not bank.is_contiguous():
        raise ValueError("expected bank to be contiguous: it is written in place")
    check_shape("y", y, (slots.shape[0], bank.shape[1]))
    check_like("y", y, bank, dtype=False)
    check_storage("y", y, reference=reference)
    if weight is not None:
        _check_weight("weight", weight, bank, reference=reference)
    if reference:
        return formulas.scatter_rms_norm(
            bank, slots, y, weight, next_weight, eps, plus_one=plus_one
        )
    found = linear_op.scatter_rms_norm(bank, slots, y, weight, next_weight, eps, plus_one)
    return None if next_weight is None else found


def _check_bank(
    bank: Tensor, slots: Tensor, weight: Tensor | None, name: str = "weight", *, reference: bool
) -> None:
    check_shape("bank", bank, ("S", "D"))
    check_storage("bank", bank, reference=reference)
    check_index("slots", slots, slots.shape[0] if slots.dim() else 0, bank)
    if weight is not None:
        _check_weight(name, weight, bank, reference=reference)


def _check_weight(name: str, weight: Tensor, bank: Tensor, *, reference: bool) -> None:
    check_shape(name, weight, (bank.shape[1],))
    check_like(name, weight, bank, dtype=False)
    check_storage(name, weight, reference=reference)
