"""Latents steered by their own rows do what the whole dictionary would."""

import pytest
import torch

from gemma_ext.nn.sparse_autoencoder import (
    BatchTopK,
    Gated,
    JumpReLU,
    ReLU,
    SparseAutoencoder,
    TopK,
    latent_steering,
)
from gemma_ext.ops.sae import steer

LATENTS = [3, 11, 30]


def dictionary(activation, **options):
    generator = torch.Generator().manual_seed(0)
    sae = SparseAutoencoder(16, 40, activation, **options)
    with torch.no_grad():
        for value in sae.parameters():
            value.copy_(0.3 * torch.randn(value.shape, generator=generator))
        if isinstance(activation, JumpReLU):
            sae.threshold.abs_()
        if isinstance(activation, BatchTopK):
            sae.threshold.fill_(0.2)
    return sae.eval()


def states(dtype=torch.float32):
    return torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(1), dtype=dtype)


CASES = [
    (ReLU(), {}),
    (ReLU(), {"subtract_bias": False}),
    (JumpReLU(), {}),
    (BatchTopK(4), {}),
    (BatchTopK(4), {"score_norm": "sum"}),
]


@pytest.mark.parametrize(("activation", "options"), CASES, ids=str)
def test_ablation_takes_away_what_the_dictionary_decodes(activation, options):
    sae, x = dictionary(activation, **options), states()
    codes = sae.encode(x).dense()[..., LATENTS]
    assert 0.02 < (codes > 0).float().mean() < 0.9
    truth = x - codes @ sae.decoder[LATENTS]
    found = steer(x, latent_steering(sae, LATENTS, mode="ablate"))
    torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("activation", "options"), [*CASES, (Gated(), {})], ids=str)
def test_a_gate_per_token_opens_where_the_latent_is_active(activation, options):
    sae, x = dictionary(activation, **options), states()
    active = _gate(sae, x)[..., LATENTS]
    rows = torch.nn.functional.normalize(sae.decoder[LATENTS], dim=-1)
    truth = x - 2.5 * active @ rows
    steering = latent_steering(sae, LATENTS, unit=True, strength=-2.5, gate="per_token")
    torch.testing.assert_close(steer(x, steering), truth, rtol=1e-5, atol=1e-5)


def _gate(sae, x):
    if not isinstance(sae.activation, Gated):
        return (sae.encode(x).dense() > 0).float()
    return ((x - sae.decoder_bias) @ sae.encoder.T + sae.encoder_bias > 0).float()


def test_a_threshold_that_counts_itself_opens_the_gate():
    for inclusive in (False, True):
        sae = dictionary(JumpReLU(inclusive=inclusive), subtract_bias=False)
        with torch.no_grad():
            sae.encoder[3] = torch.eye(16)[0]
            sae.encoder_bias[3], sae.threshold[3] = 0.0, 0.5
        x = torch.zeros(1, 2, 16)
        x[0, 1, 0] = 0.5
        steering = latent_steering(sae, [3], mode="ablate")
        assert torch.equal(steer(x, steering), x) is not inclusive


def test_directions_alone_need_no_gate_and_serve_any_dictionary():
    sae, x = dictionary(TopK(4)), states()
    steering = latent_steering(sae, LATENTS, strength=2.0)
    assert steering.encoder is None
    truth = x + 2 * sae.decoder[LATENTS].sum(0)
    torch.testing.assert_close(steer(x, steering), truth)


@pytest.mark.parametrize(
    ("activation", "made", "asked", "message"),
    [
        (TopK(4), {}, {"gate": "per_token"}, "active by themselves"),
        (TopK(4), {}, {"mode": "ablate"}, "active by themselves"),
        (Gated(), {}, {"mode": "clamp"}, "active by themselves"),
        (ReLU(), {"sources": 2}, {}, "one raw activation, got 2 sources"),
        (ReLU(), {"standardise": "unit_norm"}, {}, "standardise='unit_norm'"),
    ],
)
def test_dictionaries_that_cannot_be_asked(activation, made, asked, message):
    with pytest.raises(ValueError, match=message):
        latent_steering(dictionary(activation, **made), LATENTS, **asked)


@pytest.mark.parametrize("latents", [[], [40], [-1]])
def test_latents_that_are_not_there(latents):
    with pytest.raises(ValueError, match=r"latents: expected some in \[0, 40\)"):
        latent_steering(dictionary(ReLU()), latents)
