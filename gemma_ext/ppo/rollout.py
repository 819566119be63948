"""Responses of a policy, each drawn by a random stream of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gemma_ext.lm.causal import padded
from gemma_ext.lm.generation import Gumbel, configured
from gemma_ext.nn.ppo import Sequences
from gemma_ext.nn.ppo.adapters import peft_or_bare
from gemma_ext.ppo.config import PPOConfig


@dataclass(frozen=True)
class Rollout:
    """Sequences, and what their sampler says of their tokens.

    Attributes:
        sequences: in the order of the prompts.
        logprobs: float32 [N] of the tokens at the run's temperature, by the sampler's own forward;
            None where it does not tell.
    """

    sequences: Sequences
    logprobs: Tensor | None

    @classmethod
    def cat(cls, parts: Sequence[Rollout], *, pad: int = 0) -> Rollout:
        told = [part.logprobs for part in parts if part.logprobs is not None]
        return cls(
            Sequences.cat([part.sequences for part in parts], pad=pad),
            torch.cat(told) if len(told) == len(parts) else None,
        )


class Sampler(Protocol):
    """Anything that answers prompts: Hugging Face's `generate`, an engine, a fixed table."""

    def __call__(
        self,
        policy: nn.Module,
        prompts: Sequence[list[int]],
        seeds: Sequence[int],
        *,
        greedy: bool = False,
    ) -> Rollout:
        """A response to each prompt.

        Args:
            policy: as it is now, without gradients and dropout.
            prompts: token ids. seeds: of the draw of each response.
            greedy: the likeliest tokens instead of draws.
        """


class Generate:
    """Responses by the model's own `generate`.

    A response depends on its prompt, its seed and the policy alone, whatever it is batched with,
    up to rounding. At most `local_rollout_forward_batch_size` are drawn at a time.

    Args:
        config: lengths, temperature, top-k and top-p.
        ends: token ids that end a response. pad: token id of padding.
    """

    def __init__(self, config: PPOConfig, ends: Sequence[int], pad: int) -> None:
        self.config, self.ends, self.pad = config, list(ends), pad

    def __call__(
        self,
        policy: nn.Module,
        prompts: Sequence[list[int]],
        seeds: Sequence[int],
        *,
        greedy: bool = False,
    ) -> Rollout:
        size = self.config.local_rollout_forward_batch_size
        parts = [
            self._batch(policy, prompts[at : at + size], seeds[at : at + size], greedy)
            for at in range(0, len(prompts), size)
        ]
        return Rollout.cat(parts, pad=self.pad)

    @torch.no_grad()
    def _batch(
        self, policy: nn.Module, prompts: Sequence[list[int]], seeds: Sequence[int], greedy: bool
    ) -> Rollout:
        model = peft_or_bare(policy)
        device = next(model.parameters()).device
        ids, real = padded(list(prompts), left=True, device=device)
        ids = ids.masked_fill(real == 0, self.pad)
        record = _Record(self.config.temperature)
        steps = [record] if greedy else [record, *self._draw(seeds, device)]
        with configured(model, self._settings()):
            output = model.generate(
                input_ids=ids,
                attention_mask=real,
                logits_processor=steps,
                synced_gpus=any(isinstance(p, DTensor) for p in model.parameters()),
            )
        responses = output[:, ids.shape[1] :]
        sequences = Sequences.build(ids, real, responses, self.ends, pad=self.pad)
        return Rollout(sequences, sequences.pack(record.finish(output)))

    def _draw(self, seeds: Sequence[int], device: torch.device) -> list[Any]:
        from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        made: list[Any] = [TemperatureLogitsWarper(float(self.config.temperature))]
        if self.config.top_k:
            made.append(TopKLogitsWarper(self.config.top_k))
        if self.config.top_p < 1:
            made.append(TopPLogitsWarper(float(self.config.top_p)))
        return [*made, Gumbel(list(seeds), device)]

    def _settings(self) -> Any:
        from transformers import GenerationConfig

        return GenerationConfig(
            eos_token_id=self.ends or None,
            pad_token_id=self.pad,
            max_new_tokens=self.config.response_length,
            do_sample=False,
            use_cache=True,
        )


class _Record:
    """Log-probabilities of the tokens that were chosen; holds the scores of one step."""

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature
        self.scores: Tensor | None = None
        self.columns: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._choose(input_ids)
        self.scores = scores.float() / self.temperature
        return scores

    def finish(self, output: Tensor) -> Tensor:
        """[B, T] of all steps."""
        self._choose(output)
        return torch.cat(self.columns, 1)

    def _choose(self, ids: Tensor) -> None:
        if self.scores is not None:
            chosen = self.scores.gather(1, ids[:, -1:])
            self.columns.append(chosen - self.scores.logsumexp(1, keepdim=True))


def seed_of(*parts: object) -> int:
    """A seed from the numbers and names that a draw belongs to."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1
