"""Training: the loss it reports, and an interruption that leaves no trace."""

import math

import pytest
import torch

from gemma_ext.pocket.model import build_config, build_model, pocket_size
from gemma_ext.pocket.training import perplexity, token_loss, train, windows_of


@pytest.fixture
def ids(tiny):
    return torch.randint(tiny.vocab_size, (2000,), generator=torch.Generator().manual_seed(3))


def test_every_feature_of_gemma2_is_on(tiny):
    config = build_config(tiny)
    assert (config.attn_logit_softcapping, config.final_logit_softcapping) == (50.0, 30.0)
    assert set(config.layer_types) == {"sliding_attention", "full_attention"}
    assert config.sliding_window < tiny.context
    assert config.num_key_value_heads < config.num_attention_heads
    assert config.tie_word_embeddings
    assert config.query_pre_attn_scalar == tiny.head_dim


def test_build_model_is_a_function_of_the_seed(tiny):
    state = torch.get_rng_state()
    first, same, other = (build_model(tiny, seed).lm_head.weight for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_token_loss_is_that_of_transformers(tiny, ids):
    model = build_model(tiny)
    with torch.no_grad():
        model.lm_head.weight.mul_(40)  # logits beyond the cap
    windows = windows_of(ids, tiny.context)[:3]
    logits = model(input_ids=windows[:, :-1]).logits.double()
    expected = torch.nn.functional.cross_entropy(
        logits.reshape(-1, tiny.vocab_size), windows[:, 1:].reshape(-1)
    )
    assert token_loss(model, windows).item() == pytest.approx(expected.item(), rel=1e-5)
    total = token_loss(model, windows, "sum").item()
    assert total == pytest.approx(expected.item() * 3 * tiny.context, rel=1e-5)


def test_perplexity_of_a_model_that_knows_nothing(tiny, ids):
    model = build_model(tiny)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert perplexity(model, ids, tiny.context) == pytest.approx(tiny.vocab_size, rel=1e-5)
    assert model.training == build_model(tiny).training


def test_windows_predict_every_id_once(tiny):
    windows = windows_of(torch.arange(100), 32)
    assert windows.shape == (3, 33)
    assert windows[:, 1:].reshape(-1).tolist() == list(range(1, 97))
    with pytest.raises(ValueError, match="ids: expected more than 32, got 32"):
        windows_of(torch.arange(32), 32)


def test_an_interrupted_training_ends_like_an_uninterrupted_one(tiny, ids, tmp_path):
    whole, parts = build_model(tiny), build_model(tiny)
    expected = train(whole, ids, tiny, show_progress=False)
    checkpoint = tmp_path / "training.safetensors"
    options = {"checkpoint": checkpoint, "show_progress": False}
    assert len(train(parts, ids, tiny, stop_after=4, **options).losses) == 4
    resumed = build_model(tiny, seed=5)  # its weights are replaced by those of the checkpoint
    got = train(resumed, ids, tiny, **options)
    assert got.losses == expected.losses
    assert got.seconds > 0
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert list(tmp_path.iterdir()) == [checkpoint]


def test_training_learns(tiny):
    ids = torch.arange(2000) % 7  # a sequence that one look back predicts
    model = build_model(tiny)
    losses = train(model, ids, tiny, show_progress=False).losses
    assert losses[0] == pytest.approx(math.log(tiny.vocab_size), rel=0.05)
    assert losses[-1] < losses[0] - 0.1


def test_unknown_size_is_refused():
    with pytest.raises(ValueError, match=r"size: expected one of .*nano.*, got 'huge'"):
        pocket_size("huge")
