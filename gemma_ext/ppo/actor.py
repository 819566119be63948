"""The half of a trainer without gradients: prompts are answered, and the answers scored."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gemma_ext.lm.huggingface import evaluating
from gemma_ext.nn.ppo import Critic, Reference, Sequences
from gemma_ext.ppo import experience, metrics
from gemma_ext.ppo.config import PPOConfig
from gemma_ext.ppo.prompts import Prompts
from gemma_ext.ppo.ranks import rank, world
from gemma_ext.ppo.responses import Responses
from gemma_ext.ppo.rewards import Rewards
from gemma_ext.ppo.rollout import Rollout, Sampler, seed_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Actor:
    """Answers prompts by the policy as it is now; `PPOTrainer` says what each part is.

    Attributes:
        ends: token ids that end a response.
        step: how many are made, of `steps`.
    """

    config: PPOConfig
    policy: nn.Module
    critic: Critic | None
    reference: Reference
    tokenizer: PreTrainedTokenizerBase
    prompts: Prompts
    rewards: Rewards
    sampler: Sampler
    ends: list[int]
    step: int
    steps: int

    def score_tokens(self, sequences: Sequences) -> experience.TokenScores:
        """What policy, critic and reference say of every token; its `kl` is what is paid for."""
        return experience.score_tokens(
            self.policy, self.critic, self.reference, sequences, self.config
        )

    def respond(self, rows: Sequence[int], seed: int, *, greedy: bool = False) -> Rollout:
        """A response to each prompt; the draw of each belongs to its place among all ranks'."""
        first = rank() * self.config.local_batch_size
        seeds = [seed_of(seed, first + place) for place in range(len(rows))]
        prompts = [self.prompts.ids(row) for row in rows]
        with torch.no_grad(), evaluating(self.policy):
            return self.sampler(self.policy, prompts, seeds, greedy=greedy)

    def score(
        self, rows: Sequence[int], sequences: Sequences
    ) -> tuple[Tensor, Responses, dict[str, Tensor]]:
        """Scores [B], nan where none is finite; what was scored; the rewards of each function."""
        state = SimpleNamespace(global_step=self.step, max_steps=self.steps)
        responses = Responses.of(self.prompts, rows, sequences, self.tokenizer, state)
        scores, each = self.rewards(responses)
        if self.config.missing_eos_penalty is not None:
            ended = metrics.ended(sequences, self.ends)
            scores = scores - self.config.missing_eos_penalty * (~ended).float()
        return scores.masked_fill(~scores.isfinite(), float("nan")), responses, each

    def samples(self) -> list[dict[str, Any]]:
        """Responses to the first prompts with seeds of their own, their scores, and what
        `log_extra` was told of them.
        """
        rows = list(range(min(self.config.sample_prompts, len(self.prompts))))
        if not rows:
            return []
        self.rewards.mode(training=False)
        rollout = self.respond(rows, seed_of(self.config.seed, "samples"))
        scores, responses, _ = self.score(rows, rollout.sequences)
        columns = zip(responses.prompts, responses.completions, scores.tolist(), strict=True)
        return [
            {"prompt": prompt, "completion": completion, "score": score, **responses.told(row)}
            for row, (prompt, completion, score) in enumerate(columns)
        ]

    def _rows(self, step: int) -> list[int]:
        """Prompts of this rank in a step, each as often as it is answered."""
        times = self.config.num_generations
        mine = self.config.local_batch_size // times
        start = (step * world() + rank()) * mine
        rows = self.prompts.order(start, mine, self.config.seed)
        return [row for row in rows for _ in range(times)]

    def _visited(self) -> list[int]:
        """Prompts that a run of all ranks answers, in the order of their first turn."""
        turns = self.steps * world() * self.config.local_batch_size // self.config.num_generations
        return self.prompts.order(0, min(turns, len(self.prompts)), self.config.seed)
