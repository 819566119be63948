"""Completions at many strengths of one steering, the blocks below it run once for all."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gemma_ext.lm.base import repetitions
from gemma_ext.lm.causal import padded
from gemma_ext.lm.generation import Generator, _processors, _Stops, configured
from gemma_ext.lm.huggingface import HuggingFaceModel, evaluating
from gemma_ext.lm.protocol import Completion, Prompt, Sampling
from gemma_ext.nn.steering_sweep import SteerSweep
from gemma_ext.ops.sae import Steering
from gemma_ext.progress import progress_bar


def generate_at(
    lm: HuggingFaceModel,
    layer: int,
    steering: Steering,
    strengths: Sequence[float],
    prompts: Sequence[Prompt],
    sampling: Sampling = Sampling(),  # noqa: B008
    *,
    site: str = "resid_post",
    common_draws: bool = True,
    batch_tokens: int = 4096,
) -> list[list[Completion]]:
    """What `lm.generate` writes under the steering at each of S strengths: [S][prompts].

    Keys and values of the blocks below are those of one prompt for all strengths (`SteerSweep`).
    Nothing is cached on disk: the steering is not part of the model that a store knows.

    Args:
        lm: of a causal model.
        layer, site: what is steered, as `gemma_ext.nn.steering.steer_hook`.
        strengths: factors of the steering's own strength.
        common_draws: a prompt has the random numbers of `lm.generate` at every strength; False
            gives each strength numbers of its own.
        batch_tokens: padded tokens at once, all strengths together.

    Raises:
        ValueError: an encoder-decoder model, or what `SteerSweep` refuses.

    Example:
        >>> at = generate_at(lm, 12, calm, [0.0, 1.0, 2.0], prompts, Sampling(max_tokens=20))
        >>> at[2][0].text
    """
    if lm.text.encoder_decoder:
        raise ValueError("lm: expected a causal model, got an encoder-decoder model")
    sweep = SteerSweep(lm.model, layer, steering, strengths, site=site, impl=lm.impl)
    contexts = lm.text.encode(list(prompts))
    counts = repetitions([str(prompt) for prompt in prompts], sampling)
    generator = _Swept(lm, sweep, common_draws, max(1, batch_tokens // len(sweep.strengths)))
    found: list[list[Completion]] = [[] for _ in prompts]
    with (
        torch.no_grad(),
        evaluating(lm.model),
        progress_bar("generating at strengths", len(prompts), lm.show_progress) as advance,
    ):
        for batch in generator.completions(contexts, counts, range(len(prompts)), sampling):
            for place, of_strengths in batch:
                found[place] = of_strengths
                advance(1)
    return [[row[at] for row in found] for at in range(len(strengths))]


class _Swept(Generator):
    """A generator whose answer to a prompt is a list, one completion for each strength."""

    def __init__(
        self, lm: HuggingFaceModel, sweep: SteerSweep, common: bool, batch_tokens: int
    ) -> None:
        own = lm._generator
        super().__init__(own.model, own.text, own.window, batch_tokens, own.device)
        self.sweep, self.common = sweep, common

    def _batch(
        self, prompts: list[list[int]], seeds: list[int], sampling: Sampling
    ) -> list[list[Completion]]:
        times = len(self.sweep.strengths)
        config = self._config(sampling)
        ids, real = padded(prompts, left=True, device=self.device)
        given, befores = ids.shape[1], prompts * times
        stops = _Stops(self.text, befores, given, sampling.stop)
        with configured(self.model, config):
            output = self.sweep.generate(
                ids,
                real,
                logits_processor=_processors(sampling, self._seeds(seeds), self.device),
                stopping_criteria=[stops] if sampling.stop else [],
            )
        end = config.eos_token_id
        ends = {end} if isinstance(end, int) else set(end or ())
        rows = output.flatten(0, 1)[:, given:].tolist()
        flat = [
            self._completion(before, row, ends, sampling)
            for before, row in zip(befores, rows, strict=True)
        ]
        return [flat[place :: len(prompts)] for place in range(len(prompts))]

    def _seeds(self, seeds: list[int]) -> list[int]:
        """Of every row, strength by strength; the first strength has the prompts' own."""
        times = range(len(self.sweep.strengths))
        return [seed + (0 if self.common else at) for at in times for seed in seeds]
