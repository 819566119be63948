"""Training of the pocket: real text, one window after another, resumable to the last bit.

Matrices of the layers go to Muon, the tied embedding and the norms to AdamW, which learns far more
from a few hundred thousand tokens than AdamW alone. The loss never holds the logits.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gemma_ext.files import write_safetensors
from gemma_ext.ops.cce import linear_cross_entropy
from gemma_ext.pocket.model import PocketSize
from gemma_ext.progress import progress_bar

if TYPE_CHECKING:
    from transformers import Gemma2ForCausalLM

_WARMUP = 20  # steps
_FLOOR = 0.05  # of the peak learning rate, where the cosine ends
_SAVE_EVERY = 10.0  # seconds


@dataclass
class Progress:
    """How far a training run is.

    Attributes:
        losses: mean loss in nats of every step done.
        seconds: wall time spent in steps, over all interruptions.
    """

    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0


def token_loss(model: Gemma2ForCausalLM, windows: Tensor, reduction: str = "mean") -> Tensor:
    """Next-token loss of [B, T + 1] windows: B T targets, no logits held."""
    hidden = model.model(input_ids=windows[:, :-1], use_cache=False).last_hidden_state
    return linear_cross_entropy(
        hidden,
        model.lm_head.weight,
        windows[:, 1:],
        softcap=model.config.final_logit_softcapping,
        impl="exact",
        reduction=reduction,
    )


def windows_of(ids: Tensor, context: int) -> Tensor:
    """[W, context + 1] windows: every id but the first is a target once; the tail is left out.

    Raises:
        ValueError: fewer than context + 1 ids.
    """
    if ids.numel() <= context:
        raise ValueError(f"ids: expected more than {context}, got {ids.numel()}")
    return ids.unfold(0, context + 1, context)


@torch.no_grad()
def perplexity(model: Gemma2ForCausalLM, ids: Tensor, context: int, batch: int = 16) -> float:
    """exp of the mean loss a token, in nats, over `windows_of(ids, context)`.

    Args:
        ids: [n] int64. batch: windows that are read at a time.
    """
    training = model.training
    model.eval()
    windows = windows_of(ids, context)
    total = sum(float(token_loss(model, part, "sum")) for part in windows.split(batch))
    model.train(training)
    return math.exp(total / (windows.shape[0] * context))


def train(
    model: Gemma2ForCausalLM,
    ids: Tensor,
    size: PocketSize,
    *,
    checkpoint: Path | None = None,
    seed: int = 0,
    show_progress: bool = True,
    stop_after: int | None = None,
    what: str = "training the pocket Gemma-2",
) -> Progress:
    """Trains `model` in place.

    Args:
        model: the starting point; what `checkpoint` holds replaces its weights.
        ids: [n] int64 token stream, read in windows of `size.context`, shuffled per epoch.
        size: the recipe.
        checkpoint: safetensors file that is resumed from if it exists and rewritten every few
            seconds.
        seed: order of the windows.
        stop_after: end the call after this many steps in all, as an interruption would.
        what: text of the progress bar.

    Returns:
        Losses and seconds from the first step, over all interruptions.
    """
    windows = windows_of(ids, size.context)
    order = _order(windows.shape[0], size.steps * size.batch, seed)
    optimizers = _optimizers(model, size)
    done = Progress()
    if checkpoint is not None and checkpoint.exists():
        done = _restore(checkpoint, model, optimizers)
    model.train()
    last = size.steps if stop_after is None else min(stop_after, size.steps)
    saved = time.monotonic()
    with progress_bar(what, size.steps, show_progress) as advance:
        advance(len(done.losses))
        for step in range(len(done.losses), last):
            start = time.monotonic()
            batch = windows[order[step * size.batch : (step + 1) * size.batch]]
            loss = _step(model, batch, optimizers, _rate(step, size))
            now = time.monotonic()
            done.losses.append(loss)
            done.seconds += now - start
            advance(1, f"loss {loss:.3f}")
            if checkpoint is not None and (now - saved > _SAVE_EVERY or step + 1 == last):
                _save(checkpoint, model, optimizers, done)
                saved = time.monotonic()
    return done


def _step(
    model: Gemma2ForCausalLM,
    batch: Tensor,
    optimizers: list[torch.optim.Optimizer],
    rate: float,
) -> float:
    loss = token_loss(model, batch)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def _order(windows: int, wanted: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    epochs = math.ceil(wanted / windows)
    return torch.cat([torch.randperm(windows, generator=generator) for _ in range(epochs)])


def _rate(step: int, size: PocketSize) -> float:
    cosine = 0.5 * (1 + math.cos(math.pi * step / size.steps))
    return size.learning_rate * min((step + 1) / _WARMUP, _FLOOR + (1 - _FLOOR) * cosine)


def _optimizers(model: Gemma2ForCausalLM, size: PocketSize) -> list[torch.optim.Optimizer]:
    head = model.lm_head.weight
    matrices = [p for p in model.parameters() if p.dim() == 2 and p is not head]
    rest = [p for p in model.parameters() if p.dim() != 2 or p is head]
    rate = size.learning_rate
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=rate, weight_decay=0.0, betas=(0.9, 0.95), fused=True),
    ]


def _save(
    path: Path,
    model: Gemma2ForCausalLM,
    optimizers: list[torch.optim.Optimizer],
    done: Progress,
) -> None:
    tensors = {f"model.{name}": p for name, p in model.named_parameters()}
    names = {p: name for name, p in model.named_parameters()}
    for optimizer in optimizers:
        for p, state in optimizer.state.items():
            tensors.update({f"optimizer.{names[p]}.{key}": v for key, v in state.items()})
    metadata = {"losses": json.dumps(done.losses), "seconds": repr(done.seconds)}
    write_safetensors(path, tensors, metadata)


def _restore(
    path: Path, model: Gemma2ForCausalLM, optimizers: list[torch.optim.Optimizer]
) -> Progress:
    from safetensors import safe_open

    parameters = dict(model.named_parameters())
    owner = {p: o for o in optimizers for group in o.param_groups for p in group["params"]}
    with safe_open(path, framework="pt") as file, torch.no_grad():
        for key in file.keys():  # noqa: SIM118 (a handle, not a mapping)
            section, name = key.split(".", 1)
            if section == "model":
                parameters[name].copy_(file.get_tensor(key))
            else:
                name, slot = name.rsplit(".", 1)
                owner[parameters[name]].state[parameters[name]][slot] = file.get_tensor(key)
        metadata = file.metadata()
    return Progress(json.loads(metadata["losses"]), float(metadata["seconds"]))
