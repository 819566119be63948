"""The `Trainer` of transformers for recursive models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

try:
    from accelerate.utils import AutocastKwargs
    from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
    from transformers.trainer_callback import PrinterCallback
except ImportError:
    raise ImportError("training needs transformers: pip install 'gemma_ext[hf]'") from None

from gemma_ext.nn._models import unwrap
from gemma_ext.nn.recursive import exit_heads, load, save
from gemma_ext.ops.cce import linear_cross_entropy
from gemma_ext.papers.recursive.objective import Objective

LEARNING_RATE, WARMUP_STEPS = 2e-4, 200  # of the paper, for 15 B tokens


def arguments(out: str | Path, steps: int, **values: Any) -> TrainingArguments:
    """The paper's schedule: AdamW, cosine decay from 2e-4 after 200 steps of warm-up.

    Args:
        out: folder of checkpoints.
        steps: of the optimiser; the warm-up is cut to a tenth of them.
        values: of `TrainingArguments`, before these.
    """
    given = {
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "cosine",
        "warmup_steps": min(WARMUP_STEPS, max(1, steps // 10)),
        "max_steps": steps,
        "report_to": [],
        **values,
    }
    return TrainingArguments(output_dir=str(out), **given)


class Bar(TrainerCallback):
    """Moves a bar by every step, with the loss as its note; nothing is printed.

    Args:
        advance: of `gemma_ext.progress.progress_bar`.
    """

    def __init__(self, advance: Callable[..., None]) -> None:
        self.advance = advance

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.advance(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.advance(1)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kw: Any) -> None:
        if logs and "loss" in logs:
            self.advance(0, f"loss {float(logs['loss']):.3f}")


class RecursiveTrainer(Trainer):
    """Trains a recursive (or vanilla) model on an `Objective`; evaluates the text's cross-entropy.

    Checkpoints are folders of `nn.recursive.save`, with stored layers once, and are resumed from.
    Under autocast the weights are cast anew in every loop: with torch's cache of casts the loops'
    gradients of a tied weight would be summed in 16 bits.

    Args:
        objective: what to train on.
        teacher: full-size model for its divergence, or None.
        args, kwargs: of `Trainer`.
    """

    def __init__(
        self,
        *args: Any,
        objective: Objective | None = None,
        teacher: PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if self.args.disable_tqdm:
            self.remove_callback(PrinterCallback)
        self.objective = objective or Objective()
        self.teacher = teacher.eval().to(self.args.device) if teacher is not None else None
        # else Trainer divides the loss of accumulated batches twice
        self.model_accepts_loss_kwargs = True
        self.accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        if model.training:
            # accelerate has wrapped the model's forward in autocast, but not the teacher's
            with self.accelerator.autocast():
                loss = self.objective(model, inputs, self.teacher, num_items_in_batch)
        else:
            batch = dict(inputs)
            labels = batch.pop("labels")
            head = exit_heads(model, batch, early=False)[-1]
            loss = linear_cross_entropy(**head, targets=labels, shift=True)
        return (loss, {}) if return_outputs else loss

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return
        inner = unwrap(self.model)
        if getattr(inner.config, "recursive", None) is None:
            super()._save(output_dir, state_dict)
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        torch.save(self.args, folder / "training_args.bin")
        save(inner, folder)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: torch.nn.Module | None = None
    ) -> None:
        inner = unwrap(self.model if model is None else model)
        if getattr(inner.config, "recursive", None) is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        found = load(resume_from_checkpoint, dtype=inner.dtype)
        inner.load_state_dict(found.state_dict())

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)
