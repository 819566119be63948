"""Where and at which token states are read, against plain forwards; sites by their meaning."""

import sys
from pathlib import Path

import personality_toy as toy
import pytest
import torch

from gemma_ext.lm.causal import padded
from gemma_ext.nn.steering import steer_hook
from gemma_ext.ops.sae import Steering
from gemma_ext.papers import personality as p

sys.path.append(str(Path(__file__).resolve().parents[1] / "integrations"))
from tiny_models import VOCAB, build

TOLD = [
    (p.chat(pair.question), text)
    for pair in toy.pairs()
    for text in (pair.high_trait_response, pair.low_trait_response)
]


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return toy.chat_model(tmp_path_factory.mktemp("model"))


def rows_of(lm):
    return [[*job.context, *job.targets] for job in lm.text.jobs(TOLD)]


def read(lm, site, batch):
    found = list(p.last_states(lm, TOLD, [0, 1], site=site, batch=batch))
    return {layer: torch.cat([part[layer] for part in found]) for layer in (0, 1)}


def recorded(lm, site, layer, **inputs):
    """By a hook of the test's own, at a module named by hand for Gemma-2."""
    block, found = lm.model.model.layers[layer], []
    if site == "resid_post":
        handle = block.register_forward_hook(
            lambda m, a, out: found.append(out[0] if isinstance(out, tuple) else out)
        )
    else:
        name = {"resid_mid": "pre_feedforward_layernorm", "mlp_in": "mlp"}[site]
        handle = getattr(block, name).register_forward_pre_hook(lambda m, a: found.append(a[0]))
    with torch.no_grad():
        lm.model(**inputs)
    handle.remove()
    return found[0]


def test_a_text_has_one_bos_and_ends_with_its_answer(lm):
    tokenizer = lm.text.tokenizer
    for row, (_, answer) in zip(rows_of(lm), TOLD, strict=True):
        assert row[0] == tokenizer.bos_token_id
        assert row.count(tokenizer.bos_token_id) == 1
        assert tokenizer.decode(row).endswith(answer)


@pytest.mark.parametrize("site", ["resid_mid", "resid_post", "mlp_in"])
def test_states_are_those_of_a_forward_without_padding(lm, site):
    for batch in (3, 16):
        found = read(lm, site, batch)
        for layer, states in found.items():
            truth = torch.stack(
                [
                    recorded(lm, site, layer, input_ids=torch.tensor([row]))[0, -1]
                    for row in rows_of(lm)
                ]
            )
            torch.testing.assert_close(states, truth, rtol=1e-4, atol=1e-4)


def test_left_padding_gives_the_same_vector(lm):
    ids, real = padded(rows_of(lm), left=True, device="cpu")
    assert not real.all()
    inputs = {"attention_mask": real, "position_ids": (real.cumsum(1) - 1).clamp(min=0)}
    left = recorded(lm, "resid_mid", 1, input_ids=ids, **inputs)[:, -1]
    v = p.trait_directions(lm, toy.pairs(), [1], batch=3)[1]
    truth = (left[0::2] - left[1::2]).double().mean(0)
    torch.testing.assert_close(v.double(), truth / truth.norm(), rtol=1e-4, atol=1e-5)
    assert v.norm() == pytest.approx(1.0, abs=1e-6)


def test_a_second_bos_would_show(lm):
    row = rows_of(lm)[0]
    one = recorded(lm, "resid_mid", 1, input_ids=torch.tensor([row]))[0, -1]
    twice = recorded(lm, "resid_mid", 1, input_ids=torch.tensor([[row[0], *row]]))[0, -1]
    assert (one - twice).abs().max() > 1e-3


def test_a_planted_direction_is_the_traits(lm):
    """Every state of the block, moved where the answer is a high one, by a hook of the test."""
    u = torch.nn.functional.normalize(
        torch.randn(32, generator=torch.Generator().manual_seed(7)), dim=0
    )
    high = {tuple(row) for row in rows_of(lm)[0::2]}
    now = []

    def note(module, args, kwargs):
        ids, real = kwargs["input_ids"], kwargs["attention_mask"].bool()
        now[:] = [tuple(i[r].tolist()) in high for i, r in zip(ids, real, strict=True)]

    def plant(module, args, out):
        moved = out + 1e4 * torch.tensor(now).float()[:, None, None] * u
        return moved

    handles = [
        lm.model.model.register_forward_pre_hook(note, with_kwargs=True),
        lm.model.model.layers[0].register_forward_hook(plant),
    ]
    found = p.trait_directions(lm, toy.pairs(), [0], site="resid_post", batch=4)[0]
    for handle in handles:
        handle.remove()
    assert torch.dot(found, u) > 0.999


def test_what_cannot_be_a_direction(lm):
    with pytest.raises(ValueError, match="rows: expected at least one before the mean"):
        p.trait_directions(lm, [], [0])
    same = [p.Pair("q?", "t", "d", "h", "Splendid!", "l", "Splendid!")]
    with pytest.raises(ValueError, match="v: expected a finite vector other than 0"):
        p.trait_directions(lm, same, [0])
    with pytest.raises(ValueError, match="expected site to be"):
        p.trait_directions(lm, toy.pairs(), [0], site="attn_out")


def added_by_name(model, layer, vector, ids):
    """Logits with a vector added to the output of the module that the release hooks."""
    module = model.model.layers[layer].post_attention_layernorm
    handle = module.register_forward_hook(lambda m, a, out: out + vector)
    with torch.no_grad():
        found = model(input_ids=ids).logits
    handle.remove()
    return found


@pytest.mark.parametrize("name", ["Gemma2", "Llama"])
def test_the_releases_module_is_the_middle_of_the_block_in_gemma2_alone(name):
    model = build(name, num_hidden_layers=3).double()
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, VOCAB, (2, 9), generator=generator)
    v = torch.nn.functional.normalize(
        torch.randn(32, generator=generator, dtype=torch.float64), dim=0
    )
    how = Steering(v[None], 3.0)

    def at(site):
        with (
            torch.no_grad(),
            steer_hook(model, 1, how, site=site, skip_first=False, impl="reference"),
        ):
            return model(input_ids=ids).logits

    by_name = added_by_name(model, 1, 3 * v, ids)
    same, other = ("resid_mid", "mlp_in") if name == "Gemma2" else ("mlp_in", "resid_mid")
    torch.testing.assert_close(at(same), by_name, rtol=0, atol=1e-12)
    assert (at(other) - by_name).abs().max() > 1e-3
