"""One step's loss and gradient, in pieces that fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gemma_ext.papers.continuous_at.attack import Attacked
from gemma_ext.papers.continuous_at.config import TrainConfig
from gemma_ext.papers.continuous_at.data import Pair
from gemma_ext.papers.continuous_at.losses import cut, floored, ipo
from gemma_ext.papers.continuous_at.perturbation import Perturbed
from gemma_ext.papers.continuous_at.prompts import Batch, Row
from gemma_ext.papers.continuous_at.references import References


class Objective:
    """The loss of a step, with its gradient added to the parameters'.

    Each row's mean loss is cut by itself, and rows are averaged over the step, so that the size of
    pieces changes nothing. The utility term is the mean over all of a step's answer tokens.

    Args:
        perturbed: losses of the model under perturbation.
        references: of the rows, for IPO.
    """

    def __init__(
        self, perturbed: Perturbed, config: TrainConfig, references: References | None = None
    ) -> None:
        self.perturbed, self.config, self.references = perturbed, config, references

    def backward(
        self, pairs: Sequence[Pair], attacked: Attacked | None, utility: Sequence[Row]
    ) -> dict[str, float]:
        """Gradients of a step, and its terms without cut-offs.

        Args:
            attacked: what was found for the harmful rows of `pairs`; None without pairs.
        """
        found: dict[str, float] = {}
        total = 0.0
        for places in _pieces(len(pairs), max(1, self.config.micro_batch // 2)):
            loss, terms = self._adversarial([pairs[at] for at in places], attacked.of(places * 2))
            share = len(places) / len(pairs)
            (loss * share).backward()
            total += float(loss.detach()) * share
            for name, value in terms.items():
                found[name] = found.get(name, 0.0) + value * share
        tokens = sum(len(row.target) for row in utility)
        for places in _pieces(len(utility), self.config.micro_batch):
            batch = Batch([utility[at] for at in places], self.perturbed.model.device)
            loss = self.perturbed.loss(batch).sum() / tokens
            (self.config.utility_weight * loss).backward()
            total += self.config.utility_weight * float(loss.detach())
            found["utility"] = found.get("utility", 0.0) + float(loss.detach())
        return found | {"loss": total}

    def _adversarial(
        self, pairs: Sequence[Pair], deltas: Sequence[Tensor]
    ) -> tuple[Tensor, dict[str, float]]:
        """Mean over pairs, which are run as safe rows, then harmful rows, under the same deltas."""
        config = self.config
        rows = [pair.safe for pair in pairs] + [pair.harmful for pair in pairs]
        batch = Batch(rows, self.perturbed.model.device)
        nll = self.perturbed(batch, deltas)
        safe, harmful = batch.means(nll).chunk(2)
        terms = {"toward": float(safe.detach().mean()), "away": float(harmful.detach().mean())}
        if config.loss == "ul":
            compatible = {"reference_compatible": config.reference_compatible}
            toward = cut(safe, config.toward_cutoff, **compatible)
            away = cut(-harmful, config.away_cutoff, **compatible)
            return (config.toward_weight * toward + config.away_weight * away).mean(), terms
        references = self.references(rows).to(nll.device)
        if config.ipo_token_floor or config.reference_compatible:
            harmful = batch.means(floored(nll))[len(pairs) :]
        before, before_harmful = references.chunk(2)
        loss = ipo(-safe, before, -harmful, before_harmful, config.beta)
        with torch.no_grad():
            terms["margin"] = float((harmful - safe - before + before_harmful).mean())
        return loss.mean(), terms


def _pieces(count: int, size: int) -> Iterator[list[int]]:
    for start in range(0, count, size):
        yield list(range(start, min(start + size, count)))
