"""Fine-tune a causal language model on a text file with a loss that never holds the logits.

    python python_examples/finetune_with_cce.py --model pocket --text notes.txt
    python python_examples/finetune_with_cce.py --model google/gemma-2-2b --text notes.txt

The last tenth of the file is held out; its loss is printed before and after. Checkpoints go to the
output folder: an interrupted run, started again with the same arguments, goes on where it stopped.
`--model pocket` (or pocket:small) needs no network: the pocket is trained here on first use.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from gemma_ext.integrations.transformers import patch

SAVE_EVERY = 25  # steps


def main(
    text: Annotated[Path, typer.Option(help="UTF-8 text to train on.", exists=True)],
    model: Annotated[str, typer.Option(help="pocket, pocket:small, a folder or a hub id.")] = (
        "pocket"
    ),
    out: Annotated[Path, typer.Option(help="Folder of checkpoints and result.")] = Path(
        "out/finetune"
    ),
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    steps: Annotated[int, typer.Option(min=1)] = 100,
    batch: Annotated[int, typer.Option(min=1, help="Sequences per step.")] = 8,
    context: Annotated[int, typer.Option(min=2, help="Tokens per sequence.")] = 128,
    learning_rate: Annotated[
        float | None, typer.Option(min=0.0, help="Peak; 1e-3 for the pocket, else 2e-5.")
    ] = None,
    seed: int = 0,
    impl: Annotated[str, typer.Option(help="As in gemma_ext.linear_cross_entropy.")] = "auto",
) -> None:
    """Fine-tune MODEL on TEXT and print the held-out loss before and after."""
    from transformers import Trainer, TrainingArguments

    network, tokenizer = load(model)
    network = patch(network.to(device), impl=impl)
    train_rows, heldout_rows = rows_of(text, tokenizer, context)
    print(f"{text}: {train_rows.numel()} tokens to train on, {heldout_rows.numel()} held out")

    trainer = Trainer(
        model=network,
        args=TrainingArguments(
            output_dir=str(out / "checkpoints"),
            per_device_train_batch_size=batch,
            per_device_eval_batch_size=batch,
            max_steps=steps,
            learning_rate=learning_rate or (1e-3 if is_pocket(model) else 2e-5),
            lr_scheduler_type="cosine",
            logging_steps=max(1, steps // 20),
            save_steps=SAVE_EVERY,
            save_total_limit=2,
            prediction_loss_only=True,
            report_to=[],
            dataloader_pin_memory=device != "cpu",
            use_cpu=device == "cpu",
            seed=seed,
        ),
        train_dataset=examples(train_rows),
        eval_dataset=examples(heldout_rows),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train(resume_from_checkpoint=newest_checkpoint(out / "checkpoints"))
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model(str(out / "model"))
    tokenizer.save_pretrained(out / "model")
    for name, loss in (("before", before), ("after", after)):
        print(f"held-out loss {name:>6}: {loss:.4f} (perplexity {math.exp(loss):.2f})")
    print(out / "model")


def load(name: str) -> tuple[Any, Any]:
    """Model and tokenizer: the pocket from its cache, anything else through transformers."""
    if is_pocket(name):
        from gemma_ext import pocket

        _, _, size = name.partition(":")
        made = pocket.load(size or "nano")
        return made.model, made.tokenizer
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)


def is_pocket(name: str) -> bool:
    return name.split(":")[0] == "pocket"


def rows_of(path: Path, tokenizer: Any, context: int) -> tuple[Tensor, Tensor]:
    """The file as [rows, context] ids: (the first nine tenths, the rest).

    Raises:
        ValueError: fewer than two rows.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # longer than the model's context: it is cut below
        ids = torch.tensor(tokenizer(path.read_text(encoding="utf-8")).input_ids)
    count = ids.numel() // context
    if count < 2:
        raise ValueError(
            f"text: expected at least {2 * context} tokens for rows of {context}, got {ids.numel()}"
        )
    rows = ids[: count * context].view(count, context)
    heldout = max(1, count // 10)
    return rows[:-heldout], rows[-heldout:]


def examples(rows: Tensor) -> list[dict[str, Tensor]]:
    """Rows [R, T] as a dataset of the Trainer; the model shifts the labels itself."""
    return [{"input_ids": row, "labels": row} for row in rows]


def newest_checkpoint(folder: Path) -> str | None:
    """The last checkpoint that was written to its end, or None."""
    complete = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    newest = max(complete, key=lambda path: int(path.name.rsplit("-", 1)[1]), default=None)
    return str(newest) if newest else None


if __name__ == "__main__":
    typer.run(main)
