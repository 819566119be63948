"""Audits in embedding space: longer and stronger than what a model was trained against.

- PGD with many steps and restarts, each row's worst start kept (`audit`);
- unconstrained suffix embeddings in the manner of arXiv 2402.09063 (`suffix`, `SUFFIX`).

Both run the PGD of the training attack. What a model writes under what was found is `answers`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gemma_ext.lm.huggingface import evaluating
from gemma_ext.papers.continuous_at.attack import Attack, AttackConfig
from gemma_ext.papers.continuous_at.embeddings import Embeddings
from gemma_ext.papers.continuous_at.evaluation.template import split
from gemma_ext.papers.continuous_at.perturbation import EMBEDDINGS
from gemma_ext.papers.continuous_at.prompts import Row

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SUFFIX = AttackConfig(steps=100, rate=1e-3, step="sign", eps_rel=math.inf, keep="best")
"""Steps of a suffix attack without a ball; rates from 1e-3 to 1e-2 are in use."""
BANGS = "! ! ! ! ! ! ! ! ! ! ! ! ! ! ! ! ! ! ! !"


def stronger(config: AttackConfig, steps: int = 100) -> AttackConfig:
    """An attack in the same ball that is hard to withstand by chance.

    Normalised-gradient steps of 2.5 / steps of the radius reach every point of the ball and turn
    back on its surface; the best iterate is kept.

    Raises:
        ValueError: a ball without a radius, or fewer than 1 step.
    """
    if steps < 1:
        raise ValueError(f"expected steps to be at least 1, got {steps}")
    return replace(
        config, steps=steps, rate=2.5 / steps, unit="ball", step="l2norm", keep="best", floor=None
    )


def suffix(
    tokenizer: PreTrainedTokenizerBase,
    messages: str | Sequence[Mapping[str, str]],
    target: str,
    first: str = BANGS,
) -> Row:
    """A conversation of which only the string at `{optim_str}` may be moved.

    Args:
        first: text that the string starts as.

    Raises:
        ValueError: a text without tokens.
    """
    parts = split(tokenizer, messages, target)
    ids = tokenizer(first, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError(f"first: expected a text of at least one token, got {first!r}")
    start = len(parts.before)
    prompt = (*parts.before, *ids, *parts.after)
    return Row(prompt, tuple(parts.target), (start, start + len(ids)))


@dataclass(frozen=True)
class Audited:
    """The worst that was found for some rows.

    Attributes:
        rows: B of them.
        clean: float64 [B], loss of each target without an attack.
        losses: float64 [R, B], lowest of each start.
        deltas: what the lowest was found with, [free tokens, D] for each row.
    """

    rows: tuple[Row, ...]
    clean: Tensor
    losses: Tensor
    deltas: tuple[Tensor, ...]

    @property
    def worst(self) -> Tensor:
        """float64 [B]: lowest loss over all starts."""
        return self.losses.amin(0)


def audit(
    model: PreTrainedModel, rows: Sequence[Row], config: AttackConfig, restarts: int = 1
) -> Audited:
    """Attacks rows from several starts: from where they are, then from drawn points of the ball.

    Args:
        config: attack on embeddings that keeps the best iterate.

    Raises:
        ValueError: fewer than 1 start, other sites, another iterate, or several starts in a ball
            without a radius.
    """
    if restarts < 1:
        raise ValueError(f"expected restarts to be at least 1, got {restarts}")
    if config.sites != (EMBEDDINGS,) or config.keep != "best":
        raise ValueError(
            "expected an attack on embeddings alone that keeps the best iterate, "
            f"got sites {config.sites} and keep {config.keep!r}"
        )
    found = []
    with evaluating(model):
        for start in range(restarts):
            run = Attack(model, replace(config, init="ball" if start else "zero"))
            found.append(run(rows, seed=start))
        clean = found[0].losses[0]
    losses = torch.stack([one.losses.amin(0) for one in found])
    deltas = [found[int(start)].of([row])[0] for row, start in enumerate(losses.argmin(0).tolist())]
    return Audited(tuple(rows), clean, losses, tuple(deltas))


@torch.no_grad()
def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    found: Audited,
    max_tokens: int = 64,
    batch_size: int = 16,
) -> list[str]:
    """What a model writes after each attacked prompt, the likeliest token at a time."""
    embeddings = Embeddings(model)
    texts = []
    with evaluating(model):
        for at in range(0, len(found.rows), batch_size):
            rows = found.rows[at : at + batch_size]
            moved = [
                _moved(embeddings, row, delta)
                for row, delta in zip(rows, found.deltas[at : at + batch_size], strict=True)
            ]
            longest = max(map(len, moved))
            inputs = moved[0].new_zeros(len(moved), longest, moved[0].shape[1])
            mask = torch.zeros(len(moved), longest, dtype=torch.int64, device=inputs.device)
            for place, row in enumerate(moved):
                inputs[place, longest - len(row) :], mask[place, longest - len(row) :] = row, 1
            ids = model.generate(
                inputs_embeds=inputs,
                attention_mask=mask,
                max_new_tokens=max_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id or 0,
            )
            texts += tokenizer.batch_decode(ids, skip_special_tokens=True)
    return texts


def _moved(embeddings: Embeddings, row: Row, delta: Tensor) -> Tensor:
    """Embeddings [T, D] of a row's prompt under a delta."""
    device = embeddings.module.weight.device
    made = embeddings(torch.tensor(row.prompt, device=device)).clone()
    start, end = row.free or (0, len(row.prompt))
    made[start:end] = (made[start:end] + delta.to(device)).to(made.dtype)
    return made
