"""Reward models: their heads, losses, training, averages and scores."""

from __future__ import annotations

import copy
import math
import random

import pytest
import tiny_gemma
import torch
import transformers

from gemma_ext import pocket
from gemma_ext.papers.reward_shaping import (
    WARM_RUNS,
    Ensemble,
    Pair,
    RewardModel,
    RewardTraining,
    from_causal,
    load_reward_model,
    train_reward_model,
    warm,
)
from gemma_ext.papers.reward_shaping.losses import bradley_terry, odin_penalties, pearson
from gemma_ext.papers.reward_shaping.reward_model import score_head, scores
from gemma_ext.papers.reward_shaping.training import collate, encode_pairs, preference_loss


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    texts = [document.text for document in pocket.documents(30_000)]
    return tiny_gemma.base(tmp_path_factory.mktemp("model"), texts)


@pytest.fixture(scope="module")
def causal(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")


@pytest.fixture(scope="module")
def tokenizer(folder):
    return transformers.AutoTokenizer.from_pretrained(folder)


def double(values):
    return torch.tensor(values, dtype=torch.float64)


def test_losses_are_their_formulas():
    c, r = double([1.0, 0.2, -3]), double([0.5, 1.0, 2])
    sigma = 1 / (1 + (r - c).exp())
    torch.testing.assert_close(bradley_terry(c, r), -sigma.log().mean())
    torch.testing.assert_close(
        bradley_terry(c, r, 0.005), (-sigma.log() + 0.005 * (c**2 + r**2)).mean()
    )
    c.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: bradley_terry(x, r, 0.1), c)


def test_correlation_and_the_penalties_of_odin():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 9, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(pearson(x, y), torch.corrcoef(torch.stack([x, y]))[0, 1])
    assert float(pearson(x, torch.ones(9).double())) == 0
    tokens = torch.tensor([1, 5, 2, 9, 4, 7, 3, 8, 6])
    head = torch.randn(2, 4, generator=generator, dtype=torch.float64)
    apart, overlap = odin_penalties(x, y, tokens, head)
    t = tokens.double()
    torch.testing.assert_close(apart, pearson(x, t).abs() - pearson(y, t))
    cosine = torch.cosine_similarity(head[0], head[1], dim=0)
    torch.testing.assert_close(overlap, cosine.abs(), atol=1e-5, rtol=0)
    best = odin_penalties(torch.ones(9).double(), t, tokens, torch.eye(2).double())
    assert [float(value) for value in best] == pytest.approx([-1, 0], abs=1e-12)
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda q: odin_penalties(q, y, tokens, head)[0], x)


def test_a_causal_model_becomes_a_classifier_without_bias(causal):
    made = from_causal(causal, seed=3)
    assert made.config.num_labels == 1
    assert score_head(made).bias is None
    for name, value in causal.model.state_dict().items():
        assert torch.equal(made.model.state_dict()[name], value)
        assert made.model.state_dict()[name].data_ptr() != value.data_ptr()
    again, other = from_causal(causal, seed=3), from_causal(causal, seed=4)
    assert torch.equal(score_head(made).weight, score_head(again).weight)
    assert not torch.equal(score_head(made).weight, score_head(other).weight)
    assert score_head(from_causal(causal, heads=2)).weight.shape == (2, 32)
    half = from_causal(copy.deepcopy(causal).bfloat16())
    assert next(half.parameters()).dtype == torch.bfloat16
    with pytest.raises(TypeError, match="expected a model with a linear head, got Linear"):
        score_head(torch.nn.Linear(1, 1))


def test_the_score_is_read_at_the_last_token(causal, tokenizer):
    model = from_causal(causal)
    rows = [[2, 9, 8, 7], [2, 5], [2, 6, 7]]
    found = scores(model, rows)
    for row, value in zip(rows, found, strict=True):
        ids = torch.tensor([row])
        hidden = model.model(input_ids=ids).last_hidden_state[0, -1]
        torch.testing.assert_close(value, score_head(model)(hidden), atol=1e-5, rtol=1e-4)
    no_pad = copy.deepcopy(model)
    no_pad.config.pad_token_id = None
    with pytest.raises(ValueError, match="pad_token_id, got None"):
        scores(no_pad, rows)
    RewardModel(no_pad, tokenizer)
    assert no_pad.config.pad_token_id == tokenizer.pad_token_id


