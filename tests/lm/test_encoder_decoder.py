"""Scores and completions of encoder-decoders against their own logits, one pair at a time."""

from __future__ import annotations

import pytest
import torch
import transformers
from lm_models import BOS, EOS, PAD, tokenizer
from test_causal import words

from gemma_ext.lm import HuggingFaceModel, Sampling

# relative positions with scaled and with plain tied heads, a bias on the logits, soft-caps
VOCAB = len(tokenizer())
BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 96,
}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
GEMMA = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 8,
}
ARCHITECTURES = {
    "T5": T5,
    "MT5": T5,
    "Bart": BART,
    "T5Gemma": {"encoder": GEMMA, "decoder": {**GEMMA, "final_logit_softcapping": 3.0}},
}
SPECIAL = {
    name: {
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        # T5Gemma takes padding out of its decoder's attention
        "decoder_start_token_id": BOS if name == "T5Gemma" else PAD,
    }
    for name in ARCHITECTURES
}


def model_of(name: str):
    torch.manual_seed(0)
    cls = getattr(transformers, f"{name}ForConditionalGeneration")
    model = cls(cls.config_class(**ARCHITECTURES[name], vocab_size=VOCAB, **SPECIAL[name])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2.0)
        if name == "Bart":
            model.final_logits_bias.normal_()
    return model


def lm_of(name: str, **options) -> HuggingFaceModel:
    text = tokenizer(bos=False, eos=True)
    return HuggingFaceModel(model_of(name), text, show_progress=False, **options)


def by_hand(model, context: list[int], targets: list[int]) -> tuple[list[float], bool]:
    start = model.config.decoder_start_token_id
    with torch.no_grad():
        logits = (
            model(
                input_ids=torch.tensor([context]),
                decoder_input_ids=torch.tensor([[start, *targets[:-1]]]),
            )
            .logits[0]
            .double()
        )
    found = logits.log_softmax(-1).gather(1, torch.tensor(targets)[:, None])[:, 0]
    return found.tolist(), logits.argmax(-1).tolist() == targets


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("batch_tokens", [1, 150, 10_000])
def test_options_of_prompts(name, batch_tokens):
    lm = lm_of(name, batch_tokens=batch_tokens)
    prompts, options = words(1, 5, 60), [words(seed, 4, 9) for seed in range(5)]
    for prompt, some, choice in zip(prompts, options, lm.choices(prompts, options), strict=True):
        for option, score in zip(some, choice.scores, strict=True):
            context = [*lm.text.bare([prompt])[0], EOS]
            expected, greedy = by_hand(lm.model, context, lm.text.bare([option])[0])
            assert score.token_logprobs == pytest.approx(expected, rel=1e-5, abs=2e-5)
            assert score.greedy == greedy


def test_every_prompt_is_encoded_once():
    lm = lm_of("T5")
    rows = []
    lm.model.encoder.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    lm.choices(["one", "two", "one"], ["a", "b", "c"])
    assert rows == [2]


def test_long_prompts_lose_their_start():
    lm = lm_of("Bart", max_length=10)
    (score,) = lm.logprobs(["x" * 30 + "yz"], ["abc"])
    context = [*lm.text.bare(["x" * 30 + "yz"])[0], EOS][-10:]
    expected, _ = by_hand(lm.model, context, lm.text.bare(["abc"])[0])
    assert score.token_logprobs == pytest.approx(expected, rel=1e-5, abs=2e-5)
    with pytest.raises(ValueError, match="continuations of at most 10 tokens, got one of 11"):
        lm.logprobs(["x"], ["q" * 11])


def test_empty_prompts_and_texts():
    lm = lm_of("T5")
    empty, score = lm.logprobs(["", ""], ["", "xy"])
    assert empty.token_logprobs == ()
    expected, _ = by_hand(lm.model, [EOS], lm.text.bare(["xy"])[0])
    assert score.token_logprobs == pytest.approx(expected, rel=1e-5, abs=2e-5)
    (found,) = lm.perplexity(["xy"])
    assert found.logprob == pytest.approx(score.logprob, abs=1e-6)
    assert (found.tokens, found.words, found.bytes) == (2, 1, 2)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_completions_are_those_of_one_prompt_at_a_time(name):
    lm = lm_of(name)
    lm.model.generation_config.forced_eos_token_id = None  # Bart cuts its own with one
    prompts = words(7, 6, 30)
    found = lm.generate(prompts, Sampling(max_tokens=7))
    for prompt, completion in zip(prompts, found, strict=True):
        ids = torch.tensor([[*lm.text.bare([prompt])[0], EOS]])
        output = lm.model.generate(ids, max_new_tokens=7, do_sample=False)[0, 1:].tolist()
        kept = output[: output.index(EOS)] if EOS in output else output
        assert completion.text == lm.text.decode([], kept)
        assert completion.tokens == len(kept)


def test_a_decoder_without_a_start_is_refused():
    model = model_of("T5")
    for config in (model.config, model.generation_config):
        config.decoder_start_token_id = config.bos_token_id = None
    with pytest.raises(ValueError, match="T5ForConditionalGeneration to have a decoder_start"):
        HuggingFaceModel(model, tokenizer(bos=False, eos=True))
