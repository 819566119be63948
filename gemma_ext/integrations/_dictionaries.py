"""Between tensors of checkpoints and `SparseAutoencoder`: copying with shapes checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gemma_ext.nn.sparse_autoencoder import Activation, SparseAutoencoder


@torch.no_grad()
def build(
    activation: Activation,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
    **options: Any,
) -> SparseAutoencoder:
    """A dictionary in the dtype of its weights.

    Args:
        tensors: encoder [F, M*D], encoder_bias, decoder [F, M*D_out], decoder_bias, and whatever
            the activation and the options add; what is missing stays as it is initialised.
        options: of `SparseAutoencoder`, without sizes.

    Raises:
        ValueError: a shape that does not fit.
    """
    encoder, decoder = tensors["encoder"], tensors["decoder"]
    sources = options.get("sources", 1)
    width, output = encoder.shape[1] // sources, decoder.shape[1] // sources
    if options.pop("transcodes", width != output):
        options["output_width"] = output
    with torch.device("meta"):
        sae = SparseAutoencoder(width, encoder.shape[0], activation, dtype=encoder.dtype, **options)
    sae = sae.to_empty(device=encoder.device)
    for name, value in _fresh(sae).items():
        getattr(sae, name).copy_(value)
    for name, value in tensors.items():
        place = getattr(sae, name, None)
        if not isinstance(place, Tensor):
            raise ValueError(f"{name}: expected no such tensor with {activation}")
        if place.shape != value.shape:
            raise ValueError(f"{name}: expected shape {list(place.shape)}, got {list(value.shape)}")
        place.copy_(value)
    sae.metadata = dict(metadata)
    return sae.eval()


def _fresh(sae: SparseAutoencoder) -> dict[str, Tensor]:
    """What a file need not hold: zero biases, unit factors, the activation's own."""
    values = {"encoder_bias": torch.zeros(()), "decoder_bias": torch.zeros(())}
    if sae.standardise_kind == "affine":
        values |= {"input_mean": torch.zeros(()), "input_factor": torch.ones(())}
    own = sae.activation.parameters(sae.features), sae.activation.buffers(sae.features)
    return values | dict(own[0]) | dict(own[1])


def wanted(tensors: Mapping[str, Tensor], *names: str, where: object) -> list[Tensor]:
    """The tensors of these names.

    Raises:
        ValueError: one is missing.
    """
    for name in names:
        if name not in tensors:
            raise ValueError(f"{where}: expected a tensor {name}, got {', '.join(sorted(tensors))}")
    return [tensors[name] for name in names]


def clone(sae: SparseAutoencoder) -> SparseAutoencoder:
    """A copy that may be folded."""
    import copy

    return copy.deepcopy(sae)
