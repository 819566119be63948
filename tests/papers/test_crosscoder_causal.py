"""Paired states, patching and KL on a tiny Gemma-2, against plain logits."""

import copy

import pytest
import torch

from gemma_ext import pocket
from gemma_ext.nn.sparse_autoencoder import BatchTopK, SparseAutoencoder
from gemma_ext.papers import crosscoder
from gemma_ext.papers.crosscoder.causal import factors, split_states
from gemma_ext.papers.crosscoder.pairs import paired_states, patched

LAYER = 1


@pytest.fixture(scope="module")
def models():
    from dataclasses import replace

    size = replace(
        pocket.SIZES["nano"],
        vocab_size=90,
        hidden_size=16,
        layers=3,
        head_dim=8,
        intermediate_size=24,
        sliding_window=8,
    )
    base = pocket.build_model(size).eval()
    chat = copy.deepcopy(base)
    with torch.no_grad():
        for p in chat.parameters():
            p += 0.05 * torch.randn_like(p)
    return base, chat


@pytest.fixture
def ids():
    return torch.randint(3, 90, (5, 12))


@pytest.fixture
def crossed():
    made = SparseAutoencoder(
        16, 40, BatchTopK(4), sources=2, subtract_bias=False, score_norm="sum", standardise="affine"
    )
    with torch.no_grad():
        made.encoder.copy_(torch.randn(40, 32))
        made.decoder.copy_(0.3 * torch.randn(40, 32))
        made.decoder_bias.copy_(torch.randn(32))
        made.input_mean.copy_(torch.randn(32))
        made.input_factor.copy_(torch.tensor([0.5, 2.0]))
        made.threshold.fill_(1.0)
    return made.eval()


@torch.no_grad()
def hidden(model, ids, layer):
    return model.model(ids, output_hidden_states=True).hidden_states[layer + 1]


def test_states_are_the_residual_stream(models, ids):
    base, chat = models
    pair = paired_states(base, chat, ids, LAYER, batch=2)
    assert pair.shape == (5, 11, 2, 16)
    for m, model in enumerate(models):
        torch.testing.assert_close(pair[:, :, m], hidden(model, ids, LAYER)[:, 1:])
    ticks = []
    paired_states(base, chat, ids, LAYER, batch=2, advance=ticks.append)
    assert ticks == [2, 2, 1]


def test_later_blocks_do_not_run(models, ids):
    ran = []
    handle = models[0].model.layers[2].register_forward_hook(lambda *a: ran.append(1))
    paired_states(*models, ids, LAYER)
    assert not ran
    paired_states(*models, ids, 2)
    handle.remove()
    assert ran


def test_patching_a_state_with_itself_changes_nothing(models, ids):
    _, chat = models
    with torch.no_grad():
        plain = chat(ids).logits
        own = hidden(chat, ids, LAYER)[:, 1:]
        with patched(chat, LAYER, own):
            torch.testing.assert_close(chat(ids).logits, plain)
        with patched(chat, LAYER, own + 1):
            changed = chat(ids).logits
        torch.testing.assert_close(changed[:, 0], plain[:, 0])
        assert (changed[:, 1:] - plain[:, 1:]).abs().max() > 1e-3
        torch.testing.assert_close(chat(ids).logits, plain)


def test_latents_biases_and_errors_are_the_whole_difference(models, ids, crossed):
    pair = paired_states(*models, ids, LAYER)
    rebuilt = crossed(pair)
    bias = crossed.decoder_bias.view(2, 16) / factors(crossed) + crossed.input_mean.view(2, 16)
    without_bias = rebuilt - bias
    everything = crosscoder.patched_state(crossed, pair)
    expected = pair[..., 0, :] + without_bias[..., 1, :] - without_bias[..., 0, :]
    torch.testing.assert_close(everything, expected, rtol=1e-4, atol=1e-4)
    nothing = crosscoder.patched_state(crossed, pair, torch.zeros(40, dtype=torch.bool))
    torch.testing.assert_close(nothing, pair[..., 0, :])
    some = torch.rand(40) < 0.5
    parts = [crosscoder.patched_state(crossed, pair, s) - pair[..., 0, :] for s in (some, ~some)]
    torch.testing.assert_close(sum(parts), everything - pair[..., 0, :], rtol=1e-4, atol=1e-4)
    known, error = split_states(crossed, pair)
    expected = rebuilt[..., 1, :] + pair[..., 0, :] - rebuilt[..., 0, :]
    torch.testing.assert_close(known, expected, rtol=1e-4, atol=1e-4)
    both = known + error - pair[..., 0, :]
    torch.testing.assert_close(both, pair[..., 1, :], rtol=1e-4, atol=1e-4)


def test_kl_of_every_arm(models, ids, crossed):
    base, chat = models
    scored = torch.rand(5, 12) < 0.6
    scored[:, 0] = False
    first = scored & (torch.rand(5, 12) < 0.5)
    template = torch.rand(5, 12) < 0.3
    some = torch.rand(40) < 0.5
    replies = crosscoder.Replies(ids, scored, first, template)
    ticks = []
    arms = crosscoder.causal_test(
        base, chat, LAYER, crossed, replies, {"some": some}, batch=2, advance=ticks.append
    )
    assert sum(ticks) == 5
    assert list(arms) == ["none", "all", "error", "tokens", "some"]
    pair = paired_states(base, chat, ids, LAYER)
    states_of = {
        "none": pair[..., 0, :],
        "all": split_states(crossed, pair)[0],
        "error": split_states(crossed, pair)[1],
        "tokens": torch.where(template[:, 1:, None], pair[..., 1, :], pair[..., 0, :]),
        "some": crosscoder.patched_state(crossed, pair, some),
    }
    with torch.no_grad():
        p = chat(ids).logits.double().log_softmax(-1)
        for name, state in states_of.items():
            with patched(chat, LAYER, state):
                q = chat(ids).logits.double().log_softmax(-1)
            kl = (p.exp() * (p - q)).sum(-1)
            assert arms[name].mean == pytest.approx(float(kl[scored].mean()), rel=1e-3, abs=1e-7)
            assert arms[name].first == pytest.approx(float(kl[first].mean()), rel=1e-3, abs=1e-7)
            assert arms[name].tokens == int(scored.sum())


def test_a_model_patched_with_its_own_states_has_no_divergence(models, ids, crossed):
    _, chat = models
    ones = torch.ones(5, 12, dtype=torch.bool)
    arms = crosscoder.causal_test(
        chat, chat, LAYER, crossed, crosscoder.Replies(ids, ones, ones), {}
    )
    assert "tokens" not in arms
    assert arms["none"].mean == pytest.approx(0, abs=1e-9)
    assert crosscoder.Divergence().mean == 0


def test_bad_input_is_named(models, ids, crossed):
    with pytest.raises(ValueError, match="site: expected a block below 3, got 3"):
        paired_states(*models, ids, 3)
    mask = torch.ones(5, 12, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"first: expected \[5, 12\], got \[5, 11\]"):
        crosscoder.Replies(ids, mask, mask[:, 1:])
    plain = SparseAutoencoder(16, 4, BatchTopK(1), sources=2)
    assert factors(plain) == 1
    odd = SparseAutoencoder(16, 4, BatchTopK(1), sources=2, standardise="layer_norm")
    with pytest.raises(ValueError, match="expected standardise none or affine, got layer_norm"):
        factors(odd)
