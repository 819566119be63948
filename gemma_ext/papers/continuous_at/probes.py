"""Cheap looks at a model while it is hardened."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gemma_ext.lm.huggingface import evaluating
from gemma_ext.papers.continuous_at.attack import Attack
from gemma_ext.papers.continuous_at.data import Pair
from gemma_ext.papers.continuous_at.prompts import Batch, Row
from gemma_ext.papers.continuous_at.target_loss import TargetLoss


def attacked_loss(attack: Attack, pairs: Sequence[Pair]) -> dict[str, float]:
    """Mean loss of harmful targets before and under an attack, and of safe answers under it; of the
    iterates that the attack keeps.

    In the paper the loss under a continuous attack and that under GCG correlate with r = 0.99 over
    four models.
    """
    with evaluating(attack.model):
        found = attack([pair.harmful for pair in pairs])
        safe = attack.losses([pair.safe for pair in pairs], found.deltas)
    kept = found.losses.amin(0) if attack.config.keep == "best" else found.losses[-1]
    return {
        "harmful_before": float(found.losses[0].mean()),
        "harmful_attacked": float(kept.mean()),
        "safe_attacked": float(safe.mean()),
    }


def over_refusal(
    loss: TargetLoss, answers: Sequence[Row], refusals: Sequence[Row], *, batch: int = 16
) -> float:
    """Share of harmless requests whose refusal has a higher mean log-probability than the answer.

    Args:
        answers, refusals: of the same requests, in the same order.

    Raises:
        ValueError: rows of different requests.
    """
    if [row.prompt for row in answers] != [row.prompt for row in refusals]:
        raise ValueError("refusals: expected rows of the prompts of answers, got others")
    answered, refused = (mean_losses(loss, rows, batch) for rows in (answers, refusals))
    return float((refused < answered).double().mean())


@torch.no_grad()
def mean_losses(loss: TargetLoss, rows: Sequence[Row], batch: int = 16) -> torch.Tensor:
    """[B] mean loss of each row's target, in evaluation mode."""
    with evaluating(loss.model):
        parts = [
            loss.means(Batch(rows[start : start + batch], loss.model.device))
            for start in range(0, len(rows), batch)
        ]
    return torch.cat(parts)
