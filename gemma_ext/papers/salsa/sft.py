"""Supervised fine-tuning of prompts with answers: what makes the parents.

Runs differ in the seed of their order alone, as SALSA's two parents do.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gemma_ext.nn._models import unwrap
from gemma_ext.papers.salsa.checks import Batch, nll
from gemma_ext.progress import progress_bar
from gemma_ext.souping.scoring import IGNORED, Scores

_WARMUP = 0.1  # of the steps


class Pairs:
    """Prompts with answers as token ids; losses are of the answers and their end.

    Args:
        pairs: (prompt, answer) texts.
        tokenizer: adds what it adds to a prompt, such as <bos>, and its end behind each answer.
        max_length: tokens; a longer pair loses its end.

    Raises:
        ValueError: no pair, or a tokenizer without an end.
    """

    def __init__(
        self, pairs: Sequence[tuple[str, str]], tokenizer: Any, max_length: int = 512
    ) -> None:
        if not pairs:
            raise ValueError("expected at least one prompt with an answer, got none")
        if tokenizer.eos_token_id is None:
            raise ValueError("expected a tokenizer with an end of text, got none")
        self.pad = tokenizer.pad_token_id or 0
        self.rows = []
        for prompt, answer in pairs:
            before = tokenizer(prompt).input_ids
            after = tokenizer(answer, add_special_tokens=False).input_ids
            ids = [*before, *after, tokenizer.eos_token_id][:max_length]
            self.rows.append((ids, min(len(before), len(ids))))

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """input_ids, attention_mask and labels [B, T] of some rows, padded on the right."""
        some = [self.rows[row] for row in rows]
        width = max(len(ids) for ids, _ in some)
        ids = torch.full((len(some), width), self.pad)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
        for place, (tokens, before) in enumerate(some):
            ids[place, : len(tokens)] = torch.tensor(tokens)
            mask[place, : len(tokens)] = 1
            labels[place, before : len(tokens)] = torch.tensor(tokens[before:])
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def batches(self, size: int) -> list[Batch]:
        """All rows in order."""
        order = list(range(len(self)))
        return [self.batch(order[at : at + size]) for at in range(0, len(order), size)]


def read_pairs(path: str | Path) -> list[tuple[str, str]]:
    """Rows of a .jsonl file with `prompt` and `completion`, or with `text` alone.

    Raises:
        ValueError: no such file, or a row without them.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"expected a .jsonl file, got {path}")
    found = []
    # not splitlines, which also ends a line at U+2028 and its like inside of a text
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        row = json.loads(line)
        if "text" in row:
            found.append(("", row["text"]))
        elif "prompt" in row and "completion" in row:
            found.append((row["prompt"], row["completion"]))
        else:
            raise ValueError(f"{path}, row {number}: expected prompt and completion, or text")
    return found


def tune(
    model: nn.Module,
    pairs: Pairs,
    *,
    steps: int,
    batch: int = 16,
    rate: float = 1e-3,
    seed: int = 0,
    show_progress: bool = True,
) -> list[float]:
    """Trains the parameters that have gradients, in place, with AdamW; the loss of every step.

    Args:
        model: a causal LM of transformers, under adapters of peft or not.
        steps, batch: optimiser steps, and pairs in each.
        rate: peak of a linear warm-up and decay.
        seed: of the order of the pairs.
    """
    generator = torch.Generator().manual_seed(seed)
    order = [
        row
        for _ in range(-(-steps * batch // len(pairs)))
        for row in torch.randperm(len(pairs), generator=generator).tolist()
    ]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0, betas=(0.9, 0.95))
    rise = max(1.0, _WARMUP * steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / rise, (steps - step) / max(1.0, steps - rise))
    )
    scores, losses = Scores(unwrap(model)), []
    with progress_bar(f"fine-tuning, seed {seed}", steps, show_progress) as advance:
        for step in range(steps):
            total, count = nll(scores, pairs.batch(order[step * batch : (step + 1) * batch]))
            loss = total / max(count, 1)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
            advance(1, f"loss {losses[-1]:.3f}")
    optimizer.zero_grad()
    return losses
