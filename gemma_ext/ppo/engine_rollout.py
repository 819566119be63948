"""Responses by the depth-batching engine over the weights that are being trained.

The engine reads the policy's tensors where they are: an optimiser that writes them in place has
told it. Only what it keeps in another form (LoRA matrices, another dtype) is copied before a
rollout. A response that ends makes room for the next at once, none waits for the longest.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gemma_ext.lm.causal import padded
from gemma_ext.nn._models import unwrap
from gemma_ext.nn.ppo import Sequences
from gemma_ext.ppo.config import PPOConfig
from gemma_ext.ppo.rollout import Rollout
from gemma_ext.serve.config import PAGE, EngineConfig
from gemma_ext.serve.engine import Engine
from gemma_ext.serve.exits import ExitTest
from gemma_ext.serve.protocol import Request, SamplingParams
from gemma_ext.serve.weights import read_weights


class EngineSampler:
    """Draws responses with `gemma_ext.serve`; takes the place of `gemma_ext.ppo.rollout.Generate`.

    A response depends on its prompt, its seed and the policy alone, to the bit, whatever runs
    beside it. Its log-probabilities are those of the draw: with an exit test they are the early
    exits' own, and `importance_cap` corrects for them.

    Args:
        config: lengths, temperature, top-k and top-p; `local_rollout_forward_batch_size` requests
            run at a time.
        ends: token ids that end a response; pad: token id of padding.
        exits: of a recursive policy; None for all loops.
        engine: fields of `EngineConfig`, such as `width` and `kv_policy`.

    Raises:
        ValueError: fields that do not fit; a prefix cache, whose keys would be of older weights.
    """

    def __init__(
        self,
        config: PPOConfig,
        ends: Sequence[int],
        pad: int,
        *,
        exits: ExitTest | None = None,
        **engine: Any,
    ) -> None:
        if engine.get("prefix_cache"):
            raise ValueError("prefix_cache: expected none over weights that are trained, got one")
        size = config.local_rollout_forward_batch_size
        self.config, self.ends, self.pad, self.exits = config, tuple(ends), pad, exits
        self.sizes = EngineConfig(**{"width": size, "requests": size, **engine})
        self.engine: Engine | None = None
        self._policy: nn.Module | None = None

    def __call__(
        self,
        policy: nn.Module,
        prompts: Sequence[list[int]],
        seeds: Sequence[int],
        *,
        greedy: bool = False,
    ) -> Rollout:
        """A response to each prompt, as `gemma_ext.ppo.rollout.Sampler` has it.

        Raises:
            ValueError: an architecture, adapter or sharding that the engine does not run; prompt
                and response longer than the model takes.
            RuntimeError: the engine could not finish a response.
        """
        engine = self._ready(policy, max(map(len, prompts), default=1))
        temperature = 0.0 if greedy else self.config.temperature
        # a greedy engine tells log-probabilities at temperature 1
        tells = not greedy or self.config.temperature == 1
        requests = [
            Request(
                tuple(prompt),
                SamplingParams(
                    max_tokens=self.config.response_length,
                    temperature=temperature,
                    top_k=self.config.top_k,
                    top_p=self.config.top_p,
                    seed=seed,
                    logprobs=0 if tells else None,
                    tempered=True,
                    stop_ids=self.ends,
                ),
            )
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        places = {engine.submit(request): place for place, request in enumerate(requests)}
        ids: list[list[int]] = [[] for _ in requests]
        logprobs: list[list[float]] = [[] for _ in requests]
        while engine.has_work():
            for event in engine.step():
                if event.finish_reason == "error":
                    raise RuntimeError(f"response {places[event.request]}: {event.error}")
                if event.token is not None:
                    ids[places[event.request]].append(event.token.id)
                    logprobs[places[event.request]].append(event.token.logprob)
        sequences = self._sequences(prompts, ids, next(policy.parameters()).device)
        told = torch.tensor([value for row in logprobs for value in row]) if tells else None
        return Rollout(sequences, None if told is None else told.to(sequences.ids.device))

    def release(self) -> None:
        """Frees keys, values and copies until the next rollout."""
        self.engine = self._policy = None

    def _sequences(
        self, prompts: Sequence[list[int]], ids: list[list[int]], device: torch.device
    ) -> Sequences:
        given, real = padded(list(prompts), left=True, device=device)
        drawn, _ = padded(ids, left=False, device=device)
        lengths = torch.tensor([len(row) for row in ids], device=device)
        return Sequences.of_lengths(
            given.masked_fill(real == 0, self.pad), real, drawn, lengths, pad=self.pad
        )

    def _ready(self, policy: nn.Module, longest: int) -> Engine:
        """An engine with room for the longest prompt, over the weights as they are now."""
        model = unwrap(policy)
        if any(isinstance(p, DTensor) for p in model.parameters()):
            raise ValueError("policy: expected whole parameters for the engine, got sharded ones")
        need = longest + self.config.response_length
        most = model.config.max_position_embeddings
        if need > most:
            raise ValueError(f"prompt and response: expected at most {most} tokens, got {need}")
        if self.engine is None or self._policy is not model or need > self._room:
            self._room = min(PAGE * math.ceil(need / PAGE), most)
            sizes = dataclasses.replace(self.sizes, max_model_len=self._room, pages=None)
            self.engine = Engine.of_model(model, sizes, exits=self.exits)
            self._policy = model
        else:
            refresh(self.engine, model)
        return self.engine


@torch.no_grad()
def refresh(engine: Engine, model: nn.Module) -> None:
    """Gives an engine the weights that `model` has now, in the tensors that it has.

    Raises:
        ValueError: a model of other shapes than the engine was made of.
    """
    held = engine.runner.weights
    new = read_weights(model, dtype=held.dtype, device=held.device)
    pairs = list(zip(_tensors(held), _tensors(new), strict=True))
    for mine, theirs in pairs:
        if mine.shape != theirs.shape:
            raise ValueError(
                f"model: expected a tensor of shape {list(mine.shape)} as before, "
                f"got {list(theirs.shape)}"
            )
    for mine, theirs in pairs:
        if mine.data_ptr() != theirs.data_ptr():
            mine.copy_(theirs)


def _tensors(part: object) -> Iterator[Tensor]:
    """All tensors of weights, in the order of their fields."""
    if isinstance(part, Tensor):
        yield part
    elif isinstance(part, tuple):
        for member in part:
            yield from _tensors(member)
    elif dataclasses.is_dataclass(part):
        for field in dataclasses.fields(part):
            yield from _tensors(getattr(part, field.name))
