"""The depth-batching engine as the `rollout_func` of trl's GRPO.

    GRPOTrainer(model, reward_funcs, args, train_dataset=..., rollout_func=EngineRollout())

trl asks it with every prompt as often as it is to be answered. The log-probabilities that it tells
are those of the draw at the trainer's temperature.
"""

from __future__ import annotations

from typing import Any

from gemma_ext.nn._models import unwrap
from gemma_ext.ppo.config import PPOConfig
from gemma_ext.ppo.engine_rollout import EngineSampler
from gemma_ext.ppo.prompts import Prompts
from gemma_ext.ppo.rollout import seed_of
from gemma_ext.ppo.setup import ends_of, pad_of
from gemma_ext.serve.exits import ExitTest

# of trl's settings: what the engine's draws know nothing of, and its value for nothing
_NOT_DRAWN_BY = {"min_p": 0.0, "repetition_penalty": 1.0, "generation_kwargs": {}}


class EngineRollout:
    """Answers prompts over the weights of the trainer's model as they are.

    Args:
        seed: of all draws. A draw belongs to its step, its rank and its place, so that a run that
            goes on from a checkpoint draws what it would have drawn.
        exits, engine: as of `EngineSampler`.
    """

    def __init__(self, *, seed: int = 0, exits: ExitTest | None = None, **engine: Any) -> None:
        self.seed, self.exits, self.engine = seed, exits, engine
        self._sampler: EngineSampler | None = None
        self._step, self._calls = -1, 0

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, list[Any]]:
        """`prompt_ids`, `completion_ids` and `logprobs`, a list for each prompt.

        Raises:
            ValueError: settings of the trainer that the engine does not draw by.
        """
        step, place = trainer.state.global_step, trainer.accelerator.process_index
        self._calls = self._calls + 1 if step == self._step else 0
        self._step = step
        ids = Prompts([{"prompt": prompt} for prompt in prompts], trainer.processing_class)
        asked = [ids.ids(row) for row in range(len(prompts))]
        seeds = [seed_of(self.seed, step, self._calls, place, row) for row in range(len(prompts))]
        rollout = self._sampler_of(trainer)(unwrap(trainer.model), asked, seeds)
        lengths = rollout.sequences.lengths.tolist()
        return {
            "prompt_ids": asked,
            "completion_ids": [part.tolist() for part in rollout.sequences.targets.split(lengths)],
            "logprobs": [part.tolist() for part in rollout.logprobs.split(lengths)],
        }

    def _sampler_of(self, trainer: Any) -> EngineSampler:
        args, tokenizer = trainer.args, trainer.processing_class
        for name, neutral in _NOT_DRAWN_BY.items():
            if (given := getattr(args, name, neutral)) not in (neutral, None):
                raise ValueError(
                    f"{name}: expected {neutral} with rollouts by the engine, got {given}"
                )
        config = PPOConfig(
            response_length=args.max_completion_length,
            temperature=args.temperature,
            top_k=args.top_k or 0,
            top_p=args.top_p,
        )
        if self._sampler is None or self._sampler.config != config:
            ends = ends_of(config, trainer.model, tokenizer)
            self._sampler = EngineSampler(
                config, ends, pad_of(tokenizer), exits=self.exits, **self.engine
            )
        return self._sampler
