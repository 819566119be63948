"""Latents of a dictionary as directions to steer along."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gemma_ext.nn.sparse_autoencoder.activations import BatchTopK, Gated, JumpReLU
from gemma_ext.nn.sparse_autoencoder.module import SparseAutoencoder
from gemma_ext.ops.sae import Steering


@torch.no_grad()
def steering_of(
    sae: SparseAutoencoder, latents: Sequence[int], strength: float | Tensor = 1.0, **options: Any
) -> Steering:
    """Steering along the decoder rows of latents, with what says where they fire.

    A latent that is chosen by rank counts as active where its pre-activation is positive; only
    the |S| columns of the encoder are read.

    Args:
        strength: of every latent; in mode "add", 1 adds the decoder row as it is.
        options: of `Steering`: mode, level, gate, ...

    Raises:
        ValueError: a standardised input, several sources, or a number that is not below F.
    """
    if sae.standardise_kind != "none" or sae.sources > 1 or sae.transcodes:
        raise ValueError(
            "sae: expected an autoencoder of one source on raw activations (fold_standardise first)"
        )
    for number in latents:
        if not 0 <= number < sae.features:
            raise ValueError(f"latents: expected numbers below {sae.features}, got {number}")
    rows = torch.as_tensor(list(latents), device=sae.encoder.device)
    encoder, bias = sae.encoder[rows], sae.encoder_bias[rows].float()
    if sae.subtract_bias:
        bias = bias - encoder.float() @ sae.decoder_bias.float()
    return Steering(
        decoder=sae.decoder[rows].clone(),
        strength=strength,
        encoder=encoder.clone(),
        bias=bias,
        threshold=_threshold(sae, rows),
        **options,
    )


def _threshold(sae: SparseAutoencoder, rows: Tensor) -> Tensor:
    zero = torch.zeros(len(rows), device=sae.encoder.device)
    match sae.activation:
        case JumpReLU():
            return sae.threshold[rows].float()
        case BatchTopK():
            scale = sae.score_scale()
            level = sae.threshold.clamp(min=0).float().expand(len(rows))
            return level / scale[rows].clamp(min=1e-8) if scale is not None else level + zero
        case Gated():
            raise ValueError("activation: the value of a Gated latent is no threshold of p")
    return zero
