"""Rollouts by the engine: the same distribution as the training forward, on live weights."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from gemma_ext.nn.ppo import FrozenReference, Sequences
from gemma_ext.ppo.config import PPOConfig
from gemma_ext.ppo.engine_rollout import EngineSampler
from gemma_ext.ppo.rollout import Generate
from gemma_ext.serve.exits import ExitTest

VOCABULARY, END, PAD = 61, 1, 0
PROMPTS = [[5, 6, 7], [8], list(range(10, 29)), [30, 31], [9, 9, 9, 9, 9]]
SEEDS = [3, 1, 4, 1, 5]


def tiny(loops: int = 1, seed: int = 0) -> nn.Module:
    config = transformers.Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=96,
        sliding_window=16,
        attn_implementation="eager",
        final_logit_softcapping=4.0,
    )
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    if loops > 1:
        from gemma_ext.nn.recursive import Plan, make_recursive

        ranks = {"self_attn.q_proj": 3, "mlp.down_proj": 3}
        make_recursive(model, Plan.of(4, loops, ranks=ranks))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def adapted(model: nn.Module) -> nn.Module:
    peft = pytest.importorskip("peft")
    made = peft.get_peft_model(
        model, peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"])
    )
    noise(made, lambda name: "lora" in name)
    return made.eval()


@torch.no_grad()
def noise(model: nn.Module, chosen=lambda name: True) -> None:
    """What an optimiser does: every tensor is written in place."""
    for name, parameter in model.named_parameters():
        if chosen(name):
            parameter.add_(0.2 * torch.randn_like(parameter))


def sampler(**options) -> EngineSampler:
    config = PPOConfig(response_length=11, temperature=0.7, local_rollout_forward_batch_size=3)
    return EngineSampler(config, [END], PAD, **options)


def training_logprobs(model: nn.Module, sequences: Sequences) -> torch.Tensor:
    trained = [p.requires_grad for p in model.parameters()]
    found = FrozenReference(model).logprobs(sequences, 0.7)
    for parameter, train in zip(model.parameters(), trained, strict=True):
        parameter.requires_grad_(train)
    return found


@pytest.mark.parametrize("kind", ["plain", "recursive", "lora"])
def test_sampled_and_training_logprobs_agree_before_and_after_an_update(kind):
    model = tiny(2 if kind == "recursive" else 1)
    if kind == "lora":
        model = adapted(model)
    draw = sampler()
    before = draw(model, PROMPTS, SEEDS)
    engine = draw.engine
    noise(model, lambda name: "lora" in name or kind != "lora")
    after = draw(model, PROMPTS, SEEDS)
    assert draw.engine is engine
    again = sampler()(model, PROMPTS, SEEDS)
    assert torch.equal(after.sequences.ids, again.sequences.ids)
    assert torch.equal(after.logprobs, again.logprobs)
    assert not torch.equal(before.logprobs[:5], after.logprobs[:5])
    expected = training_logprobs(model, after.sequences)
    torch.testing.assert_close(after.logprobs, expected, atol=2e-5, rtol=0)


def test_as_generate_for_greedy_responses():
    model = tiny()
    config = PPOConfig(response_length=11, temperature=1.0)
    theirs = Generate(config, [END], PAD)(model, PROMPTS, SEEDS, greedy=True)
    ours = EngineSampler(config, [END], PAD)(model, PROMPTS, SEEDS, greedy=True)
    assert torch.equal(ours.sequences.ids, theirs.sequences.ids)
    assert torch.equal(ours.sequences.mask, theirs.sequences.mask)
    assert torch.equal(ours.sequences.response_mask, theirs.sequences.response_mask)
    torch.testing.assert_close(ours.logprobs, theirs.logprobs, atol=2e-5, rtol=0)
    assert sampler()(model, PROMPTS, SEEDS, greedy=True).logprobs is None


def test_a_response_does_not_depend_on_its_batch():
    model = tiny()
    together = sampler()(model, PROMPTS, SEEDS)
    for place, (prompt, seed) in enumerate(zip(PROMPTS, SEEDS, strict=True)):
        alone = sampler()(model, [prompt], [seed]).sequences
        length = int(alone.lengths[0])
        assert int(together.sequences.lengths[place]) == length
        row = together.sequences.responses[place, :length]
        assert torch.equal(row, alone.responses[0, :length])
    lengths = together.sequences.lengths
    assert lengths.max() <= 11
    assert ((together.sequences.responses == END).sum(1) <= 1).all()


def test_early_exits_tell_their_own_logprobs():
    """Which are not the full model's: the importance weight has something to correct."""
    model = tiny(loops=2)
    early = ExitTest("max_prob", threshold=0.05)
    found = sampler(exits=early)(model, PROMPTS, SEEDS)
    full = training_logprobs(model, found.sequences)
    assert found.logprobs.isfinite().all()
    assert (found.logprobs - full).abs().max() > 1e-2


def test_a_longer_prompt_makes_a_larger_engine():
    model, draw = tiny(), sampler()
    first = draw(model, PROMPTS[:2], SEEDS[:2])
    engine = draw.engine
    draw(model, [list(range(2, 60))], [0])
    assert draw.engine is not engine
    assert torch.equal(draw(model, PROMPTS[:2], SEEDS[:2]).logprobs, first.logprobs)
    draw.release()
    assert draw.engine is None
    assert torch.equal(draw(model, PROMPTS[:2], SEEDS[:2]).logprobs, first.logprobs)


def test_what_the_engine_does_not_run():
    with pytest.raises(ValueError, match="prefix_cache: expected none over weights"):
        sampler(prefix_cache=True)
    with pytest.raises(
        ValueError, match="prompt and response: expected at most 96 tokens, got 111"
    ):
        sampler()(tiny(), [[3] * 100], [0])
    peft = pytest.importorskip("peft")
    dora = peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)
    with pytest.raises(
        ValueError, match="expected plain LoRA adapters, got another kind in default"
    ):
        sampler()(peft.get_peft_model(tiny(), dora), PROMPTS, SEEDS)
    head = peft.LoraConfig(r=2, target_modules=["lm_head"])
    with pytest.raises(ValueError, match="adapters of the layers alone, got one of the head"):
        sampler()(peft.get_peft_model(tiny(), head), PROMPTS, SEEDS)
