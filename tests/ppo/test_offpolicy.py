"""Responses that another policy drew: what is told, weighed, and learned from."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from toy_ppo import PAD, VOCABULARY, tiny, trainer

from gemma_ext.nn.ppo import FrozenReference, Sequences, importance_weights, token_weights
from gemma_ext.ppo import Generate, PPOConfig, Rollout
from gemma_ext.ppo.engine_rollout import EngineSampler
from gemma_ext.ppo.experience import Experience
from gemma_ext.ppo.update import Update


def odd(completion_ids, **columns):
    return [float(sum(i % 2 for i in ids)) for ids in completion_ids]


class Hotter:
    """Draws at another temperature than the policy is trained at, and says so."""

    def __init__(self, config: PPOConfig) -> None:
        self.inner = Generate(dataclasses.replace(config, temperature=1.6), [], PAD)

    def __call__(self, *given, **options) -> Rollout:
        return self.inner(*given, **options)


@pytest.fixture
def made(tmp_path):
    def make(**options):
        found = trainer(
            tmp_path,
            steps=1,
            parts={
                "reference": FrozenReference(tiny()),
                "rewards": odd,
                **options.pop("parts", {}),
            },
            kl_target=None,
            learning_rate=1e-2,
            **options,
        )
        found.built = []
        run = found.update.run
        found.update.run = lambda batch, *rest: found.built.append(batch) or run(batch, *rest)
        return found

    return make


def test_own_responses_have_ratio_and_weight_one(made):
    run = made(importance_cap=2.0)
    line = run.train_step()
    assert line["sampler/difference"] < 1e-5
    batch = run.built[0]
    torch.testing.assert_close(batch.packed("weights"), torch.ones(batch.sequences.lengths.sum()))
    first = run.updates[0]
    assert first["approxkl"] < 1e-12
    assert first["ratio"] == pytest.approx(1, abs=1e-6)
    assert first["ratio_max"] - first["ratio_min"] < 1e-5
    assert first["clipfrac"] == 0
    assert run.updates[-1]["approxkl"] > 1e-8
    assert line["objective/kl"] == pytest.approx(0, abs=1e-5)


def test_the_engines_responses_too(made):
    run = made(importance_cap=2.0, rollouts="engine")
    assert isinstance(run.sampler, EngineSampler)
    line = run.train_step()
    assert line["sampler/difference"] < 1e-5
    assert run.updates[0]["ratio"] == pytest.approx(1, abs=1e-6)


def test_weights_are_those_of_the_sampler(made):
    run = made(importance_cap=1.5)
    run.sampler = Hotter(run.config)
    told = []
    draw = run.respond
    run.respond = lambda *given, **options: told.append(draw(*given, **options)) or told[-1]
    line = run.train_step()
    batch, rollout = run.built[0], told[0]
    expected = (batch.packed("logprobs") - rollout.logprobs).exp()
    assert expected.max() > 1.5
    torch.testing.assert_close(batch.packed("weights"), expected.clamp(max=1.5))
    assert line["sampler/k3"] > 1e-3
    assert run.updates[0]["ratio"] == pytest.approx(1, abs=1e-6)  # of training to training


def test_without_a_cap_the_sampler_is_trusted(made):
    run = made()
    run.sampler = Hotter(run.config)
    run.train_step()
    assert (run.built[0].packed("weights") == 1).all()


def gradient(policy, experience: Experience, config: PPOConfig) -> torch.Tensor:
    """Of one optimiser step over all rows."""
    update = Update(config, policy, None, FrozenReference(tiny()))
    kept = []
    update.optimisers[0].step = lambda: kept.extend(p.grad.clone() for p in update.trained())
    update.step(experience, torch.arange(len(experience.sequences)))
    return torch.cat([g.flatten() for g in kept])


def test_weighed_gradients_are_those_of_the_policy():
    """Every first token once, in the shares of either policy: sum_v q_v w_v g_v = sum_v p_v g_v.

    A row for each token stands for its share by its advantage.
    """
    policy = tiny()
    config = PPOConfig(
        advantage="reinforce++", response_length=1, temperature=1.0, max_grad_norm=None,
        per_device_train_batch_size=16,
    )  # fmt: skip
    prompts = torch.tensor([[5, 6]]).repeat(VOCABULARY, 1)
    every = torch.arange(VOCABULARY)[:, None]
    ones = torch.ones(VOCABULARY, dtype=torch.int64)
    sequences = Sequences.of_lengths(prompts, torch.ones_like(prompts), every, ones)
    logp = FrozenReference(tiny()).logprobs(sequences)
    logq = (logp / 1.6).log_softmax(0)
    values = torch.randn(VOCABULARY)
    w = importance_weights(logp, logq, cap=None)

    def found(share, weights):
        batch = Experience(sequences, logp[:, None], (share * values)[:, None], weights[:, None])
        return gradient(policy, batch, config)

    on_policy = found(logp.exp(), torch.ones(VOCABULARY))
    torch.testing.assert_close(found(logq.exp(), w), on_policy, atol=1e-6, rtol=1e-4)
    unweighed = found(logq.exp(), torch.ones(VOCABULARY))
    assert (unweighed - on_policy).norm() > 0.1 * on_policy.norm()


def test_weights_enter_the_loss_token_by_token():
    """Half the weight is half the gradient, in every aggregation."""
    policy = tiny()
    prompts = torch.tensor([[5, 6], [7, 8]])
    responses = torch.tensor([[3, 4, 9], [11, 12, 0]])
    lengths = torch.tensor([3, 2])
    sequences = Sequences.of_lengths(prompts, torch.ones_like(prompts), responses, lengths)
    logp = sequences.unpack(FrozenReference(tiny()).logprobs(sequences))
    advantages = sequences.unpack(torch.randn(5))
    config = PPOConfig(
        advantage="reinforce++", response_length=3, temperature=1.0, max_grad_norm=None,
        aggregation="seq-mean-token-sum-norm",
    )  # fmt: skip
    whole = gradient(policy, Experience(sequences, logp, advantages, torch.ones(2, 3)), config)
    half = Experience(sequences, logp, advantages, torch.full((2, 3), 0.5))
    torch.testing.assert_close(gradient(policy, half, config), whole / 2, atol=1e-6, rtol=1e-4)
    weights = token_weights(lengths, "seq-mean-token-sum-norm", horizon=3)
    other = dataclasses.replace(config, aggregation="token-mean")
    scaled = sequences.unpack(weights * 5) * advantages
    mean = gradient(policy, Experience(sequences, logp, scaled, torch.ones(2, 3)), other)
    torch.testing.assert_close(mean, whole, atol=1e-6, rtol=1e-4)
