"""Three ways of giving a model a trait, each a model that can be asked: in context, by an adapter,
by steering. The baseline of each is the same path without the trait."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemma_ext.extras import require
from gemma_ext.files import new_folder
from gemma_ext.lm import HuggingFaceModel, Prompt
from gemma_ext.lm.causal import padded
from gemma_ext.nn.steering import steer_hook
from gemma_ext.ops.sae import Steering
from gemma_ext.papers.personality.contrast import Pair
from gemma_ext.papers.personality.states import Ask, chat

SHOTS = 2  # of each trait, the release's


@dataclass(frozen=True)
class Manipulation:
    """One condition of the study.

    Attributes:
        method: "in_context", "adapter" or "steering".
        trait: that it gives; None for the method's own baseline.
        ask: a question as the model is asked it.
        on: a context in which the model has the trait.
    """

    method: str
    trait: str | None
    ask: Ask
    on: Callable[[], AbstractContextManager[Any]] = field(default=nullcontext)


def in_context(
    examples: Mapping[str, Sequence[Pair]],
    trait: str | None,
    *,
    ask: Ask = chat,
    shots: int = SHOTS,
) -> Manipulation:
    """Examples of every trait before the question and, but for the baseline, the wish for one.

    Args:
        examples: pairs by trait, at least `shots` of each.

    Raises:
        ValueError: an unknown trait, or too few examples.
    """
    if trait is not None and trait not in examples:
        raise ValueError(f"trait: expected one of {', '.join(examples)}, got {trait!r}")
    parts = []
    for name, pairs in examples.items():
        if len(pairs) < shots:
            raise ValueError(f"examples: expected {shots} of {name}, got {len(pairs)}")
        parts += [
            f"Question: {pair.question}\nAnswer ({name}): {pair.high_trait_response}"
            for pair in pairs[:shots]
        ]
    told = "\n\n".join(parts)
    label = "" if trait is None else f" ({trait})"

    def asked(question: str) -> Prompt:
        return ask(f"{told}\n\nQuestion: {question}\nAnswer{label}:")

    return Manipulation("in_context", trait, asked)


def steered(
    lm: HuggingFaceModel,
    layer: int,
    direction: Tensor,
    strength: float,
    trait: str | None,
    *,
    ask: Ask = chat,
    site: str = "resid_mid",
) -> Manipulation:
    """strength * direction added to every token but the first.

    Args:
        direction: [D], of norm 1.
        trait: None for the baseline, at strength 0.
    """
    how = Steering(direction[None], 0.0 if trait is None else strength)
    return Manipulation("steering", trait, ask, lambda: steer_hook(lm.model, layer, how, site=site))


@dataclass(frozen=True)
class AdapterRecipe:
    """Low-rank adapters on all seven projections; the release's numbers.

    The release trains on a 4-bit base and compares with others in 16 bits; here the base keeps its
    dtype, so that the adapter alone is what differs.
    """

    rank: int = 64
    alpha: int = 16
    dropout: float = 0.1
    rate: float = 2e-4
    epochs: float = 2.0
    batch: int = 4
    max_length: int = 512
    seed: int = 0


PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def train_adapter(
    lm: HuggingFaceModel,
    pairs: Sequence[Pair],
    folder: str | Path,
    recipe: AdapterRecipe = AdapterRecipe(),
    *,
    ask: Ask = chat,
) -> Path:
    """An adapter of a trait, trained on the high answers alone; loss on answers only.

    Returns:
        The folder, as peft writes it; one that is there is kept.
    """
    require("adapters", "personality", "peft", "transformers", "accelerate")
    import peft
    from transformers import Trainer, TrainingArguments

    folder = Path(folder)
    if (folder / "adapter_config.json").exists():
        return folder
    jobs = lm.text.jobs([(ask(p.question), p.high_trait_response) for p in pairs])
    end = lm.text.tokenizer.eos_token_id
    rows = []
    for job in jobs:
        ids = [*job.context, *job.targets, *([] if end is None else [end])]
        labels = [-100] * len(job.context) + ids[len(job.context) :]
        rows.append({"input_ids": ids[: recipe.max_length], "labels": labels[: recipe.max_length]})

    def collate(some: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        ids, real = padded([row["input_ids"] for row in some], left=False, device="cpu")
        labels = torch.full_like(ids, -100)
        for at, row in enumerate(some):
            labels[at, : len(row["labels"])] = torch.tensor(row["labels"])
        return {"input_ids": ids, "attention_mask": real, "labels": labels}

    torch.manual_seed(recipe.seed)
    config = peft.LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        target_modules=list(PROJECTIONS),
        task_type="CAUSAL_LM",
    )
    trained = [parameter.requires_grad for parameter in lm.model.parameters()]
    model = peft.get_peft_model(lm.model, config)
    arguments = TrainingArguments(
        output_dir=str(folder.with_name(f"{folder.name}.training")),
        per_device_train_batch_size=recipe.batch,
        num_train_epochs=recipe.epochs,
        learning_rate=recipe.rate,
        lr_scheduler_type="cosine",
        save_strategy="no",
        report_to=[],
        use_cpu=lm.model.device.type == "cpu",
        seed=recipe.seed,
        disable_tqdm=not lm.show_progress,
        remove_unused_columns=False,
    )
    try:
        Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collate).train()
        with new_folder(folder) as beside:
            model.save_pretrained(beside)
    finally:
        model.unload()
        for parameter, before in zip(lm.model.parameters(), trained, strict=True):
            parameter.requires_grad_(before)
    return folder


def adapted(
    lm: HuggingFaceModel, folder: str | Path | None, trait: str | None, *, ask: Ask = chat
) -> Manipulation:
    """The model with an adapter, or without for the baseline."""

    @contextmanager
    def on() -> Iterator[None]:
        if folder is None:
            yield
            return
        require("adapters", "personality", "peft")
        import peft

        model = peft.PeftModel.from_pretrained(lm.model, str(folder)).eval()
        try:
            yield
        finally:
            model.unload()

    return Manipulation("adapter", trait, ask, on)
