"""Dictionaries by the name of their activation."""

from __future__ import annotations

from collections.abc import Callable

import torch

from gemma_ext.nn.sparse_autoencoder import (
    AbsTopK,
    Activation,
    BatchTopK,
    Gated,
    GroupMax,
    JumpReLU,
    ReLU,
    SparseAutoencoder,
    TopK,
)

_SMALL = 0.1  # norm of decoder rows at the start, where their norm is free: SAELens

ACTIVATIONS: dict[str, Callable[[float], Activation]] = {
    "relu": lambda k: ReLU(),
    "topk": lambda k: TopK(int(k)),
    "abstopk": lambda k: AbsTopK(int(k)),
    "groupmax": lambda k: GroupMax(int(k)),
    "batchtopk": BatchTopK,
    "jumprelu": lambda k: JumpReLU(),
    "gated": lambda k: Gated(),
}
_BY_RANK = ("topk", "abstopk", "groupmax", "batchtopk")


def new_dictionary(
    width: int, features: int, activation: str, k: float, *, seed: int = 0
) -> SparseAutoencoder:
    """A dictionary as it is usual for its activation.

    Selection by rank keeps decoder rows at norm 1; the others leave the norms free, and their
    sparsity terms count them. Inputs are scaled to a mean norm of sqrt(D), which is folded when the
    dictionary is saved.

    Raises:
        ValueError: no such activation.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}"
        )
    by_rank = activation in _BY_RANK
    sae = SparseAutoencoder(
        width, features, ACTIVATIONS[activation](k), unit_norm=by_rank, standardise="affine"
    )
    generator = torch.Generator().manual_seed(seed)
    sae.reset_parameters(generator, norm=1.0 if by_rank else _SMALL)
    return sae