def test_a_reward_model_is_a_function_of_trls_signature(causal, tokenizer):
    model = from_causal(causal, heads=2)
    score = RewardModel(model, tokenizer, batch_tokens=16)
    prompts, texts = ["def f", "the", "a longer prompt of"], ["(x):", " end", " words"]
    ids = tokenizer(texts, add_special_tokens=False).input_ids
    found = score(prompts=prompts, completions=texts, completion_ids=ids, trainer_state=None)
    assert found.shape == (3,)
    one_by_one = torch.cat([score([p], [t]) for p, t in zip(prompts, texts, strict=True)])
    torch.testing.assert_close(found, one_by_one, atol=1e-5, rtol=1e-4)
    second = RewardModel(model, tokenizer, head=1)(prompts, texts)
    assert not torch.allclose(found, second)
    with pytest.raises(ValueError, match="head: expected one of 2, got 2"):
        RewardModel(model, tokenizer, head=2)


def test_own_ids_are_scored_as_they_were_drawn(causal, tokenizer):
    model = from_causal(causal)
    score = RewardModel(model, tokenizer, own_ids=True)
    drawn = [7, 9, tokenizer.eos_token_id]
    found = score(["def f"], [tokenizer.decode(drawn, skip_special_tokens=True)], [drawn])
    expected = scores(model, [[*tokenizer("def f").input_ids, *drawn]])[:, 0]
    torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match="completion_ids: expected the ids"):
        score(["a"], ["b"])


