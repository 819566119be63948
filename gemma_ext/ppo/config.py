"""Settings of a run, under the names and with the defaults that trl's PPO had."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from gemma_ext.nn.ppo import AGGREGATIONS, KL_ESTIMATORS, SCALES

ADVANTAGES = ("gae", "rloo", "grpo", "remax", "reinforce++")
_SCHEDULES = ("linear", "cosine", "constant")


@dataclass(frozen=True)
class PPOConfig:
    """How a policy is trained. Names that trl's `PPOConfig` had keep their meaning.

    They keep their defaults too but for `adam_epsilon` (1e-8 there), `total_episodes` (of epochs),
    `logging_steps` (10), `save_steps` (500), `bf16` and `gradient_checkpointing` (both on);
    `max_grad_norm` was not looked at there.

    Args:
        output_dir: folder of checkpoint, history, report and model.
        total_episodes: responses of the whole run, rounded up to whole batches.
        per_device_train_batch_size: responses of one backward.
        gradient_accumulation_steps: backwards of one optimiser step.
        num_mini_batches: optimiser steps of an epoch over a batch.
        num_ppo_epochs: passes over a batch of responses.
        num_generations: K responses to each prompt; 1 with a critic, at least 2 for "rloo" and
            "grpo".
        learning_rate: peak of the policy's; value_learning_rate: of the critic's, the same if None.
        lr_scheduler_type: "linear" or "cosine" to 0, or "constant"; warmup_ratio: rising share.
        adam_epsilon, adam_beta1, adam_beta2, weight_decay: of AdamW; norms and biases do not decay.
        max_grad_norm: of the policy's gradients and of the critic's, each; None for no clipping.
        response_length: T, most tokens of a response.
        temperature: of sampling and of every log-probability.
        rollouts: responses by the model's own "generate", or by the depth-batching "engine".
        top_k, top_p: of sampling alone; 0 and 1 are off. Ratios and divergences stay those of the
            whole distribution.
        stop_token: text of the token that ends a response, "eos" for the tokenizer's; None for
            the ends of the model's own generation configuration. stop_token_id: the same by number.
        missing_eos_penalty: taken off the score of a response without an end.
        max_prompt_length: a longer prompt loses its start; None for no limit.
        local_rollout_forward_batch_size: responses of a pass without gradients.
        kl_coef: beta. kl_estimator: "full" of whole distributions, or one of `KL_ESTIMATORS`.
        kl_in: "reward", or "loss" for a penalty that is differentiated. Which estimator leads to
            ref exp(score / beta) in which place: `gemma_ext.nn.ppo.kl`.
        kl_target: nats of a response that beta is steered to; None for a fixed beta.
        kl_horizon: responses of that control.
        advantage: one of `ADVANTAGES`; all but "gae" have no critic.
        scale_rewards: of "grpo": "group", "batch" or "none".
        gamma, lam: of GAE. whiten_rewards, whiten_advantages: over the global batch; "reinforce++"
            whitens its advantages always.
        whiten_unbiased: with Bessel's correction, as trl; PAR's code has none.
        cliprange, cliprange_high: below and above; the same if None. dual_clip: None for none.
        cliprange_value: None for none. vf_coef, entropy_coef: weights in the loss.
        aggregation: one of `AGGREGATIONS`.
        importance_cap: truncates the weight exp(logp - logp of the sampler) of each token; None
            trusts the sampler.
        bf16: products in bfloat16 by autocast. gradient_checkpointing: states made again.
        seed: of draws and orders; every draw has a stream of its own (seed, step, response).
        logging_steps, save_steps: optimisation batches between lines of history and checkpoints.
        sample_prompts: prompts that are answered before and after, for the report.

    Raises:
        ValueError: a number out of its range, an unknown name.
    """

    output_dir: str | Path = "out/ppo"
    total_episodes: int = 1024
    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    num_mini_batches: int = 1
    num_ppo_epochs: int = 4
    num_generations: int = 1
    learning_rate: float = 3e-6
    value_learning_rate: float | None = None
    lr_scheduler_type: str = "linear"
    warmup_ratio: float = 0.0
    adam_epsilon: float = 1e-5
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0
    response_length: int = 53
    temperature: float = 0.7
    rollouts: str = "generate"
    top_k: int = 0
    top_p: float = 1.0
    stop_token: str | None = None
    stop_token_id: int | None = None
    missing_eos_penalty: float | None = None
    max_prompt_length: int | None = None
    local_rollout_forward_batch_size: int = 64
    kl_coef: float = 0.05
    kl_estimator: str = "k1"
    kl_in: str = "reward"
    kl_target: float | None = None
    kl_horizon: int = 10_000
    advantage: str = "gae"
    scale_rewards: str = "group"
    gamma: float = 1.0
    lam: float = 0.95
    whiten_rewards: bool = False
    whiten_advantages: bool = True
    whiten_unbiased: bool = True
    cliprange: float = 0.2
    cliprange_high: float | None = None
    dual_clip: float | None = None
    cliprange_value: float | None = 0.2
    vf_coef: float = 0.1
    entropy_coef: float = 0.0
    aggregation: str = "token-mean"
    importance_cap: float | None = None
    bf16: bool = False
    gradient_checkpointing: bool = False
    seed: int = 42
    logging_steps: int = 1
    save_steps: int = 20
    sample_prompts: int = 4

    def __post_init__(self) -> None:
        for name in (
            "total_episodes", "per_device_train_batch_size", "gradient_accumulation_steps",
            "num_mini_batches", "num_ppo_epochs", "num_generations", "response_length",
            "local_rollout_forward_batch_size", "kl_horizon", "logging_steps", "save_steps",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in (
            "temperature", "learning_rate", "value_learning_rate", "kl_target", "max_grad_norm",
            "top_p", "cliprange_value", "importance_cap",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}: expected a positive number, got {value}")
        for name in ("gamma", "lam", "warmup_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a number in [0, 1], got {getattr(self, name)}")
        for name in (
            "top_k", "cliprange_high", "weight_decay", "sample_prompts", "kl_coef", "vf_coef",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{name}: expected at least 0, got {value}")
        if not 0 <= self.cliprange < 1:
            raise ValueError(f"cliprange: expected a number in [0, 1), got {self.cliprange}")
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(f"dual_clip: expected None or above 1, got {self.dual_clip}")
        if self.kl_target is not None and self.kl_horizon < self.local_batch_size:
            raise ValueError(
                f"kl_horizon: expected at least the {self.local_batch_size} responses of a batch, "
                f"got {self.kl_horizon}"
            )
        for name, options in (
            ("advantage", ADVANTAGES),
            ("scale_rewards", SCALES),
            ("kl_estimator", (*KL_ESTIMATORS, "full")),
            ("kl_in", ("reward", "loss")),
            ("aggregation", AGGREGATIONS),
            ("lr_scheduler_type", _SCHEDULES),
            ("rollouts", ("generate", "engine")),
        ):
            if getattr(self, name) not in options:
                raise ValueError(
                    f"{name}: expected one of {', '.join(options)}, got {getattr(self, name)!r}"
                )
        exact = ("k1", "k1+") if self.kl_in == "reward" else ("full", "k2", "k1+", "k3+")
        if self.kl_coef and self.kl_estimator not in exact:
            warnings.warn(
                f"kl_estimator: {self.kl_estimator} in the {self.kl_in} does not lead to "
                f"ref exp(score / kl_coef), which {' and '.join(exact)} do"
            )
        if self.advantage in ("rloo", "grpo") and self.num_generations < 2:
            raise ValueError(f"num_generations: expected at least 2 for {self.advantage}, got 1")
        if self.local_batch_size % self.num_generations:
            raise ValueError(
                f"num_generations: expected a divisor of the {self.local_batch_size} responses "
                f"of a rank, got {self.num_generations}"
            )
        if self.max_prompt_length is not None and self.max_prompt_length < 1:
            raise ValueError(
                f"max_prompt_length: expected None or at least 1, got {self.max_prompt_length}"
            )

    @property
    def local_batch_size(self) -> int:
        """Responses of a rank in one step, as trl counts them."""
        return self.local_mini_batch_size * self.num_mini_batches

    @property
    def local_mini_batch_size(self) -> int:
        """Responses of a rank in one optimiser step."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def has_critic(self) -> bool:
        return self.advantage == "gae"

    def autocast(self, device: torch.device) -> torch.autocast:
        """Products in bfloat16, if the run has them."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.bf16)

    def steps(self, world: int = 1) -> int:
        """Batches of the run on so many ranks."""
        return math.ceil(self.total_episodes / (self.local_batch_size * world))

    def factor(self, step: int, steps: int) -> float:
        """Of the learning rates in step `step`, counted from 0, of `steps`."""
        rise = math.ceil(self.warmup_ratio * steps)
        if step < rise:
            return (step + 1) / rise
        if self.lr_scheduler_type == "constant":
            return 1.0
        done = (step - rise) / (steps - rise)
        return (
            1 - done if self.lr_scheduler_type == "linear" else (1 + math.cos(math.pi * done)) / 2
        )
