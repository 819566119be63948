"""Completions: greedy ones against the model's own, drawn ones against its distribution."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from lm_models import EOS, causal, tokenizer
from test_causal import ARCHITECTURES, lm_of, words

from gemma_ext.lm import Sampling


def own(lm, prompt: str, count: int) -> list[int]:
    """What the model's own generate makes of one prompt."""
    ids = torch.tensor(lm.text.encode([prompt]))
    return lm.model.generate(ids, max_new_tokens=count, do_sample=False)[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("name", ["Gemma2", "Llama", "OPT", "Mamba", "FalconH1"])
@pytest.mark.parametrize("batch_tokens", [1, 100, 10_000])
def test_greedy_completions_are_those_of_one_prompt_at_a_time(name, batch_tokens):
    lm = lm_of(causal(name, **ARCHITECTURES[name]), batch_tokens=batch_tokens)
    prompts = [*words(6, 6, 40), ""]
    for prompt, completion in zip(prompts, lm.generate(prompts, Sampling(9)), strict=True):
        ids = own(lm, prompt, 9)
        ids = ids[: ids.index(EOS)] if EOS in ids else ids
        assert completion.text == lm.text.decode(lm.text.encode([prompt])[0], ids)
        assert completion.tokens == len(ids)
        assert completion.finished == (len(ids) < 9)


def test_the_head_reads_dense_states_and_is_left_as_it_was():
    lm = lm_of(causal(), batch_tokens=10_000)
    seen = []
    handle = lm.model.lm_head.register_forward_hook(
        lambda _, inputs, __: seen.append((inputs[0].shape[0], inputs[0].is_contiguous()))
    )
    lm.generate(words(4, 6, 20), Sampling(2))
    handle.remove()
    assert seen == [(6, True)] * 2
    assert not lm.model.lm_head._forward_pre_hooks


def test_end_of_text_ends_a_completion():
    lm = lm_of(causal())
    ids = own(lm, "abc", 8)
    end = ids[3]
    lm.model.generation_config.eos_token_id = [EOS, end]
    (found,) = lm.generate(["abc"], Sampling(8))
    first = ids.index(end)
    assert (found.tokens, found.finished) == (first, True)
    assert found.text == lm.text.decode([], ids[:first])


def test_a_stop_string_ends_a_completion_and_is_not_part_of_it():
    lm = lm_of(causal())
    prompts = words(8, 5, 20)
    for prompt, whole in zip(prompts, lm.generate(prompts, Sampling(12)), strict=True):
        stop = whole.text[4:6]
        steps = []
        handle = lm.model.register_forward_hook(lambda *_, steps=steps: steps.append(1))
        (found,) = lm.generate([prompt], Sampling(12, stop=["never met", stop]))
        handle.remove()
        assert found.text == whole.text[: whole.text.index(stop)]
        assert found.finished
        assert found.tokens == len(steps) < 12


def test_draws_follow_the_distribution():
    lm = lm_of(causal(final_logit_softcapping=4.0))
    count = 4000
    sampling = Sampling(1, temperature=0.7, top_k=6, top_p=0.95)
    drawn = Counter(c.text for c in lm.generate(["abc"] * count, sampling))
    with torch.no_grad():
        logits = lm.model(torch.tensor(lm.text.encode(["abc"]))).logits[0, -1].double() / 0.7
    share = logits.topk(6).values.softmax(0)
    kept = int((share.cumsum(0) < 0.95).sum()) + 1
    share = share[:kept] / share[:kept].sum()
    shares = Counter()  # bytes that are no character by themselves share a name
    for token, p in zip(logits.topk(6).indices.tolist(), share.tolist(), strict=False):
        shares[lm.text.decode(lm.text.encode(["abc"])[0], [token])] += p
    assert set(drawn) <= set(shares)
    for name, p in shares.items():
        # six standard deviations of a binomial share
        assert abs(drawn[name] / count - p) < 6 * (p * (1 - p) / count) ** 0.5


def test_a_draw_depends_on_seed_prompt_and_repetition_alone():
    lm = lm_of(causal(final_logit_softcapping=4.0))
    sampling = Sampling(10, temperature=1.0, seed=3)
    prompts = ["abc", "xyz 12", "abc", "q"]
    together = lm.generate(prompts, sampling)
    assert together == lm.generate(prompts, sampling)
    assert together[0] != together[2]
    assert lm.generate(["q"], sampling) == [together[3]]
    assert lm.generate(["abc", "abc"], sampling) == [together[0], together[2]]
    other = lm.generate(prompts, Sampling(10, temperature=1.0, seed=4))
    assert all(one != two for one, two in zip(together, other, strict=True))


def test_long_prompts_leave_room():
    lm = lm_of(causal("Llama"), max_length=20)
    (found,) = lm.generate(["x" * 40 + "abc"], Sampling(8))
    ids = torch.tensor([lm.text.encode(["x" * 40 + "abc"])[0][-12:]])
    own = lm.model.generate(ids, max_new_tokens=8, do_sample=False)[0, 12:].tolist()
    assert found.text == lm.text.decode([], own[: own.index(EOS)] if EOS in own else own)
    with pytest.raises(ValueError, match="max_tokens below the 20 tokens that the model takes"):
        lm.generate(["x"], Sampling(20))


def test_the_models_own_habits_do_not_count():
    model = causal()
    lm = lm_of(model)
    plain = lm.generate(["abc"], Sampling(8))
    model.generation_config.update(do_sample=True, temperature=9.0, repetition_penalty=5.0)
    assert lm.generate(["abc"], Sampling(8)) == plain


def test_a_lora_model_writes_and_keeps_its_configurations():
    from peft import LoraConfig, get_peft_model

    base = causal()
    config = LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
    lm = lm_of(get_peft_model(base, config))
    before = base.generation_config
    (found,) = lm.generate(["abc"], Sampling(8))
    assert base.generation_config is lm.model.generation_config is before
    merged = lm.model.merge_and_unload()
    assert lm_of(merged).generate(["abc"], Sampling(8)) == [found]


def test_chats_are_rendered_by_the_template():
    lm = lm_of(causal())
    chat = [{"role": "user", "content": "abc"}]
    with pytest.raises(ValueError, match="expected prompts of text, got messages and no chat"):
        lm.generate([chat])
    lm.text.tokenizer.chat_template = (
        "<bos>{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[model]{% endif %}"
    )
    rendered = "<bos>[user]abc[model]"
    assert lm.generate([chat], Sampling(5)) == lm.generate([rendered], Sampling(5))
    assert lm.logprobs([chat], ["xy"]) == lm.logprobs([rendered], ["xy"])
    assert lm.text.encode([rendered])[0].count(2) == 1


def test_a_tokenizer_without_padding_will_do():
    text = tokenizer()
    text.pad_token = None
    from gemma_ext.lm import HuggingFaceModel

    model = causal("Llama")
    lm = HuggingFaceModel(model, text, show_progress=False)
    expected = lm_of(model).generate(["abc", "x"], Sampling(5))
    assert lm.generate(["abc", "x"], Sampling(5)) == expected
