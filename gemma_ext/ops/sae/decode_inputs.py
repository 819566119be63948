"""Codes, dictionaries and rows checked, and taken apart for the formulas in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from gemma_ext.ops.sae.codes import Codes
from gemma_ext.reference.sae_products import ProjectGradient, RowSparseGradient

STORAGE = (torch.float32, torch.bfloat16, torch.float16)


def device_of(codes: Codes) -> torch.device:
    """Where the lists are; a TypeError for anything but Codes."""
    if not isinstance(codes, Codes):
        raise TypeError(
            f"expected codes to be Codes, as an encoder's .codes, got {type(codes).__name__}"
        )
    return codes.indices.device


def check_dictionary(codes: Codes, weight: Tensor, bias: Tensor | None, reference: bool) -> None:
    """weight [F, D] and bias [D] that fit the codes."""
    if weight.dim() != 2 or weight.shape[0] != codes.features:
        raise ValueError(f"expected weight to be [{codes.features}, D], got {list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[1:]:
        raise ValueError(f"expected bias to be [{weight.shape[1]}], got {list(bias.shape)}")
    check_tensors({"weight": weight, "bias": bias}, codes, reference)


def check_rows(name: str, x: Tensor, codes: Codes, width: int | None, reference: bool) -> None:
    """x [*shape, D] of the tokens of the codes."""
    if x.dim() < 1 or x.shape[:-1] != codes.shape or width not in (None, x.shape[-1]):
        expected = [*codes.shape, "D" if width is None else width]
        raise ValueError(
            f"expected {name} to be [{', '.join(map(str, expected))}], got {list(x.shape)}"
        )
    check_tensors({name: x}, codes, reference)


def check_tensors(named: dict[str, Tensor | None], codes: Codes, reference: bool) -> None:
    allowed = (*STORAGE, torch.float64) if reference else STORAGE
    for name, x in {"codes.values": codes.values, **named}.items():
        if x is None:
            continue
        if x.dtype not in allowed:
            raise TypeError(f"expected {name} to be float32, bfloat16 or float16, got {x.dtype}")
        if x.device != codes.indices.device:
            raise ValueError(
                f"expected {name} on {codes.indices.device} like the codes, got it on {x.device}"
            )
    if not reference and codes.values.dtype != torch.float32:
        raise TypeError(f"expected codes.values to be float32, got {codes.values.dtype}")


def accumulation(*tensors: Tensor | None) -> torch.dtype:
    wide = any(x is not None and x.dtype == torch.float64 for x in tensors)
    return torch.float64 if wide else torch.float32


def flat(codes: Codes, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(values, rows, indices) [E] for the formulas; row N where an entry does not count."""
    rows = torch.where(codes.mask, codes.rows(), codes.tokens)
    return (
        codes.values.reshape(-1).to(dtype),
        rows.reshape(-1),
        codes.indices.reshape(-1).long(),
    )


def with_gradient(codes: Codes, weight: Tensor, unit_norm: bool, sparse_grad: bool) -> Tensor:
    """`weight`, whose gradient is projected, or of the touched rows alone."""
    if sparse_grad:
        touched = codes.indices[codes.mask].long().unique()
        weight = RowSparseGradient.apply(weight, touched)
    return ProjectGradient.apply(weight) if unit_norm else weight
