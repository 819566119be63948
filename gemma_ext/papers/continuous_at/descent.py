"""Rows that are attacked side by side, and leave one by one."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gemma_ext.papers.continuous_at.perturbation import Perturbed
from gemma_ext.papers.continuous_at.prompts import Batch, Row
from gemma_ext.papers.continuous_at.steps import Stepper, project

if TYPE_CHECKING:
    from gemma_ext.papers.continuous_at.attack import AttackConfig

_SCALE = 2.0**12  # keeps gradients of a float16 model above 6e-8; a factor changes no direction


class Descent:
    """Steps of PGD on the rows of a batch; rows whose loss is below the floor are run no more.

    Attributes:
        batch: rows that are still attacked.
        walked: [B] steps that each row went.

    Args:
        batch: B rows.
        deltas: [P, D] for each site, where it starts; changed in place.
        radii: [P] for each site.
    """

    def __init__(
        self,
        perturbed: Perturbed,
        config: AttackConfig,
        batch: Batch,
        deltas: list[Tensor],
        radii: list[Tensor],
    ) -> None:
        self.perturbed, self.config, self.batch = perturbed, config, batch
        self.deltas, self.radii = deltas, radii
        self.rows, self.owner = batch.rows, batch.places[0]
        self.walked = torch.zeros(len(batch), dtype=torch.int64)
        self._steppers = [Stepper(config.step) for _ in deltas]
        self._live = torch.arange(len(batch), device=batch.device)
        self._tokens = torch.arange(len(self.owner), device=batch.device)
        self._latest = torch.full((len(batch),), float("nan"), dtype=torch.float64)
        self._trace: list[Tensor] = []
        self._lowest = torch.full_like(self._latest, float("inf"))
        self._best = [delta.clone() for delta in deltas] if config.keep == "best" else None

    def step(self) -> bool:
        """One step of every row that is left; False where none is."""
        here = [delta[self._tokens].requires_grad_() for delta in self.deltas]
        means = self.batch.means(self.perturbed(self.batch, here))
        self._note(means)
        half = self.perturbed.embeddings.module.weight.dtype == torch.float16
        grads = torch.autograd.grad(means.sum() * (_SCALE if half else 1.0), here)
        if self.config.floor is not None:
            grads = self._retire(means.detach() >= self.config.floor, grads)
        if not len(self._live):
            return False
        self.walked[self._live.cpu()] += 1
        for delta, radius, grad, stepper in zip(
            self.deltas, self.radii, grads, self._steppers, strict=True
        ):
            at = self._tokens
            rate = self._rate(radius[at], delta.shape[1])
            delta[at] = project(delta[at] - rate * stepper.direction(grad), radius[at])
        return True

    @torch.no_grad()
    def look(self) -> None:
        """Losses where the rows are now."""
        if len(self._live):
            here = [delta[self._tokens] for delta in self.deltas]
            self._note(self.batch.means(self.perturbed(self.batch, here)))

    def losses(self) -> Tensor:
        """[S, B] at all iterates that were run."""
        return (
            torch.stack(self._trace) if self._trace else self._latest.new_zeros(0, len(self.rows))
        )

    def result(self) -> tuple[Tensor, ...]:
        """The deltas that are kept."""
        return tuple(self.deltas if self._best is None else self._best)

    def _note(self, means: Tensor) -> None:
        self._latest = self._latest.clone()
        self._latest[self._live.cpu()] = means.detach().double().cpu()
        self._trace.append(self._latest)
        if self._best is not None:
            better = (self._latest < self._lowest).to(self.owner.device)[self.owner]
            self._lowest = torch.minimum(self._lowest, self._latest)
            for best, delta in zip(self._best, self.deltas, strict=True):
                best[better] = delta[better]

    def _retire(self, stays: Tensor, grads: Sequence[Tensor]) -> Sequence[Tensor]:
        if bool(stays.all()):
            return grads
        self._live = self._live[stays]
        inside = torch.isin(self.owner[self._tokens], self._live)
        self._tokens = self._tokens[inside]
        for stepper in self._steppers:
            stepper.keep(inside)
        if len(self._live):
            self.batch = Batch([self.rows[at] for at in self._live.tolist()], self.batch.device)
        return [grad[inside] for grad in grads]

    def _rate(self, radius: Tensor, width: int) -> Tensor | float:
        if self.config.unit == "absolute":
            return self.config.rate
        length = 1.0 if self.config.step == "l2norm" else width**0.5
        return (self.config.rate * radius / length).unsqueeze(-1)


def start(
    rows: Sequence[Row], radii: Sequence[Tensor], widths: Sequence[int], seed: int | None
) -> list[Tensor]:
    """Where a descent begins, [P, D] for each site: 0, or with a seed uniform in the balls.

    What a row draws is a function of the seed and its own tokens.
    """
    found = []
    for site, (radius, width) in enumerate(zip(radii, widths, strict=True)):
        if seed is None:
            found.append(torch.zeros(len(radius), width, device=radius.device))
            continue
        drawn = torch.cat([_drawn(row, width, f"{seed} {site}") for row in rows])
        found.append(drawn.to(radius.device) * radius.float().unsqueeze(-1))
    return found


def _drawn(row: Row, width: int, name: str) -> Tensor:
    key = hashlib.blake2b(f"{name} {row.prompt} {row.target}".encode(), digest_size=7)
    generator = torch.Generator().manual_seed(int.from_bytes(key.digest(), "big"))
    noise = torch.randn(row.moved, width, generator=generator)
    length = torch.rand(row.moved, 1, generator=generator) ** (1 / width)
    return noise / noise.norm(dim=1, keepdim=True) * length
