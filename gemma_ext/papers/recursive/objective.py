"""Losses of uptraining and of early-exit training (sections 2.5, 3.6 and 3.8 of the paper).

    L = sum_i alpha_i L_i                   over loops i = 1..B
    L_i = w_ce CE_i + w_d D(target, q_i)    where loop i has a target, else CE_i

In uptraining only alpha_B counts and the target is a full-size teacher. In exit training the last
loop learns from the text, and the loops before it from the text and, with self-distillation, from
the detached distribution of the last loop. No logits are held, of neither model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gemma_ext.nn._models import unwrap
from gemma_ext.nn.recursive import ExitHead, Plan, exit_heads
from gemma_ext.ops.cce import linear_cross_entropy
from gemma_ext.ops.cce.divergence import KINDS, linear_divergence

EXITS = ("none", "weighted", "aggressive", "frozen")


@dataclass(frozen=True)
class Objective:
    """What a recursive model is trained on.

    Attributes:
        divergence: from the target: "forward_kl" (the paper's choice), "reverse_kl", "jsd", "tvd".
        divergence_weight, ce_weight: w_d and w_ce of loops with a target; those without have
            their cross-entropy at weight 1. The paper does not say its own.
        temperature: of both distributions in D. The paper does not say its own.
        exits: "none"; "weighted", alpha_i = i / sum_i i; "aggressive", alpha_B = 1 and
            alpha_i = exit_weight before it; "frozen", alpha_B = 0 and only an `ExitHead` learns.
        exit_weight: the paper's choice of 0.3, 0.1, 0.05, 0.01.
        self_distillation: early loops also learn from the last one.
    """

    divergence: str = "forward_kl"
    divergence_weight: float = 1.0
    ce_weight: float = 1.0
    temperature: float = 1.0
    exits: str = "none"
    exit_weight: float = 0.1
    self_distillation: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (("divergence", KINDS), ("exits", EXITS)):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name}: expected one of {', '.join(allowed)}, got {getattr(self, name)!r}"
                )
        for name in ("divergence_weight", "ce_weight", "exit_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected a number >= 0, got {getattr(self, name)}")
        if self.self_distillation and self.exits in ("none", "frozen"):
            raise ValueError(
                f"self_distillation: expected exits 'weighted' or 'aggressive', got {self.exits!r}"
            )

    def alphas(self, loops: int) -> list[float]:
        """[B], the weight of each loop's loss."""
        if self.exits == "weighted":
            total = loops * (loops + 1) / 2
            return [loop / total for loop in range(1, loops + 1)]
        early = {"none": 0.0, "aggressive": self.exit_weight, "frozen": 1.0}[self.exits]
        return [early] * (loops - 1) + [0.0 if self.exits == "frozen" else 1.0]

    def prepare(self, model: Any, rank: int = 128) -> None:
        """Freezes a model and gives it an `ExitHead` where the objective asks for it, in place."""
        if self.exits == "frozen":
            model.requires_grad_(False)
            model.exit_head = ExitHead(model.get_output_embeddings().weight, rank)

    def __call__(
        self,
        model: nn.Module,
        batch: Mapping[str, Any],
        teacher: nn.Module | None = None,
        num_items_in_batch: int | Tensor | None = None,
    ) -> Tensor:
        """The loss of a batch with `labels` [batch, T], -100 taking no part.

        Args:
            model: recursive, or vanilla where no exits are asked for; also wrapped.
            batch: what both models take.
            teacher: full-size model of the same vocabulary; None trains the last loop on the text.
            num_items_in_batch: labels of all accumulated batches.

        Raises:
            ValueError: no labels in the batch, or exits of a model without loops.
        """
        batch = dict(batch)
        labels = batch.pop("labels", None)
        if labels is None:
            raise ValueError("expected labels in the batch, got none")
        inner = unwrap(model)
        loops = Plan.of_model(inner).loops
        if self.exits != "none" and loops < 2:
            raise ValueError("exits: expected a model of at least two loops, got one of one")
        heads = exit_heads(model, batch, early=self.exits != "none")
        last = heads[-1]
        if self.exits == "frozen":
            heads = [_changed(head, inner.exit_head) for head in heads[:-1]] + [last]
        targets = [None] * len(heads)
        if self.self_distillation:
            targets = [_as_teacher(last)] * (len(heads) - 1) + [None]
        if teacher is not None:
            with torch.no_grad():
                targets[-1] = _as_teacher(exit_heads(teacher, batch, early=False)[-1])
        common = {
            "targets": labels.to(last["e"].device),
            "shift": True,
            "num_items_in_batch": num_items_in_batch,
        }
        alphas = self.alphas(loops)[-len(heads) :]
        # the heads are cast as autocast had it where they were called
        with torch.autocast(last["e"].device.type, enabled=False):
            return sum(
                alpha * self._of(head, target, common)
                for alpha, head, target in zip(alphas, heads, targets, strict=True)
                if alpha
            )

    def _of(
        self, head: dict[str, Any], target: dict[str, Any] | None, common: dict[str, Any]
    ) -> Tensor:
        """w_ce CE + w_d D; CE at weight 1 where there is nothing to learn from but the text."""
        if target is None:
            return linear_cross_entropy(**head, **common)
        if not self.divergence_weight:
            return self.ce_weight * linear_cross_entropy(**head, **common)
        options = {**head, **target, **common, "kind": self.divergence}
        if self.temperature == 1.0:
            ratio = self.ce_weight / self.divergence_weight
            return self.divergence_weight * linear_divergence(**options, ce_weight=ratio)
        soft = self.divergence_weight * linear_divergence(**options, temperature=self.temperature)
        if not self.ce_weight:
            return soft
        return soft + self.ce_weight * linear_cross_entropy(**head, **common)


def _as_teacher(head: Mapping[str, Any]) -> dict[str, Any]:
    """The same head as the target of a divergence: detached."""
    return {
        f"teacher_{name}": value.detach() if isinstance(value, Tensor) else value
        for name, value in head.items()
    }


def _changed(head: Mapping[str, Any], exit_head: ExitHead) -> dict[str, Any]:
    e, c = exit_head(head["e"], head["c"])
    return {**head, "e": e, "c": c}
