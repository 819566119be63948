"""Optimiser steps on a batch: one gradient path, exact in any number of pieces and ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gemma_ext.nn.ppo import (
    PolicyLoss,
    Reference,
    ValueLoss,
    count,
    entropy_loss,
    exact_kl,
    kl_estimate,
    moments,
    policy_loss,
    policy_metrics,
    read,
    token_weights,
    value_loss,
)
from gemma_ext.nn.ppo.critic import Critic
from gemma_ext.ppo.config import PPOConfig
from gemma_ext.ppo.decay import decay_groups
from gemma_ext.ppo.experience import Experience
from gemma_ext.ppo.ranks import Gradients, clip_gradients, everyone
from gemma_ext.ppo.rollout import seed_of


class _Seen(NamedTuple):
    """Of the tokens of a micro-batch, without gradient."""

    logprobs: Tensor
    old: Tensor
    policy: PolicyLoss
    entropy: Tensor
    value: ValueLoss | None


class Update:
    """The optimisers of a policy and its critic.

    The divisor of every mean is that of the whole optimiser step, over its micro-batches and
    ranks, so that how a step is cut into pieces does not change it.

    Args:
        policy: with trainable parameters.
        critic: None without one.
        reference: for a divergence in the loss.

    Raises:
        ValueError: nothing to train, or weights to train in 16 bits.
    """

    def __init__(
        self,
        config: PPOConfig,
        policy: nn.Module,
        critic: Critic | None,
        reference: Reference,
    ) -> None:
        self.config, self.policy, self.critic, self.reference = config, policy, critic, reference
        theirs = [] if critic is None else list(critic.trained())
        known = {id(p) for p in theirs}
        ours = [p for p in policy.parameters() if p.requires_grad and id(p) not in known]
        if not ours:
            raise ValueError("policy: expected trainable parameters, got none")
        for parameter in (*ours, *theirs):
            if parameter.dtype not in (torch.float32, torch.float64):
                raise ValueError(
                    f"policy: expected trainable weights in float32, got {parameter.dtype}, whose "
                    "rounding swallows small steps; load it in float32 and set bf16, or train an "
                    "adapter"
                )
        self.groups = [group for group in (ours, theirs) if group]
        modules = [policy] if critic is None else [policy, critic]
        self.optimisers = [self._adam(group, modules) for group in self.groups]
        self.gradients = Gradients(modules, [*ours, *theirs])

    def run(
        self, experience: Experience, step: int, coef: float, factor: float
    ) -> list[dict[str, float]]:
        """All epochs over a batch.

        Args:
            step: of the run, for the order of the rows.
            coef: beta of a divergence in the loss.
            factor: of the learning rates.

        Returns:
            Metrics of each optimiser step, over all ranks.
        """
        rates = (self.config.learning_rate, self.value_rate)
        for optimiser, rate in zip(self.optimisers, rates, strict=False):
            for group in optimiser.param_groups:
                group["lr"] = rate * factor
        found = []
        for epoch in range(self.config.num_ppo_epochs):
            stream = torch.Generator().manual_seed(seed_of(self.config.seed, "rows", step, epoch))
            rows = torch.randperm(len(experience.sequences), generator=stream)
            for part in rows.chunk(self.config.num_mini_batches):
                found.append(self.step(experience, part, coef))
        return found

    @property
    def value_rate(self) -> float:
        rate = self.config.value_learning_rate
        return self.config.learning_rate if rate is None else rate

    def step(self, experience: Experience, rows: Tensor, coef: float = 0.0) -> dict[str, float]:
        """One optimiser step on some rows; its metrics over all ranks."""
        rows = rows.to(experience.sequences.ids.device)
        counts = count(experience.sequences.lengths[rows], everyone())
        pieces = rows.split(self.config.per_device_train_batch_size)
        seen = []
        for piece in pieces:
            with self.gradients.accumulating():
                seen.append(self._backward(experience[piece], counts, coef))
        self.gradients.average()
        norms = {}
        for name, group, optimiser in zip(
            ("policy", "value"), self.groups, self.optimisers, strict=False
        ):
            norms[f"{name}/grad_norm"] = clip_gradients(group, self.config.max_grad_norm)
            if counts.tokens:  # without any, Adam would go on by its momentum
                optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        return self._metrics(seen) | norms

    def _backward(self, experience: Experience, counts: Any, coef: float) -> _Seen:
        """Gradients of one micro-batch."""
        config, critic = self.config, self.critic
        sequences = experience.sequences.trimmed()
        lengths, targets = sequences.lengths, sequences.targets
        with config.autocast(sequences.ids.device):
            found = read(self.policy, sequences)
            logprobs, entropy = found.head.logprobs(targets, config.temperature)
            old = experience.packed("logprobs")
            clipped = policy_loss(
                logprobs,
                old,
                experience.packed("advantages"),
                clip=config.cliprange,
                clip_high=config.cliprange_high,
                dual_clip=config.dual_clip,
            )
            each = clipped.loss * experience.packed("weights")
            if config.entropy_coef:
                each = each + entropy_loss(entropy, config.entropy_coef)
            if config.kl_in == "loss" and coef:
                each = each + coef * self._divergence(found, logprobs, sequences, experience)
        weights = token_weights(
            lengths, config.aggregation, counts=counts, horizon=config.response_length
        )
        loss = (each * weights).sum() * self.gradients.scale
        value = None
        if critic is not None and not critic.shares_states:
            loss.backward()
            loss = loss.new_zeros(())
        if critic is not None:
            with critic.acting():
                with config.autocast(sequences.ids.device):
                    value = value_loss(
                        critic(sequences, found if critic.shares_states else None),
                        experience.packed("values"),
                        experience.packed("returns"),
                        clip=config.cliprange_value,
                    )
                mean = (value.loss * token_weights(lengths, counts=counts)).sum()
                (loss + config.vf_coef * mean * self.gradients.scale).backward()
            value = ValueLoss(value.loss.detach(), value.clipped)
        else:
            loss.backward()
        clipped = clipped._replace(loss=clipped.loss.detach())
        return _Seen(logprobs.detach(), old, clipped, entropy.detach(), value)

    def _divergence(
        self, found: Any, logprobs: Tensor, sequences: Any, experience: Experience
    ) -> Tensor:
        if self.config.kl_estimator == "full":
            return exact_kl(found.head, self.reference.heads(sequences), self.config.temperature)
        return kl_estimate(logprobs, experience.packed("ref_logprobs"), self.config.kl_estimator)

    def _metrics(self, seen: list[_Seen]) -> dict[str, float]:
        group = everyone()
        logprobs, old, entropy = (
            torch.cat([getattr(s, name) for s in seen]) for name in ("logprobs", "old", "entropy")
        )
        policy = PolicyLoss(*(torch.cat(c) for c in zip(*(s.policy for s in seen), strict=True)))
        value = None
        if seen[0].value is not None:
            value = ValueLoss(*(torch.cat(c) for c in zip(*(s.value for s in seen), strict=True)))
        found = policy_metrics(logprobs, old, policy, value, group=group)
        found["loss/policy"] = float(moments(policy.loss, group=group).mean)
        found["entropy"] = float(moments(entropy, group=group).mean)
        if value is not None:
            found["loss/value"] = float(moments(value.loss, group=group).mean)
        return found

    def state_dict(self) -> dict[str, Any]:
        return {"optimisers": [optimiser.state_dict() for optimiser in self.optimisers]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for optimiser, kept in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(kept)

    def trained(self) -> Iterator[nn.Parameter]:
        """All parameters that train, in one order."""
        for group in self.groups:
            yield from group

    def _adam(self, parameters: list[nn.Parameter], modules: list[nn.Module]) -> torch.optim.AdamW:
        config = self.config
        return torch.optim.AdamW(
            decay_groups(parameters, modules, config.weight_decay),
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
        )
