"""Chosen latents of a dictionary as directions to steer along."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from gemma_ext.nn.sparse_autoencoder.activations import BatchTopK, Gated, JumpReLU, ReLU
from gemma_ext.nn.sparse_autoencoder.module import SparseAutoencoder
from gemma_ext.ops.sae import Steering


@torch.no_grad()
def latent_steering(
    sae: SparseAutoencoder,
    latents: Sequence[int] | Tensor,
    *,
    unit: bool = False,
    **options: Any,
) -> Steering:
    """Steering by S latents, of which only their own rows of the dictionary are read.

    Args:
        sae: a dictionary of the activation that is steered, raw (`fold_standardise`).
        latents: S numbers in [0, F).
        unit: directions of norm 1; otherwise the decoder's rows as they are, which the modes that
            change a code need.
        options: of `gemma_ext.ops.sae.Steering`: strength, mode, gate, ...

    Raises:
        ValueError: a dictionary of several sources, of standardised activations, or, where gate or
            mode ask whether a latent is active, one whose latents compete for that (TopK).

    Example:
        >>> calm = latent_steering(sae, [1234], strength=-40.0, unit=True, gate="per_token")
        >>> with steer_hook(model, 12, calm):
        ...     model.generate(**inputs)
    """
    if sae.sources > 1 or sae.transcodes or sae.standardise_kind != "none":
        raise ValueError(
            "sae: expected a dictionary of one raw activation, got "
            f"{sae.sources} sources, standardise={sae.standardise_kind!r}"
        )
    chosen = torch.as_tensor(latents, dtype=torch.long, device=sae.encoder.device).reshape(-1)
    if not len(chosen) or chosen.min() < 0 or chosen.max() >= sae.features:
        raise ValueError(f"latents: expected some in [0, {sae.features}), got {chosen.tolist()}")
    decoder = sae.decoder[chosen].float()
    steering = {"decoder": normalize(decoder, dim=-1) if unit else decoder, **options}
    if options.get("mode", "add") in ("add", "project", "cap") and (
        options.get("gate", "constant") == "constant"
    ):
        return Steering(**steering)
    encoder = sae.encoder[chosen].float()
    bias = sae.encoder_bias[chosen].float()
    if sae.subtract_bias:
        bias = bias - encoder @ sae.decoder_bias.float()
    threshold = _thresholds(sae, options.get("mode", "add"))[chosen]
    return Steering(encoder=encoder, bias=bias, threshold=threshold, **steering)


def _thresholds(sae: SparseAutoencoder, mode: str) -> Tensor:
    """[F] float32: a latent is active where its pre-activation exceeds it."""
    zero = sae.encoder_bias.new_zeros(sae.features, dtype=torch.float32)
    match sae.activation:
        case ReLU():
            return zero
        case JumpReLU(inclusive=True):
            return torch.nextafter(sae.threshold.float(), torch.full_like(zero, -torch.inf))
        case JumpReLU():
            return sae.threshold.float()
        case BatchTopK():
            scale = sae.score_scale()
            level = zero + sae.threshold.clamp(min=0)
            return level if scale is None else level / scale
        case Gated() if mode not in ("ablate", "clamp", "min_clamp", "scale"):
            return zero
    raise ValueError(
        "sae: expected latents that are active by themselves (ReLU, JumpReLU, BatchTopK), "
        f"got {sae.activation}"
    )
