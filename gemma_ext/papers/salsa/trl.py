"""The same references under the trainers of TRL: DPO, GRPO, RLOO.

    trainer = GRPOTrainer(policy, ..., args=GRPOConfig(..., beta=0.04))
    salsa.trl.use_reference(trainer, salsa.SoupReference([sft_1, sft_2]))
    trainer.train()

GRPO and RLOO load the reference from the policy's own folder and take no other; what is loaded
there is dropped. DPO takes a frozen model too: `DPOTrainer(..., ref_model=reference.model)`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from gemma_ext.extras import require
from gemma_ext.files import write_pickle
from gemma_ext.nn.ppo import Reference
from gemma_ext.papers.salsa.references import MovingReference, MultiReference

Trainer = TypeVar("Trainer")
STATE = "reference.pt"


class LogMean(nn.Module):
    """What the fused heads of K models say, log-probabilities averaged with weights.

    Args:
        models: K, each with a fused head of TRL.
        weights: K.
    """

    def __init__(self, models: Sequence[nn.Module], weights: Sequence[float]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)
        self.weights = tuple(weights)

    def forward(self, **inputs: Any) -> Any:
        outputs = [model(**inputs) for model in self.models]
        mean = sum(w * out.log_probs for w, out in zip(self.weights, outputs, strict=True))
        blank = {field.name: None for field in dataclasses.fields(outputs[0])}
        mask = outputs[0].label_mask
        return type(outputs[0])(**{**blank, "log_probs": mean, "label_mask": mask})


def use_reference(trainer: Trainer, reference: Reference) -> Trainer:
    """Puts a reference in the place of a trainer's own, and moves it where it moves.

    Call it after the trainer is built and before `train()`. A reference that moves is written into
    every checkpoint and read when training resumes.

    Args:
        trainer: of TRL, DPO, GRPO or RLOO.
        reference: of one model (frozen, soup, moving) or of several (`MultiReference`).

    Returns:
        The trainer.

    Raises:
        ImportError: trl is missing.
        TypeError: a trainer without a reference model, or a reference without models.
        ValueError: a trainer with beta 0, whose references are sharded, or whose log-probabilities
            are computed ahead of a reference that moves.
    """
    require("salsa.trl", "salsa", "trl")
    if not hasattr(trainer, "ref_model"):
        raise TypeError(f"expected a trainer with a ref_model, got {type(trainer).__name__}")
    if getattr(trainer, "beta", None) == 0.0:
        raise ValueError("expected beta above 0, got 0: the reference would not be looked at")
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise ValueError("expected a trainer without DeepSpeed and FSDP, whose references are cut")
    moving = isinstance(reference, MovingReference)
    if moving and getattr(trainer, "precompute_ref_logps", False):
        raise ValueError("expected precompute_ref_log_probs=False for a reference that moves")
    temperature = getattr(trainer, "temperature", 1.0)
    if isinstance(reference, MultiReference):
        models = [_fused(each.model, temperature) for each in reference.references]
        model = LogMean(models, reference.weights).eval()
    elif isinstance(getattr(reference, "model", None), nn.Module):
        model = _fused(reference.model, temperature)
    else:
        raise TypeError(f"expected a reference with a model, got {type(reference).__name__}")
    trainer.ref_model = trainer.accelerator.prepare_model(model, evaluation_mode=True)
    if moving:
        trainer.add_callback(_callback(reference))
    return trainer


def _fused(model: nn.Module, temperature: float) -> nn.Module:
    from trl.trainer.utils import add_fused_lm_head

    code = getattr(model.forward, "__func__", model.forward).__code__
    if "fused_lm_head" not in code.co_varnames:
        add_fused_lm_head(model, temperature=temperature)
    return model


def _callback(reference: MovingReference) -> Any:
    from transformers import TrainerCallback

    class Moves(TrainerCallback):
        """Moves a reference behind each step of the optimiser."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if not state.global_step:
                return
            path = _folder(args, state.global_step) / STATE
            reference.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))

        def on_step_end(
            self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
        ) -> None:
            reference.after_update(model, state.global_step)

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            folder = _folder(args, state.global_step)
            if state.is_world_process_zero and folder.is_dir():
                write_pickle(folder / STATE, reference.state_dict())

    return Moves()


def _folder(args: Any, step: int) -> Path:
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
