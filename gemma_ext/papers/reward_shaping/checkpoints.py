"""Statistics of shapers in the checkpoints of a `transformers` trainer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gemma_ext.extras import require
from gemma_ext.files import write_json
from gemma_ext.papers.reward_shaping.hooks import ShapedReward

FILE = "reward_shaping.json"


def save_state(folder: str | Path, rewards: Sequence[ShapedReward]) -> Path:
    """Writes the states of shaped rewards, by name, into a folder of a checkpoint."""
    path = Path(folder) / FILE
    write_json(path, {reward.__name__: reward.state_dict() for reward in rewards})
    return path


def load_state(folder: str | Path, rewards: Sequence[ShapedReward]) -> None:
    """Gives shaped rewards the states of a checkpoint.

    Raises:
        ValueError: the checkpoint has none of a reward.
    """
    state = json.loads((Path(folder) / FILE).read_text(encoding="utf-8"))
    for reward in rewards:
        if reward.__name__ not in state:
            raise ValueError(f"{FILE}: expected {reward.__name__!r} in it, got {sorted(state)}")
        reward.load_state_dict(state[reward.__name__])


def shaping_callback(rewards: Sequence[ShapedReward], resume: str | Path | None = None) -> Any:
    """A `TrainerCallback` that keeps states with every checkpoint, and begins with one's.

    Args:
        rewards: of the trainer.
        resume: the checkpoint that `train(resume_from_checkpoint=...)` gets.

    Raises:
        ImportError: transformers is missing.
    """
    require("a callback of transformers", "hf", "transformers")
    from transformers import TrainerCallback

    class KeepShaping(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            if resume is not None:
                load_state(resume, rewards)
            for reward in rewards:
                if more.get("model") is not None:
                    reward.follow(more["model"])

        def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            if state.is_world_process_zero:
                save_state(Path(args.output_dir) / f"checkpoint-{state.global_step}", rewards)

    return KeepShaping()
