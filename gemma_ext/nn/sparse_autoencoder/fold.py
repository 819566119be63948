"""The same function from other weights: norms, centres, scales, whitenings folded in, in place."""

from __future__ import annotations

import torch
from torch import Tensor

from gemma_ext.nn.sparse_autoencoder.activations import BatchTopK, Gated, JumpReLU, ReLU
from gemma_ext.nn.sparse_autoencoder.module import SparseAutoencoder

_LEAST = 1e-8


@torch.no_grad()
def fold_norms(sae: SparseAutoencoder) -> SparseAutoencoder:
    """Decoder rows of norm 1 (that of the scores, where it is one): values grow by the norm.

    Raises:
        ValueError: latents compete by p itself, so that another scale would choose others.
    """
    elementwise = isinstance(sae.activation, ReLU | JumpReLU | Gated)
    if sae.score_norm is None and not elementwise:
        raise ValueError(
            f"score_norm: expected a norm, without which {type(sae.activation).__name__} chooses "
            "other latents after folding, got None"
        )
    norms = sae.score_scale()
    if norms is None:
        norms = sae.decoder_norms().float().norm(dim=-1)
    norms = norms.clamp(min=_LEAST)
    _scale(sae, norms)
    if isinstance(sae.activation, JumpReLU):
        sae.threshold *= norms
    if isinstance(sae.activation, Gated):
        sae.magnitude_bias *= norms
    sae.score_norm = None
    return sae


def _scale(sae: SparseAutoencoder, norms: Tensor) -> None:
    sae.encoder *= norms[:, None].to(sae.encoder.dtype)
    sae.encoder_bias *= norms.to(sae.encoder_bias.dtype)
    sae.decoder /= norms[:, None].to(sae.decoder.dtype)


@torch.no_grad()
def fold_standardise(sae: SparseAutoencoder) -> SparseAutoencoder:
    """An affine standardisation in the weights, so that the dictionary takes raw activations.

    Raises:
        ValueError: another kind; or sources with different factors under scores by norms, where
            folding would choose other latents (`fold_norms` first).
    """
    if sae.standardise_kind != "affine":
        raise ValueError(f"standardise: expected affine, got {sae.standardise_kind}")
    factor = sae.input_factor.to(sae.encoder.dtype)
    if sae.score_norm and not torch.equal(factor, factor[:1].expand_as(factor)):
        raise ValueError("score_norm: expected None with sources of different factors")
    mean = sae.input_mean.to(sae.encoder.dtype)
    each = factor.repeat_interleave(sae.width)
    sae.encoder *= each
    if not sae.subtract_bias:
        sae.encoder_bias -= sae.encoder @ mean
    sae.decoder /= each
    sae.decoder_bias.copy_(sae.decoder_bias / each + mean)
    if sae.score_norm and isinstance(sae.activation, BatchTopK):
        sae.threshold /= factor[0]  # of p times a norm, which has shrunk by the factor
    if not sae.subtract_bias and isinstance(sae.activation, Gated):
        sae.magnitude_bias -= (sae.encoder @ mean).float() * sae.r_mag.exp()
    _raw(sae)
    return sae


@torch.no_grad()
def fold_centre(sae: SparseAutoencoder) -> SparseAutoencoder:
    """The bias that is subtracted from the input, in the encoder's bias."""
    if not sae.subtract_bias:
        return sae
    shift = (sae.encoder.float() @ sae.decoder_bias.float()).to(sae.encoder_bias.dtype)
    sae.encoder_bias -= shift
    if isinstance(sae.activation, Gated):
        sae.magnitude_bias -= shift * sae.r_mag.exp()
    sae.subtract_bias = False
    return sae


@torch.no_grad()
def as_jumprelu(sae: SparseAutoencoder) -> SparseAutoencoder:
    """A ReLU or BatchTopK dictionary as it is at inference, written as a JumpReLU, in place.

    Raises:
        ValueError: an activation that has no threshold.
    """
    kind = type(sae.activation)
    if kind is JumpReLU:
        return sae
    if kind not in (ReLU, BatchTopK):
        raise ValueError(
            f"activation: expected ReLU, BatchTopK or JumpReLU, got {type(sae.activation).__name__}"
        )
    level = 0.0
    if kind is BatchTopK:
        level = max(0.0, float(sae.threshold))
        if sae.score_norm is not None:
            fold_norms(sae)
        del sae.threshold
    threshold = torch.full((sae.features,), level, device=sae.encoder.device)
    sae.threshold = torch.nn.Parameter(threshold)
    sae.activation = JumpReLU()
    return sae


@torch.no_grad()
def fold_whitening(
    sae: SparseAutoencoder, mean: Tensor, whiten: Tensor, unwhiten: Tensor
) -> SparseAutoencoder:
    """z = (x - mean) whiten in the weights of a dictionary that was trained on z.

    Args:
        mean: [D]; whiten, unwhiten: [D, D], inverse to each other.

    Raises:
        ValueError: scores by norms, which the decoder's new rows would change; several sources.
    """
    if sae.score_norm is not None or sae.sources > 1:
        raise ValueError(
            "expected one source and scores without norms (fold_norms first), got "
            f"{sae.sources} sources and score_norm={sae.score_norm!r}"
        )
    wide = torch.promote_types(sae.encoder.dtype, whiten.dtype)
    mean, whiten, unwhiten = (t.to(sae.encoder.device, wide) for t in (mean, whiten, unwhiten))
    sae.encoder.copy_(sae.encoder.to(wide) @ whiten.mT)
    shift = sae.encoder.to(wide) @ mean
    if not sae.subtract_bias:
        sae.encoder_bias.sub_(shift.to(sae.encoder_bias.dtype))
        if isinstance(sae.activation, Gated):
            sae.magnitude_bias.sub_(shift.float() * sae.r_mag.exp())
    sae.decoder.copy_(sae.decoder.to(wide) @ unwhiten)
    sae.decoder_bias.copy_(sae.decoder_bias.to(wide) @ unwhiten + mean)
    sae.unit_norm = False
    return sae


def _raw(sae: SparseAutoencoder) -> None:
    del sae.input_mean, sae.input_factor
    sae.unit_norm = False
    sae.standardise_kind = "none"
