"""Sums over the lists of active latents."""

from __future__ import annotations

import torch
from torch import Tensor

from gemma_ext.ops.sae import Codes


def row_sums(codes: Codes, values: Tensor) -> Tensor:
    """Sum of `values` (shaped as codes.values) over the entries of every token, [N]."""
    if codes.offsets is None:
        return values.sum(-1)
    # entries behind the last offset belong to no token
    return torch.segment_reduce(values, "sum", offsets=codes.offsets, unsafe=True, initial=0)


def of_latents(codes: Codes, per_latent: Tensor) -> Tensor:
    """`per_latent` [F] at the entries of the lists, shaped as codes.values."""
    return per_latent[codes.indices.long()]
