"""Completions by the model's own `generate`, each drawn by a random stream of its own."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gemma_ext.lm.causal import padded
from gemma_ext.lm.plan import buckets
from gemma_ext.lm.protocol import Completion, Sampling
from gemma_ext.lm.text import Text

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

_PARTIAL = 4  # tokens that may hold the start of a character of which the stop string has the end


class Generator:
    """Completes prompts in batches of similar length.

    Args:
        model: with a `generate`.
        window: tokens of prompt and completion together, for a decoder alone, or of the encoder.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        text: Text,
        window: int,
        batch_tokens: int,
        device: torch.device,
    ) -> None:
        self.model, self.text, self.window = model, text, window
        self.batch_tokens, self.device = batch_tokens, device

    def completions(
        self,
        contexts: Sequence[list[int]],
        repetitions: Sequence[int],
        places: Sequence[int],
        sampling: Sampling,
    ) -> Iterator[list[tuple[int, Completion]]]:
        """Completions of the prompts at `places`, batch by batch.

        Raises:
            ValueError: `max_tokens` leave no room for a prompt.
        """
        room = self.window
        if not self.text.encoder_decoder:
            room -= sampling.max_tokens
        if room < 1:
            raise ValueError(
                f"expected max_tokens below the {self.window} tokens that the model takes, "
                f"got {sampling.max_tokens}"
            )
        prompts = {place: contexts[place][-room:] for place in places}
        sizes = [len(prompts[place]) + sampling.max_tokens for place in places]
        for group in buckets(sizes, self.batch_tokens):
            chosen = [places[member] for member in group]
            seeds = [_seed(sampling.seed, contexts[p], repetitions[p]) for p in chosen]
            found = self._batch([prompts[place] for place in chosen], seeds, sampling)
            yield list(zip(chosen, found, strict=True))

    def _batch(
        self, prompts: list[list[int]], seeds: list[int], sampling: Sampling
    ) -> list[Completion]:
        config = self._config(sampling)
        ids, real = padded(prompts, left=True, device=self.device)
        given = 1 if self.text.encoder_decoder else ids.shape[1]
        befores = [[] for _ in prompts] if self.text.encoder_decoder else prompts
        stops = _Stops(self.text, befores, given, sampling.stop)
        with configured(self.model, config):
            output = self.model.generate(
                input_ids=ids,
                attention_mask=real,
                logits_processor=_processors(sampling, seeds, self.device),
                stopping_criteria=[stops] if sampling.stop else [],
            )
        end = config.eos_token_id
        ends = {end} if isinstance(end, int) else set(end or ())
        return [
            self._completion(before, row, ends, sampling)
            for before, row in zip(befores, output[:, given:].tolist(), strict=True)
        ]

    def _completion(
        self, before: list[int], ids: list[int], ends: set[int], sampling: Sampling
    ) -> Completion:
        count = next((place for place, token in enumerate(ids) if token in ends), len(ids))
        finished = count < len(ids)
        text = self.text.decode(before, ids[:count])
        stop = _first(text, sampling.stop)
        if stop is None:
            return Completion(text, count, finished)
        return Completion(text[:stop], self._until(before, ids[:count], sampling.stop), True)

    def _until(self, before: list[int], ids: list[int], stop: tuple[str, ...]) -> int:
        """How many ids there were when a stop string was complete."""
        low, high = 1, len(ids)
        while low < high:
            middle = (low + high) // 2
            if _first(self.text.decode(before, ids[:middle]), stop) is None:
                low = middle + 1
            else:
                high = middle
        return low

    def _config(self, sampling: Sampling) -> GenerationConfig:
        """The model's own tokens, none of its habits."""
        from transformers import GenerationConfig

        own = self.model.generation_config
        names = ("bos_token_id", "eos_token_id", "decoder_start_token_id", "forced_bos_token_id")
        kept = {name: getattr(own, name, None) for name in names}
        if kept["eos_token_id"] is None:
            kept["eos_token_id"] = self.text.tokenizer.eos_token_id
        pad = self.text.tokenizer.pad_token_id
        return GenerationConfig(
            **copy.deepcopy(kept),
            pad_token_id=0 if pad is None else pad,
            max_new_tokens=sampling.max_tokens,
            do_sample=False,
            use_cache=True,
        )


@contextmanager
def configured(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """In place of the model's own, from which a call takes what its configuration leaves open.

    A model of peft hands its configuration to the model below it.
    """
    below = getattr(model, "get_base_model", lambda: model)()
    own = [(each, each.generation_config) for each in (model, below)]
    head = below.get_output_embeddings()
    hook = None if head is None else head.register_forward_pre_hook(_dense)
    try:
        for each, _ in own:
            each.generation_config = config
        yield
    finally:
        if hook is not None:
            hook.remove()
        for each, before in own:
            each.generation_config = before


def _dense(head: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The last states of several prompts are a slice [B, 1, D], for which matmul would copy the
    head's weight B times.
    """
    return (inputs[0].contiguous(), *inputs[1:])


class _Stops:
    """Ends a row at a stop string."""

    def __init__(
        self, text: Text, befores: list[list[int]], given: int, stop: tuple[str, ...]
    ) -> None:
        self.text, self.befores, self.given, self.stop = text, befores, given, stop
        # a token that is not special has a byte at least
        self.reach = max((len(s.encode()) for s in stop), default=0) + _PARTIAL

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        ended = []
        for before, row in zip(self.befores, input_ids[:, self.given :].tolist(), strict=True):
            start = max(0, len(row) - self.reach)
            text = self.text.decode([*before, *row[:start]], row[start:])
            ended.append(_first(text, self.stop) is not None)
        return torch.tensor(ended, device=input_ids.device)


def _processors(sampling: Sampling, seeds: list[int], device: torch.device) -> list[Any]:
    """What makes the likeliest token a draw."""
    if not sampling.temperature:
        return []
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    made: list[Any] = [TemperatureLogitsWarper(float(sampling.temperature))]
    if sampling.top_k:
        made.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1.0:
        made.append(TopPLogitsWarper(float(sampling.top_p)))
    return [*made, Gumbel(seeds, device)]


class Gumbel:
    """Adds -log(-log u) to the scores, whose maximum is then a draw from their softmax."""

    def __init__(self, seeds: list[int], device: torch.device) -> None:
        self.streams = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        noise = torch.empty_like(scores, dtype=torch.float32)
        for row, stream in zip(noise, self.streams, strict=True):
            row.exponential_(generator=stream)
        return scores.float() - noise.log()


def _seed(seed: int, context: list[int], repetition: int) -> int:
    text = json.dumps([seed, repetition, context]).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def _first(text: str, stop: tuple[str, ...]) -> int | None:
    """Where the first stop string begins."""
    places = [place for place in map(text.find, stop) if place >= 0]
    return min(places, default=None)
