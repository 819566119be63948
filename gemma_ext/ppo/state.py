"""What of a trainer goes into a checkpoint, and what a resumed run has to share."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from gemma_ext.ppo import checkpoint

if TYPE_CHECKING:
    from gemma_ext.ppo.trainer import PPOTrainer

_FREE = ("output_dir", "logging_steps", "save_steps", "sample_prompts")


def of(trainer: PPOTrainer) -> dict[str, Any]:
    """Tensors and plain values."""
    return {
        "step": trainer.step,
        "weights": checkpoint.local(trainer.update.trained()),
        "update": trainer.update.state_dict(),
        "control": trainer.control.state_dict(),
        "reference": trainer.reference.state_dict(),
        "rewards": trainer.rewards.state_dict(),
        "random": checkpoint.random_states(),
        "before": json.dumps(trainer.before),
    }


def restore(trainer: PPOTrainer, kept: Mapping[str, Any]) -> None:
    """Puts the trainer where it was."""
    trainer.step = kept["step"]
    checkpoint.restore(trainer.update.trained(), kept["weights"])
    trainer.update.load_state_dict(kept["update"])
    trainer.control.load_state_dict(kept["control"])
    trainer.reference.load_state_dict(kept["reference"])
    trainer.rewards.load_state_dict(kept["rewards"])
    checkpoint.set_random_states(kept["random"])
    trainer.before = json.loads(kept["before"])


def identity(trainer: PPOTrainer) -> dict[str, Any]:
    """What a resumed run has to share with the one before, as JSON has it."""
    sizes = [p.numel() for p in trainer.update.trained()]
    return {
        **{name: v for name, v in asdict(trainer.config).items() if name not in _FREE},
        "prompts": trainer.prompts.digest(),
        "rewards": trainer.rewards.names,
        "weights of the rewards": trainer.rewards.weights,
        "reference": getattr(trainer.reference, "identity", type(trainer.reference).__name__),
        "weights": f"{len(sizes)} tensors, {sum(sizes)}",
    }
