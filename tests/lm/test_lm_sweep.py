"""A sweep of strengths writes what generation under each strength alone writes."""

import pytest
import torch
from lm_models import causal
from test_causal import lm_of

from gemma_ext.lm import Sampling
from gemma_ext.lm.sweep import generate_at
from gemma_ext.nn.steering import steer_hook
from gemma_ext.ops.sae import Steering

PROMPTS = ["abc abc", "b", "a longer prompt of bytes", "abc abc"]
STRENGTHS = [0.0, 1.0, -3.0]


def steering(width=32, **options):
    direction = torch.randn(1, width, generator=torch.Generator().manual_seed(7))
    return Steering(40 * direction, **options)


@pytest.fixture(scope="module")
def lm():
    return lm_of(causal())


def alone(lm, strength, sampling, **options):
    with steer_hook(lm.model, 1, steering(strength=strength, **options)):
        return lm.generate(PROMPTS, sampling)


@pytest.mark.parametrize("batch_tokens", [1, 200, 10_000])
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(8),
        Sampling(8, temperature=0.8, seed=3),
        Sampling(8, temperature=1.0, top_p=0.9, stop=("a",)),
    ],
    ids=["greedy", "drawn", "stopped"],
)
def test_every_strength_has_its_own_text_and_the_draws_of_the_prompt(lm, sampling, batch_tokens):
    found = generate_at(lm, 1, steering(), STRENGTHS, PROMPTS, sampling, batch_tokens=batch_tokens)
    for strength, row in zip(STRENGTHS, found, strict=True):
        assert row == alone(lm, strength, sampling)
    assert found[0] == lm.generate(PROMPTS, sampling)
    assert found[0] != found[1] != found[2]


def test_gates_are_those_of_each_strength(lm):
    gate = {
        "encoder": torch.randn(1, 32, generator=torch.Generator().manual_seed(9)),
        "gate": "per_input",
    }
    found = generate_at(lm, 1, steering(**gate), STRENGTHS, PROMPTS, Sampling(8))
    for strength, row in zip(STRENGTHS, found, strict=True):
        assert row == alone(lm, strength, Sampling(8), **gate)


def test_strengths_may_have_draws_of_their_own(lm):
    sampling = Sampling(8, temperature=1.0)
    options = {"prompts": PROMPTS, "sampling": sampling}
    common = generate_at(lm, 1, steering(), [0.0, 0.0], **options)
    own = generate_at(lm, 1, steering(), [0.0, 0.0], common_draws=False, **options)
    assert common[0] == common[1] == own[0] != own[1]


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("site", ["resid_mid", "mlp_in"])
def test_sites_inside_a_block_share_the_blocks_before_it(lm, site, layer):
    found = generate_at(lm, layer, steering(), STRENGTHS, PROMPTS, Sampling(8), site=site)
    for strength, row in zip(STRENGTHS, found, strict=True):
        with steer_hook(lm.model, layer, steering(strength=strength), site=site):
            assert row == lm.generate(PROMPTS, Sampling(8))
    assert found[0] != found[1]


def test_nothing_to_do_and_what_cannot_be_done(lm):
    assert generate_at(lm, 1, steering(), STRENGTHS, [], Sampling(8)) == [[], [], []]
    with pytest.raises(ValueError, match="at least one strength"):
        generate_at(lm, 1, steering(), [], PROMPTS, Sampling(8))
    with pytest.raises(ValueError, match=r"layer in \[0, 4\), got 9"):
        generate_at(lm, 9, steering(), STRENGTHS, PROMPTS, Sampling(8))
