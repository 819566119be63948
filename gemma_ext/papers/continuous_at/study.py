"""Robustness against held-out attacks, and what it cost: one row for a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gemma_ext.lm.huggingface import evaluating
from gemma_ext.papers.continuous_at.attack import Attack, AttackConfig
from gemma_ext.papers.continuous_at.config import TrainConfig
from gemma_ext.papers.continuous_at.data import Pair
from gemma_ext.papers.continuous_at.evaluation.embedding import audit, stronger
from gemma_ext.papers.continuous_at.perturbation import EMBEDDINGS
from gemma_ext.papers.continuous_at.probes import over_refusal
from gemma_ext.papers.continuous_at.prompts import Batch, Row
from gemma_ext.papers.continuous_at.target_loss import TargetLoss

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Audit:
    """What models are judged by; nothing of it is trained on.

    Attributes:
        harmful: requests that are to be refused, with the target that is a success.
        useful: requests that are to be answered, with the only right answer.
        refused: refusals of the requests of `useful`.
        borderline: harmless requests that look like harmful ones, with their answers.
        borderline_refused: their refusals.
        attack: the attack of training; the strong one is `evaluation.embedding.stronger` of it.
        restarts: starts of the strong attack.
        more: further attacks: numbers of a model by name, such as "gcg", a success rate in [0, 1],
            and "loss_gcg", the mean loss of the targets under it.
    """

    harmful: Sequence[Pair]
    useful: Sequence[Row]
    refused: Sequence[Row]
    borderline: Sequence[Row]
    borderline_refused: Sequence[Row]
    attack: AttackConfig
    restarts: int = 2
    more: Sequence[Callable[[PreTrainedModel], Mapping[str, float]]] = ()

    def __call__(self, model: PreTrainedModel) -> dict[str, float]:
        """Success rates of attacks, losses of targets, accuracy and shares of refusals."""
        rows = [pair.harmful for pair in self.harmful]
        attack = replace(self.attack, sites=(EMBEDDINGS,))
        with evaluating(model):
            short, loss = Attack(model, attack), TargetLoss(model)
            found = short(rows)
            worst = audit(model, rows, stronger(attack), self.restarts)
            result = {
                "clean": _share(greedy(loss, rows)),
                "attacked": _share(short.greedy(rows, found.deltas)),
                "strong": _share(short.greedy(rows, [torch.cat(worst.deltas)])),
                "loss_clean": float(worst.clean.mean()),
                "loss_attacked": float(found.losses[-1].mean()),
                "loss_strong": float(worst.worst.mean()),
                "useful": _share(greedy(loss, self.useful)),
                "over_refusal": over_refusal(loss, self.useful, self.refused),
                "borderline": over_refusal(loss, self.borderline, self.borderline_refused),
            }
            for attack in self.more:
                result |= attack(model)
            return result


def variants(base: TrainConfig, sites: Sequence[int], ipo: TrainConfig) -> dict[str, TrainConfig]:
    """What the paper compares, and LAT.

    Args:
        base: C-AdvUL with its attack.
        sites: of LAT.
        ipo: C-AdvIPO with its attack.
    """
    return {
        "C-AdvUL": base,
        "C-AdvIPO": ipo,
        "one step": replace(base, attack=base.attack.one_step()),
        "LAT": replace(base, attack=replace(base.attack, sites=tuple(sites))),
        "no attack": replace(base, attack=replace(base.attack, steps=0)),
    }


def greedy(loss: TargetLoss, rows: Sequence[Row], batch: int = 32) -> Tensor:
    """[B] bool: rows whose target is what the likeliest tokens write."""
    starts = range(0, len(rows), batch)
    device = loss.model.device
    return torch.cat([loss.greedy(Batch(rows[at : at + batch], device)) for at in starts])


def _share(found: Tensor) -> float:
    return float(found.double().mean())
