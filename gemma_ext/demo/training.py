"""One training of the pocket Gemma-2 through the `Trainer` of transformers, loss eager or ours."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemma_ext.integrations.transformers import patch
from gemma_ext.pocket import build_model, load_text, perplexity
from gemma_ext.pocket.model import pocket_size
from gemma_ext.pocket.quiet import quiet_transformers
from gemma_ext.progress import progress_bar

LOSSES = ("eager", "ours")
_SAVE_EVERY = 25  # steps
_SCORED = 8192  # held-out tokens: seconds on two cores
# the last file of a checkpoint that the Trainer writes
_COMPLETE = "trainer_state.json"


@dataclass(frozen=True)
class Plan:
    """What both trainings share.

    Attributes:
        size: pocket size, see `gemma_ext.pocket`.
        steps: optimiser steps of `batch` sequences each.
        batch: sequences per step.
        learning_rate: peak of AdamW's cosine schedule.
        seed: of the starting weights and of the order of the text.
    """

    size: str = "small"
    steps: int = 120
    batch: int = 8
    learning_rate: float = 3e-3
    seed: int = 0

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.batch * pocket_size(self.size).context


def train(plan: Plan, loss: str, folder: Path, show_progress: bool = True) -> dict[str, Any]:
    """Trains from the same start on the same text with one of the two losses.

    Args:
        plan: the shared part.
        loss: "eager", or "ours" for one `patch(model)` more.
        folder: for checkpoints; resumed from if it has one, removed in the end.

    Returns:
        losses: of every step, nats; seconds: of every step; perplexity: held out, both measured
        by the same exact loss; tokens: per step.
    """
    from transformers import Trainer, TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    recipe = pocket_size(plan.size)
    text = load_text(plan.size)
    model = build_model(recipe, plan.seed)
    if loss == "ours":
        patch(model)
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=plan.batch,
        max_steps=plan.steps,
        learning_rate=plan.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(20, plan.steps // 5),
        adam_beta2=0.95,
        logging_steps=1,
        save_steps=_SAVE_EVERY,
        save_total_limit=1,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        use_cpu=True,
        seed=plan.seed,
    )
    what = {"eager": "training, eager loss", "ours": "training, ours      "}[loss]
    with quiet_transformers(), progress_bar(what, plan.steps, show_progress) as advance:
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=Windows(text.train_ids, recipe.context),
            callbacks=[_step_clock(advance)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=_last_complete(folder))
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    heldout = text.heldout_ids[: _SCORED + 1]
    result = {
        "losses": [entry["loss"] for entry in history],
        "seconds": [entry["step_seconds"] for entry in history],
        "perplexity": perplexity(model, heldout, recipe.context),
        "tokens": plan.batch * recipe.context,
    }
    shutil.rmtree(folder, ignore_errors=True)
    return result


class Windows(torch.utils.data.Dataset):
    """Consecutive sequences of a token stream [n], each its own labels."""

    def __init__(self, ids: Tensor, context: int) -> None:
        self.rows = ids[: ids.numel() // context * context].view(-1, context)

    def __len__(self) -> int:
        return self.rows.shape[0]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def _step_clock(advance: Any) -> Any:
    """A callback that moves the bar and writes each step's seconds beside its loss."""
    from transformers import TrainerCallback

    class StepClock(TrainerCallback):
        start = seconds = 0.0
        shown = 0

        def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            self.seconds = time.perf_counter() - self.start

        def on_log(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            entry = state.log_history[-1]
            if "loss" in entry:
                entry["step_seconds"] = self.seconds
                advance(state.global_step - self.shown, f"loss {entry['loss']:.3f}")
                self.shown = state.global_step

    return StepClock()


def _last_complete(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end."""
    complete = [path.parent for path in folder.glob(f"checkpoint-*/{_COMPLETE}")]
    newest = max(complete, key=lambda path: int(path.name.rsplit("-", 1)[1]), default=None)
    return str(newest) if newest else None
