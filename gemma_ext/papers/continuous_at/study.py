"""Robustness against held-out attacks, and what it cost: one row for a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from gemma_ext.papers.continuous_at.attack import Attack, AttackConfig
from gemma_ext.papers.continuous_at.config import TrainConfig
from gemma_ext.papers.continuous_at.data import Pair
from gemma_ext.papers.continuous_at.perturbation import EMBEDDINGS
from gemma_ext.papers.continuous_at.probes import evaluating, over_refusal
from gemma_ext.papers.continuous_at.prompts import Batch, Row
from gemma_ext.papers.continuous_at.target_loss import TargetLoss

if TYPE_CHECKING:
    from transformers import PreTrainedModel

AUDIT_STEPS, AUDIT_RATE = 100, 0.05


@dataclass(frozen=True)
class Audit:
    """What models are judged by; nothing of it is trained on.

    Attributes:
        harmful: requests that are to be refused, with the target that is a success.
        useful: requests that are to be answered, with the only right answer.
        refused: refusals of the requests of `useful`.
        borderline: harmless requests that look like harmful ones, with their answers.
        borderline_refused: their refusals.
        attack: the attack of training.
        restarts: of the strong attack: K = 100, normalised gradient, from random points of the
            ball, the best iterate; a request is lost if one restart wins it.
        more: further attacks, by name: success rate of a model, in [0, 1].
    """

    harmful: Sequence[Pair]
    useful: Sequence[Row]
    refused: Sequence[Row]
    borderline: Sequence[Row]
    borderline_refused: Sequence[Row]
    attack: AttackConfig
    restarts: int = 2
    more: Mapping[str, Callable[[PreTrainedModel], float]] = field(default_factory=dict)

    def strong(self) -> AttackConfig:
        """The strong attack in the same ball around embeddings."""
        return replace(
            self.attack,
            steps=AUDIT_STEPS,
            rate=AUDIT_RATE,
            unit="ball",
            step="l2norm",
            init="ball",
            sites=(EMBEDDINGS,),
            floor=None,
            keep="best",
        )

    def __call__(self, model: PreTrainedModel) -> dict[str, float]:
        """Success rates of attacks, losses of targets, accuracy and shares of refusals."""
        rows = [pair.harmful for pair in self.harmful]
        with evaluating(model):
            trained = replace(self.attack, sites=(EMBEDDINGS,))
            short, strong = Attack(model, trained), Attack(model, self.strong())
            found = short(rows)
            lost = torch.zeros(len(rows), dtype=torch.bool)
            losses = []
            for seed in range(self.restarts):
                each = strong(rows, seed=seed)
                lost |= strong.greedy(rows, each.deltas).cpu()
                losses.append(each.losses.min(0).values)
            loss = short.perturbed.loss
            right = loss_of(self.useful, loss.greedy, model)
            result = {
                "clean": _share(loss_of(rows, loss.greedy, model)),
                "attacked": _share(short.greedy(rows, found.deltas)),
                "strong": _share(lost),
                "loss_clean": float(found.losses[0].mean()),
                "loss_attacked": float(found.losses[-1].mean()),
                "loss_strong": float(torch.stack(losses).min(0).values.mean()),
                "useful": _share(right),
                "over_refusal": over_refusal(loss, self.useful, self.refused),
                "borderline": over_refusal(loss, self.borderline, self.borderline_refused),
            }
            return result | {name: attack(model) for name, attack in self.more.items()}


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


def loss_of(
    rows: Sequence[Row],
    read: Callable[[Batch], torch.Tensor],
    model: PreTrainedModel,
    batch: int = 32,
) -> torch.Tensor:
    """[B] of what `read` says of rows, in batches."""
    parts = [
        read(Batch(rows[start : start + batch], model.device))
        for start in range(0, len(rows), batch)
    ]
    return torch.cat(parts)


def _share(found: torch.Tensor) -> float:
    return float(found.double().mean())
