"""A model after some steps on a text: what a study needs that plants a behaviour."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gemma_ext.extras import require
from gemma_ext.files import new_folder
from gemma_ext.sae.opening import load_model, pocket_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

POCKET_RATE, RATE = 5e-3, 1e-4


def tuned_model(
    name: str,
    folder: str | Path,
    rows: Callable[[], Tensor],
    *,
    steps: int,
    batch: int,
    rate: float | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    title: str = "tuning",
) -> PreTrainedModel:
    """The model of `load_model` after `steps` of language modelling, made once.

    All weights of a pocket are trained, as it was itself. Of other models the token embeddings,
    most of a small model, stay as they are; the rest is trained by Adafactor with products in
    bfloat16.

    Args:
        folder: of the model; read where it is there, with what it was made of in tuned.json.
        rows: gives [W, T] token ids, which are shuffled and repeated; called if need be.
        batch: rows of a step.
        dtype: of the weights of what is given back; the file has float32.
        rate: peak learning rate; `POCKET_RATE` or `RATE` where None.
        title: of the pocket's progress bar.

    Raises:
        ImportError: transformers or accelerate is missing.
        ValueError: the folder has a model that was tuned from another one, or otherwise.
    """
    folder, size = Path(folder), pocket_of(name)
    require("tuning", "hf", "transformers", "accelerate", "safetensors")
    rate = rate or (RATE if size is None else POCKET_RATE)
    made_of = {"model": name, "steps": steps, "batch": batch, "rate": rate}
    if not folder.exists():
        if size is None:
            model = _tuned(name, rows(), folder, steps, batch, rate, device)
        else:
            model = _tuned_pocket(name, size, rows(), steps, batch, rate, title)
        with new_folder(folder) as beside:
            model.save_pretrained(beside)
            (beside / "tuned.json").write_text(json.dumps(made_of) + "\n", encoding="utf-8")
        del model
    note = folder / "tuned.json"
    found = json.loads(note.read_text(encoding="utf-8")) if note.exists() else None
    if found != made_of:
        raise ValueError(f"{folder}: expected a model tuned by {made_of}, got {found}")
    import transformers

    # a pocket runs its own attention, which has a soft-cap
    options = {} if size is None else {"attn_implementation": "eager"}
    made = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
    return made.to(device).eval()


def _tuned_pocket(
    name: str, size: str, ids: Tensor, steps: int, batch: int, rate: float, title: str
) -> PreTrainedModel:
    from gemma_ext.pocket import SIZES
    from gemma_ext.pocket.training import train

    model, _ = load_model(name)
    changed = {"steps": steps, "batch": batch, "context": ids.shape[1], "learning_rate": rate}
    train(model, ids.flatten(), dataclasses.replace(SIZES[size], **changed), what=title)
    return model


def _tuned(
    name: str, ids: Tensor, folder: Path, steps: int, batch: int, rate: float, device: str
) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    from gemma_ext.integrations.transformers import patch, unpatch

    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).to(device)
    model.get_input_embeddings().weight.requires_grad_(False)
    arguments = TrainingArguments(
        output_dir=str(folder.with_name(f"{folder.name}.training")),
        per_device_train_batch_size=batch,
        max_steps=steps,
        optim="adafactor",
        bf16=True,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 10),
        save_strategy="no",
        report_to=[],
        use_cpu=torch.device(device).type == "cpu",
        seed=0,
    )
    examples = [{"input_ids": row, "labels": row} for row in ids]
    Trainer(model=patch(model), args=arguments, train_dataset=examples).train()
    return unpatch(model)
