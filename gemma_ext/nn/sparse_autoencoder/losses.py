"""Terms of training losses, each from the short lists of active latents.

Means are over tokens N; f are values, p raw pre-activations, n_i the norm of a latent's decoder
(summed over the sources of a crosscoder), e = x - x̂.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemma_ext.nn.sparse_autoencoder.activations import Latents
from gemma_ext.nn.sparse_autoencoder.jump import step
from gemma_ext.nn.sparse_autoencoder.module import SparseAutoencoder
from gemma_ext.nn.sparse_autoencoder.sums import of_latents, row_sums
from gemma_ext.ops.sae import Codes, decode


def variance(y: Tensor) -> Tensor:
    """Σ (y - mean over tokens)² of y [..., D], in float32."""
    y = y.flatten(0, -2).float()
    return (y - y.mean(0)).square().sum()


def l1(sae: SparseAutoencoder, codes: Codes) -> Tensor:
    """mean_n Σ_i f_i n_i; the decoder gets its gradient too."""
    norms = sae.decoder_norms().sum(-1)
    return (codes.values * of_latents(codes, norms)).sum() / _tokens(codes)


def tanh_l0(sae: SparseAutoencoder, codes: Codes, scale: float) -> Tensor:
    """mean_n Σ_i tanh(scale f_i n_i)."""
    norms = sae.decoder_norms().sum(-1)
    return (scale * codes.values * of_latents(codes, norms)).tanh().sum() / _tokens(codes)


def step_l0(sae: SparseAutoencoder, latents: Latents) -> Tensor:
    """Number of active latents per token [N], with JumpReLU's straight-through gradient."""
    activation = sae.activation
    active = step(
        latents.pre.values,
        of_latents(latents.pre, sae.threshold),
        activation.bandwidth,
        inclusive=activation.inclusive,
        to_input=activation.to_input,
    )
    return row_sums(latents.pre, active)


def quadratic_l0(counts: Tensor, target: float) -> Tensor:
    """mean_n (2 / target) (count_n - target)²."""
    return (2 / target) * (counts - target).square().mean()


def second_list(
    sae: SparseAutoencoder, weight: Tensor, second: Codes, residual: Tensor, *, relu: bool
) -> Tensor:
    """Σ (ê - e)², ê the decoder's product with the second list, without its bias; e is constant."""
    values = second.values.relu() if relu else second.values
    estimate = decode(second.with_values(values), weight, unit_norm=sae.unit_norm)
    return (estimate.float() - residual.detach().float().view_as(estimate)).square().sum()


def pre_activation(
    sae: SparseAutoencoder, z: Tensor, latents: Latents, dead: Tensor, threshold: Tensor
) -> Tensor:
    """mean_n Σ_{i dead} relu(threshold_i - p_i) n_i, without the p of latents that are not listed.

    Σ_n relu(θ - p) = N θ - Σ_n p, plus p - θ of the entries above θ; and Σ_n p is one product of
    the dead encoder rows with the column sums of the input.

    Args:
        z: standardised input [..., M*D].
        dead: mask [F]; threshold: [F].
    """
    rows = dead.nonzero().squeeze(1)
    tokens = _tokens(latents.pre)
    sums = sae.centred(z).flatten(0, -2).float().sum(0)
    total_p = sae.encoder[rows].float() @ sums + tokens * sae.input_bias()[rows].float()
    below = tokens * threshold[rows] - total_p
    norms = sae.decoder_norms().sum(-1)
    listed = latents.pre
    above = (listed.values - of_latents(listed, threshold)).relu()
    above = above * of_latents(listed, norms * dead)
    return ((below * norms[rows]).sum() + above.sum()) / tokens


def gated_auxiliary(
    sae: SparseAutoencoder, weight: Tensor, latents: Latents, target: Tensor
) -> Tensor:
    """mean_n ‖x - x̂‖², x̂ decoded from the gates alone by the decoder as a constant."""
    gates = latents.pre.with_values(latents.pre.values.relu())
    rebuilt = decode(gates, weight.detach(), sae.decoder_bias.detach())
    error = target.float().view_as(rebuilt) - rebuilt.float()
    return error.square().sum() / _tokens(gates)


def _tokens(codes: Codes) -> int:
    return max(1, torch.Size(codes.shape).numel())
