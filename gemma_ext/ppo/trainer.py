"""The loop: prompts, responses, scores, advantages, optimiser steps; resumes with the same bits."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from gemma_ext.nn.ppo import Critic, Reference, SeparateCritic, Sequences
from gemma_ext.ppo import checkpoint, experience, metrics, state
from gemma_ext.ppo.actor import Actor
from gemma_ext.ppo.config import PPOConfig
from gemma_ext.ppo.history import History, live_metrics
from gemma_ext.ppo.memory import Plan, plan
from gemma_ext.ppo.ranks import rank, same_start, world
from gemma_ext.ppo.rollout import Sampler, seed_of
from gemma_ext.ppo.setup import (
    check_lengths,
    control_of,
    critic_of,
    ends_of,
    pad_of,
    prompts_of,
    reference_of,
    rewards_of,
    sampler_of,
    without_dropout,
)
from gemma_ext.ppo.update import Update
from gemma_ext.progress import progress_bar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Callback = Callable[["PPOTrainer", int, Mapping[str, float]], None]


class PPOTrainer(Actor):
    """Trains a causal LM by proximal policy optimisation.

    Whatever a step depends on is a function of its number and the seed, or in the checkpoint: a run
    that was killed gives the weights of one that was not. Under torch.distributed every rank
    answers its share of a batch; weights are kept equal here, sharded ones by FSDP2.

    Args:
        config: settings.
        policy: causal LM of transformers, under peft or not.
        reference: what the policy is held near; by default the policy without its adapter, or a
            copy of the policy as it is now.
        rewards: `Rewards`, or what it takes.
        prompts: `Prompts`, or what it takes.
        value: a `Critic`; a model of transformers, for a critic of its own; or None for a head on
            the policy's states. Not looked at where the advantage needs none.
        tokenizer: of the policy.
        reward_tokenizers: of rewards that are modules.
        sampler: draws responses; by default what the settings name.
        callbacks: called behind every step, before it is saved, with the trainer, the step's number
            and its metrics. A step that is made again behind a kill is told again.
        show_progress: draw a bar on stderr.

    Raises:
        ValueError, TypeError: arguments that do not fit.

    Example:
        >>> def short(completions, **columns):
        ...     return [-len(text) / 100 for text in completions]
        >>> trainer = PPOTrainer(PPOConfig(), model, None, short, texts, tokenizer=tokenizer)
        >>> history = trainer.train()
    """

    def __init__(
        self,
        config: PPOConfig,
        policy: nn.Module,
        reference: Reference | None = None,
        rewards: Any = None,
        prompts: Any = None,
        value: Critic | nn.Module | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        reward_tokenizers: Any = None,
        sampler: Sampler | None = None,
        callbacks: Sequence[Callback] = (),
        show_progress: bool = True,
    ) -> None:
        for name, given in (("rewards", rewards), ("prompts", prompts), ("tokenizer", tokenizer)):
            if given is None:
                raise ValueError(f"{name}: expected some, got None")
        self.config, self.policy, self.tokenizer = config, policy, tokenizer
        self.device = next(policy.parameters()).device
        self.pad, self.ends = pad_of(tokenizer), ends_of(config, policy, tokenizer)
        self.critic = critic_of(value, policy).to(self.device) if config.has_critic else None
        # before the policy is copied
        same_start(policy, self.critic)
        self.reference = reference if reference is not None else reference_of(policy)
        own = [self.critic.model] if isinstance(self.critic, SeparateCritic) else []
        without_dropout(config, policy, *own)
        self.prompts = prompts_of(config, prompts, tokenizer)
        self.rewards = rewards_of(config, rewards, reward_tokenizers, self.device)
        self.sampler = sampler or sampler_of(config, self.ends, self.pad)
        self.update = Update(config, policy, self.critic, self.reference)
        self.control = control_of(config)
        self.callbacks, self.show_progress = list(callbacks), show_progress
        self.folder = Path(config.output_dir)
        if self.folder.is_file():
            raise ValueError(f"output_dir: expected a folder, got the file {self.folder}")
        self.steps, self.step = config.steps(world()), 0
        check_lengths(config, policy, self.prompts, self._visited())
        self.history = History(self.folder)
        self.updates: list[dict[str, float]] = []
        self.before: list[dict[str, Any]] = []

    def train(self) -> History:
        """All steps that are left; the history of the whole run."""
        if not self.resume():
            self.before = self.samples()
            if rank() == 0:
                self.history.write()
        live = live_metrics(self.folder / "tensorboard", self.step) if rank() == 0 else None
        with progress_bar("ppo", self.steps, self.show_progress and rank() == 0) as advance:
            advance(self.step)
            while self.step < self.steps:
                line = self.train_step()
                # before the checkpoint, which then has what they drew and changed
                for callback in self.callbacks:
                    callback(self, self.step, line)
                last = self.step == self.steps
                if rank() == 0 and (self.step % self.config.logging_steps == 0 or last):
                    self.history.add(line)
                    for name, number in line.items() if live is not None else ():
                        live.add_scalar(name, number, self.step)
                if self.step % self.config.save_steps == 0 or last:
                    self.save()
                advance(1, metrics.note(line))
        if live is not None:
            live.close()
        self.rewards.mode(training=False)
        return self.history

    def train_step(self) -> dict[str, float]:
        """One batch: its metrics over all ranks."""
        config, began = self.config, time.perf_counter()
        coef = self.control.coef
        self.rewards.mode(training=True)
        rows = self._rows(self.step)
        rollout = self.respond(rows, seed_of(config.seed, "draw", self.step))
        drawn = time.perf_counter()
        scores, responses, each = self.score(rows, rollout.sequences)
        greedy = None
        if config.advantage == "remax":
            best = self.respond(rows, 0, greedy=True)
            self.rewards.mode(training=False)  # a baseline is no sample to learn from
            greedy = self.score(rows, best.sequences)[0]
        # what nobody scored takes no part
        sequences = rollout.sequences
        scored = scores.isfinite()
        known = Sequences(
            sequences.ids, sequences.mask, sequences.response_mask & scored.unsqueeze(1)
        )
        sampled = rollout.logprobs
        if sampled is None and config.importance_cap is not None:
            raise ValueError(
                "importance_cap: expected a sampler that gives log-probabilities, got "
                f"{type(self.sampler).__name__}, which gives none"
            )
        if sampled is not None:
            sampled = known.pack(sequences.unpack(sampled))
        found = self.score_tokens(known)
        batch = experience.build(
            known,
            scores.nan_to_num() if config.has_critic else scores,
            found,
            coef,
            config,
            sampler_logprobs=sampled,
            greedy_scores=greedy,
        )
        judged = time.perf_counter()
        factor = config.factor(self.step, self.steps)
        self.updates = self.update.run(batch, self.step, coef, factor)
        ended = time.perf_counter()
        self.step += 1
        line = metrics.of_batch(
            known, scores, each, responses, found, batch, self.updates, coef, sampled, self.ends
        )
        self.control.update(line["objective/kl"], self.config.local_batch_size * world())
        line |= self.reference.after_update(self.policy, self.step)
        line |= {
            "lr": config.learning_rate * factor,
            "time/rollout": drawn - began,
            "time/scoring": judged - drawn,
            "time/update": ended - judged,
        }
        episodes = self.step * config.local_batch_size * world()
        place = {"step": self.step, "episode": episodes}
        return place | line | place

    def plan(self) -> Plan:
        """Predicted bytes of each phase, for the longest of the first prompts."""
        others = [self.critic, getattr(self.reference, "model", None), *self.rewards.functions]
        longest = max(len(self.prompts.ids(row)) for row in range(min(64, len(self.prompts))))
        modules = [part for part in others if isinstance(part, nn.Module)]
        return plan(self.config, self.policy, self.update.trained(), modules, longest)

    def save(self) -> None:
        """Writes the checkpoint; the one before stays until it is whole."""
        checkpoint.write(self.folder, self.step, self._run(), self.state_dict())

    def resume(self) -> bool:
        """Takes up the checkpoint of the folder, if there is one."""
        kept = checkpoint.read(self.folder, self._run())
        if kept is None:
            return False
        self.load_state_dict(kept)
        self.history.read(self.step)
        if rank() == 0:
            self.history.write()
        return True

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return state.of(self)

    def load_state_dict(self, kept: Mapping[str, Any]) -> None:
        """Puts the trainer where it was."""
        state.restore(self, kept)

    def _run(self) -> dict[str, Any]:
        """What a resumed run has to share with the one before, as JSON has it."""
        return state.identity(self)