def test_messages_go_through_the_template(causal, folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    score = RewardModel(from_causal(causal), tokenizer)
    prompt = [{"role": "user", "content": "hi"}]
    found = score([prompt], [[{"role": "assistant", "content": "yes"}]])
    torch.testing.assert_close(found, score(["user: hi\n"], ["assistant: yes\n"]))
    torch.testing.assert_close(found, score([prompt], ["yes"]))


def test_a_folder_of_either_kind_is_read_back(causal, folder, tmp_path):
    model = from_causal(causal, seed=7)
    model.save_pretrained(tmp_path / "rm")
    again = load_reward_model(tmp_path / "rm")
    rows = [[2, 9, 8, 7], [2, 5]]
    torch.testing.assert_close(scores(again, rows), scores(model, rows))
    assert load_reward_model(folder, heads=2).config.num_labels == 2


def test_a_fingerprint_changes_with_weights_and_head(causal, tokenizer):
    model = from_causal(causal, heads=2)
    name = RewardModel(model, tokenizer).fingerprint()
    assert RewardModel(model, tokenizer).fingerprint() == name
    assert RewardModel(model, tokenizer, head=1).fingerprint() != name
    with torch.no_grad():
        score_head(model).weight[0, 0] += 1
    assert RewardModel(model, tokenizer).fingerprint() != name


def test_pairs_as_batches(tokenizer):
    pairs = [Pair("def f", "(x):", " and so on"), {"prompt": "a", "chosen": "b", "rejected": "cc"}]
    rows = encode_pairs(tokenizer, pairs, 64)
    assert tokenizer.decode(rows[0]["rows"][0], skip_special_tokens=True) == "def f(x):"
    batch = collate(rows)
    assert batch["rows"] == [rows[0]["rows"][0], rows[1]["rows"][0], rows[0]["rows"][1],
                             rows[1]["rows"][1]]  # fmt: skip
    lengths = [len(tokenizer(t, add_special_tokens=False).input_ids) for t in ("(x):",)]
    assert batch["tokens"][0] == lengths[0]
    assert all(len(row) <= 3 for row in encode_pairs(tokenizer, pairs, 3)[0]["rows"])


def planted_pairs(count, seed=0):
    """The preferred answer says yes."""
    rng = random.Random(seed)
    words = ["def", "class", "return", "import", "value", "list", "name", "self"]
    found = []
    for _ in range(count):
        texts = [" ".join(rng.choices(words, k=rng.randint(2, 6))) for _ in range(2)]
        found.append(Pair(rng.choice(words), f" {texts[0]} good", f" {texts[1]} bad"))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bt", "reg", "odin"])
def test_training_learns_a_planted_preference(kind, causal, tokenizer, tmp_path):
    model = from_causal(causal, heads=2 if kind == "odin" else 1)
    config = RewardTraining(kind=kind, learning_rate=5e-3, batch=16, steps=30)
    log = train_reward_model(
        model, tokenizer, planted_pairs(200), config, out=tmp_path, show_progress=False
    )
    assert log[-1]["accuracy"] > 0.9
    test = planted_pairs(40, seed=9)
    score = RewardModel(model, tokenizer)
    chosen = score([p.prompt for p in test], [p.chosen for p in test])
    rejected = score([p.prompt for p in test], [p.rejected for p in test])
    assert (chosen > rejected).float().mean() > 0.9
    assert ("overlap" in log[-1]) == (kind == "odin")
    if kind == "odin":
        assert log[-1]["length_penalty"] < log[0]["length_penalty"]


def test_training_says_nothing_but_its_bar(causal, tokenizer, tmp_path, capsys):
    options = {"out": tmp_path, "config": RewardTraining(batch=2, steps=2)}
    model = from_causal(causal)
    train_reward_model(model, tokenizer, planted_pairs(4), show_progress=False, **options)
    said = capsys.readouterr()
    assert said.out == ""
    assert "reward model" not in said.err
    log = train_reward_model(model, tokenizer, planted_pairs(4), **options)
    said = capsys.readouterr()
    assert said.out == ""
    assert "reward model, bt" in said.err
    assert f"accuracy {log[-1]['accuracy']:.2f}" in said.err


def test_the_loss_of_a_batch_is_that_of_its_scores(causal, tokenizer):
    pairs = planted_pairs(3)
    batch = collate(encode_pairs(tokenizer, pairs, 64))
    model = from_causal(causal)
    c, r = scores(model, batch["rows"])[:, 0].chunk(2)
    for kind, reg in (("bt", 0.0), ("reg", 0.005)):
        loss, found = preference_loss(model, batch["rows"], batch["tokens"], RewardTraining(kind))
        torch.testing.assert_close(loss, bradley_terry(c, r, reg))
        assert found == {"accuracy": float((c > r).float().mean())}
    two = from_causal(causal, heads=2)
    loss, found = preference_loss(
        two, batch["rows"], batch["tokens"],
        RewardTraining("odin", length_weight=2.0, overlap_weight=3.0),
    )  # fmt: skip
    table = scores(two, batch["rows"])
    apart, overlap = odin_penalties(*table.unbind(1), batch["tokens"], score_head(two).weight)
    expected = bradley_terry(*table.sum(1).chunk(2)) + 2 * apart + 3 * overlap
    torch.testing.assert_close(loss, expected)
    assert set(found) == {"accuracy", "length_penalty", "overlap"}


def test_training_that_makes_no_sense(causal, tokenizer):
    with pytest.raises(ValueError, match="kind: expected one of bt, reg, odin"):
        RewardTraining("dpo")
    with pytest.raises(ValueError, match="model: expected 2 heads for odin, got 1"):
        train_reward_model(from_causal(causal), tokenizer, planted_pairs(2), RewardTraining("odin"))
    with pytest.raises(ValueError, match="pairs: expected at least one"):
        train_reward_model(from_causal(causal), tokenizer, [])


def test_warm_is_the_mean_of_weights_in_float32(causal):
    members = [from_causal(causal, seed=seed).bfloat16() for seed in range(3)]
    with torch.no_grad():
        for at, member in enumerate(members):
            for parameter in member.parameters():
                parameter.add_(0.01 * at)
    made = warm(members)
    for name, value in made.named_parameters():
        expected = sum(dict(m.named_parameters())[name].double() for m in members) / 3
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), expected, atol=1e-7, rtol=1e-6)
    assert next(members[0].parameters()).dtype == torch.bfloat16
    other = warm(members, [0.5, 0.5, 0.0])
    head = (score_head(members[0]).weight.double() + score_head(members[1]).weight.double()) / 2
    torch.testing.assert_close(score_head(other).weight.double(), head, atol=1e-7, rtol=1e-6)
    for weights, message in (
        ([1.0], "weights: expected 3, got 1"),
        ([1.0, 1.0, 1.0], "expected a sum of 1, got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            warm(members, weights)
    with pytest.raises(ValueError, match="models: expected at least one"):
        warm([])


def test_the_runs_of_warm_are_the_studys():
    assert len(WARM_RUNS) == 5
    assert WARM_RUNS[0] == (32, 7e-6, 23, 9_700)


def test_an_ensemble_says_how_far_its_members_are_apart():
    def of(value):
        return lambda prompts, completions, **columns: [value, 2 * value]

    logged = {}
    both = Ensemble([of(1.0), of(3.0)])
    assert both(["p", "p"], ["a", "b"], log_metric=logged.__setitem__).tolist() == [2, 4]
    expected = [math.sqrt(2), 2 * math.sqrt(2)]
    assert both.disagreement.tolist() == pytest.approx(expected)
    assert logged == {"ensemble/disagreement": pytest.approx(1.5 * math.sqrt(2))}
    with pytest.raises(ValueError, match="members: expected at least 2, got 1"):
        Ensemble([of(1.0)])
