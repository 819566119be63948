"""The whole trainer on responses of one token: a transformer reaches ref exp(r / beta) / Z."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from toy_ppo import Tokenizer, tiny

from gemma_ext.nn.ppo import FrozenReference, Sequences
from gemma_ext.ppo import PPOConfig, PPOTrainer

V, BETA = 11, 0.5
PROMPTS = [{"input_ids": [2]}, {"input_ids": [3, 4]}, {"input_ids": [5]}]
REWARD = torch.rand(V, generator=torch.Generator().manual_seed(3))


def policy(seed: int = 0) -> nn.Module:
    return tiny(seed, vocab_size=V)


def soup() -> nn.Module:
    """The mean of the weights of two models."""
    mean, other = policy(0), policy(1)
    with torch.no_grad():
        for mine, theirs in zip(mean.parameters(), other.parameters(), strict=True):
            mine.lerp_(theirs, 0.5)
    return mean


def logprobs(model: nn.Module) -> torch.Tensor:
    """[3, V] of the first token behind each prompt."""
    every, ones = torch.arange(V)[:, None], torch.ones(V, dtype=torch.int64)
    found = []
    for row in PROMPTS:
        prompts = torch.tensor([row["input_ids"]]).repeat(V, 1)
        made = Sequences.of_lengths(prompts, torch.ones_like(prompts), every, ones)
        found.append(FrozenReference(copy.deepcopy(model)).logprobs(made))
    return torch.stack(found)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reference", "options"),
    [
        (policy, {}),
        (soup, {}),
        (policy, {"advantage": "rloo", "num_generations": 8}),
    ],
    ids=["frozen", "soup", "rloo"],
)
def test_converges_to_the_optimum(reference, options, tmp_path):
    def reward(completion_ids, **columns):
        return [float(REWARD[ids[0]]) for ids in completion_ids]

    trained, ref = reference(), reference()
    steps, batch = 80, 48
    config = PPOConfig(
        output_dir=tmp_path,
        total_episodes=steps * batch,
        per_device_train_batch_size=batch,
        num_ppo_epochs=2,
        response_length=1,
        temperature=1.0,
        stop_token_id=1,
        kl_coef=BETA,
        learning_rate=5e-3,
        value_learning_rate=1e-2,
        vf_coef=1.0,
        cliprange_value=None,
        whiten_advantages=False,
        save_steps=steps,
        logging_steps=steps,
        sample_prompts=0,
        **options,
    )
    made = PPOTrainer(
        config, trained, FrozenReference(ref), reward, PROMPTS, tokenizer=Tokenizer(),
        show_progress=False,
    )  # fmt: skip
    best = (logprobs(ref) + REWARD / BETA).softmax(-1)

    def apart() -> float:
        return float((logprobs(trained).exp() - best).abs().sum(-1).max() / 2)

    assert apart() > 0.15
    made.train()
    assert apart() < 0.02
