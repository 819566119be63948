"""Scores of decoders against their own logits, one unpadded sequence at a time."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from lm_models import by_hand, causal, tokenizer

from gemma_ext.lm import HuggingFaceModel, LanguageModel
from gemma_ext.lm import causal as causal_module
from gemma_ext.lm.text import Job

# plain and grouped heads, soft-caps, alternating and all sliding windows (shorter than the
# prompts), absolute positions, a bias and a scale on the logits, positions from the mask, experts,
# and three whose state is no list of keys, so that nothing is shared
ARCHITECTURES = {
    "Gemma2": {"sliding_window": 8, "final_logit_softcapping": 3.0},
    "Gemma3": {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "Llama": {},
    "Mistral": {"sliding_window": 7},
    "Qwen3": {},
    "GPT2": {"n_positions": 96, "n_embd": 32, "n_head": 4, "n_layer": 2},
    "Phi": {},
    "Cohere": {"logit_scale": 0.25},
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "Mixtral": {"num_local_experts": 4},
    "Mamba": {"state_size": 4, "scale": 2.0},
    "FalconH1": {"mamba_d_ssm": 32, "mamba_n_heads": 4},
    "RecurrentGemma": {"logits_soft_cap": 5.0},
}


# its gates take 1 - a^2 of an a near 1, which multiplies the rounding of a
TOLERANCES = {"RecurrentGemma": 2e-4}


def lm_of(model, **options) -> HuggingFaceModel:
    return HuggingFaceModel(model, tokenizer(), show_progress=False, **options)


def words(seed: int, count: int, longest: int) -> list[str]:
    draw = random.Random(seed)
    return [
        "".join(draw.choices("abc  bl xyz\n", k=draw.randint(1, longest))) for _ in range(count)
    ]


def assert_scored(lm: HuggingFaceModel, jobs: list[Job], scores, tolerance: float = 2e-5) -> None:
    for job, score in zip(jobs, scores, strict=True):
        expected, greedy = by_hand(lm.model, job, lm.max_length)
        assert score.token_logprobs == pytest.approx(expected, abs=tolerance)
        assert score.greedy == greedy


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("batch_tokens", [1, 150, 10_000])
def test_options_behind_a_shared_prompt(name, batch_tokens):
    lm = lm_of(causal(name, **ARCHITECTURES[name]), batch_tokens=batch_tokens)
    prompts = [word + " end" for word in words(1, 5, 60)]
    options = [words(seed, 4, 9) for seed in range(5)]
    found = lm.choices(prompts, options)
    pairs = [(p, o) for p, some in zip(prompts, options, strict=True) for o in some]
    scores = itertools.chain(*(c.scores for c in found))
    assert_scored(lm, lm.text.jobs(pairs), scores, TOLERANCES.get(name, 2e-5))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_pairs_of_their_own_prompts(name):
    lm = lm_of(causal(name, **ARCHITECTURES[name]), batch_tokens=200)
    prompts, texts = words(2, 12, 40), words(3, 12, 20)
    scores = lm.logprobs(prompts, texts)
    jobs = lm.text.jobs(list(zip(prompts, texts, strict=True)))
    assert_scored(lm, jobs, scores, TOLERANCES.get(name, 2e-5))


def test_prompts_are_shared_where_that_saves(monkeypatch):
    model = causal(sliding_window=8)
    widths = []
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: widths.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    lm = lm_of(model)
    prompt = "x" * 50
    lm.choices([prompt], [["yy", "zzz", "w", "yyyy"]])
    # <bos> and 49 once; "w" is read off the end of the prompt, "yy" off the start of "yyyy"
    assert widths == [(1, 50), (2, 4)]
    widths.clear()
    monkeypatch.setattr(causal_module, "_keeps_plain_keys", lambda model: False)
    lm.choices([prompt], [["yy", "zzz", "w", "yyyy"]])
    assert widths == [(2, 54)]


def test_one_token_options_cost_one_sequence():
    model = causal()
    rows = []
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    lm = lm_of(model)
    lm.choices(["which letter?", "and now?"], list("xyzw"))
    assert rows == [2]


def test_long_prompts_lose_their_start():
    lm = lm_of(causal("Llama"), max_length=24)
    prompts, options = ["x" * 40 + "y", "z" * 22], [["ab", "abcxyz", "q" * 24], ["w", "ww", "qqq"]]
    found = lm.choices(prompts, options)
    pairs = [(p, o) for p, some in zip(prompts, options, strict=True) for o in some]
    assert_scored(lm, lm.text.jobs(pairs), [s for choice in found for s in choice.scores])
    with pytest.raises(ValueError, match="continuations of at most 24 tokens, got one of 25"):
        lm.logprobs(["x"], ["q" * 25])


def test_empty_prompts_and_continuations():
    lm = lm_of(causal())
    first, empty, whole = lm.logprobs(["", "abc", ""], ["xyz", "", ""])
    assert_scored(lm, [Job([2], [lm.text.bare(["xyz"])[0]][0])], [first])
    assert empty == whole
    assert (empty.token_logprobs, empty.logprob, empty.greedy) == ((), 0.0, True)
    assert lm.logprobs([], []) == [] == lm.choices([], []) == lm.perplexity([]) == lm.generate([])


def test_scores_do_not_depend_on_the_batch():
    model = causal(sliding_window=8)
    prompts, texts = words(4, 20, 50), words(5, 20, 12)
    alone = lm_of(model, batch_tokens=1).logprobs(prompts, texts)
    together = lm_of(model, batch_tokens=10_000).logprobs(prompts, texts)
    for one, other in zip(alone, together, strict=True):
        assert one.token_logprobs == pytest.approx(other.token_logprobs, abs=2e-5)


def test_bfloat16_scores_are_near_those_of_the_rounded_weights_in_float32():
    model = causal(sliding_window=8).bfloat16()
    prompts, options = [w + "!" for w in words(6, 6, 50)], ["ab", " bl", "xyz"]
    rounded = lm_of(model).choices(prompts, options)
    exact = lm_of(causal(sliding_window=8)).choices(prompts, options)
    errors = [
        abs(a - b)
        for one, other in zip(rounded, exact, strict=True)
        for s, t in zip(one.scores, other.scores, strict=True)
        for a, b in zip(s.token_logprobs, t.token_logprobs, strict=True)
    ]
    assert 0 < max(errors) < 0.5
    assert sum(errors) / len(errors) < 0.1


def test_float64_is_scored_by_the_reference():
    model = causal().double()
    lm = lm_of(model, impl="reference")
    job = lm.text.jobs([("abc", " blx")])
    assert_scored(lm, job, lm.logprobs(["abc"], [" blx"]), tolerance=1e-6)


def test_dropout_is_off_and_modes_come_back():
    model = causal("Llama", attention_dropout=0.5).train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    lm = lm_of(model)
    assert lm.logprobs(["abc"], ["xyz"]) == lm.logprobs(["abc"], ["xyz"])
    assert [module.training for module in model.modules()] == modes


def test_no_gradient_is_kept():
    model = causal()
    lm_of(model).perplexity(["abc"])
    assert torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_it_is_a_language_model():
    assert isinstance(lm_of(causal()), LanguageModel)


def test_a_prompt_may_be_run_with_each_of_its_options():
    model = causal()
    prompts, options = words(5, 12, 20), ["a", "bc", " abc abc"]
    calls = []
    handle = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs["use_cache"]), with_kwargs=True
    )
    apart = lm_of(model, share_prompts=False).choices(prompts, options)
    handle.remove()
    assert calls
    assert not any(calls)  # nothing goes on from the keys of another call
    for one, other in zip(apart, lm_of(model).choices(prompts, options), strict=True):
        assert one.values() == pytest.approx(other.values(), abs=1e-3)
