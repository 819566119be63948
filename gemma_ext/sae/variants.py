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
_CROSSCODERS = ("relu", "batchtopk")
_BY_RANK = ("topk", "abstopk", "groupmax", "batchtopk")


def new_dictionary(
    width: int, features: int, activation: str, k: float, *, sources: int = 1, seed: int = 0
) -> SparseAutoencoder:
    """A dictionary as it is usual for its activation.

    Selection by rank keeps decoder rows at norm 1; the others leave the norms free, and their
    sparsity terms count them. Inputs are scaled to a mean norm of sqrt(D), which is folded when the
    dictionary is saved. A crosscoder of several sources leaves the norms free in any case: they are
    its result; it chooses by p times their sum.

    Args:
        width: D. features: F.
        activation: one of `ACTIVATIONS`.
        k: active latents of a token, where they are chosen.
        sources: models of a crosscoder. seed: of the decoder's rows.

    Raises:
        ValueError: no such activation, or one that crosscoders are not trained with.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}"
        )
    if sources > 1 and activation not in _CROSSCODERS:
        raise ValueError(
            f"activation: expected one of {', '.join(_CROSSCODERS)} for {sources} models, "
            f"got {activation!r}"
        )
    by_rank = activation in _BY_RANK
    several = {"sources": sources, "subtract_bias": False, "score_norm": "sum"}
    sae = SparseAutoencoder(
        width,
        features,
        ACTIVATIONS[activation](k),
        standardise="affine",
        **several if sources > 1 else {"unit_norm": by_rank},
    )
    generator = torch.Generator().manual_seed(seed)
    sae.reset_parameters(generator, norm=1.0 if by_rank else _SMALL)
    return sae
