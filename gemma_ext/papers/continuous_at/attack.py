"""Projected gradient descent on the states of prompt tokens (2.2): makes a target likelier.

    d = 0;  K times:  d <- project(d - a direction(grad of mean_t -log p(target_t | x + d)))

All rows of a call are attacked side by side, each with the mean loss of its own target, so that a
row's result does not depend on its neighbours. Parameters get no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gemma_ext.papers.continuous_at.descent import Descent, start
from gemma_ext.papers.continuous_at.perturbation import EMBEDDINGS, Perturbed, frozen
from gemma_ext.papers.continuous_at.prompts import Batch, Row
from gemma_ext.papers.continuous_at.steps import STEPS, boundary

if TYPE_CHECKING:
    from transformers import PreTrainedModel

UNITS, INITS, KEEPS = ("absolute", "ball"), ("zero", "ball"), ("last", "best")


@dataclass(frozen=True)
class AttackConfig:
    """How a prompt is attacked; the defaults are the paper's.

    Attributes:
        steps: K; 0 attacks nothing, the control of the paper.
        rate: a, added to each element by sign and rms, length of the step of l2norm.
        unit: of the rate: "absolute", or "ball": 1 is a step of sign, rms or l2norm as long as the
            radius.
        step: one of `STEPS`.
        eps_rel: radius of a token's ball as a share of `Perturbed.norms`; may be infinite.
        init: "zero", or "ball": uniform in the ball.
        sites: `EMBEDDINGS` and blocks (LAT).
        floor: mean loss of a target below which its row has lost and is attacked no further.
        keep: "last" iterate, or the "best" one seen.

    Raises:
        ValueError: a value that does not fit.
    """

    steps: int = 10
    rate: float = 1e-4
    unit: str = "absolute"
    step: str = "sign"
    eps_rel: float = 0.05
    init: str = "zero"
    sites: tuple[int, ...] = (EMBEDDINGS,)
    floor: float | None = None
    keep: str = "last"

    def __post_init__(self) -> None:
        object.__setattr__(self, "sites", tuple(self.sites))
        for name, allowed in (("unit", UNITS), ("step", STEPS), ("init", INITS), ("keep", KEEPS)):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name}: expected one of {', '.join(allowed)}, got {getattr(self, name)!r}"
                )
        for name in ("steps", "rate", "eps_rel"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: expected a number >= 0, got {getattr(self, name)}")
        if self.eps_rel == float("inf") and (self.unit == "ball" or self.init == "ball"):
            raise ValueError("eps_rel: expected a finite radius to measure steps or draw by")

    def one_step(self) -> AttackConfig:
        """The one-step variant: a single step as long as the radius."""
        return replace(self, steps=1, rate=1.0, unit="ball")


@dataclass(frozen=True)
class Attacked:
    """What was found for some rows.

    Attributes:
        rows: B of them.
        deltas: [P, D] for each site, row by row (`Perturbed`).
        radii: [P] for each site.
        losses: float64 [S, B], mean loss of each target at S iterates, the first before the first
            step; a row that was stopped keeps its last one.
        steps: [B] steps that each row went.
    """

    rows: tuple[Row, ...]
    deltas: tuple[Tensor, ...]
    radii: tuple[Tensor, ...]
    losses: Tensor
    steps: Tensor

    @property
    def boundary(self) -> tuple[float, ...]:
        """Share of tokens on the surface of their ball, for each site."""
        return tuple(map(boundary, self.deltas, self.radii))

    def of(self, rows: Sequence[int]) -> list[Tensor]:
        """Deltas of some rows, in that order, for each site."""
        counts = [row.moved for row in self.rows]
        pieces = [delta.split(counts) for delta in self.deltas]
        return [torch.cat([parts[row] for row in rows]) for parts in pieces]


class Attack:
    """PGD against a model.

    The model stays in its mode: with dropout on, gradients are those of its draws.

    Args:
        model: causal LM of transformers, or of peft around one.
        config: of the attack.
        batch_tokens: padded tokens that are run at once.
        impl: as in `gemma_ext.linear_logprobs`.

    Raises:
        ValueError: see `Perturbed`.

    Example:
        >>> attack = Attack(model, AttackConfig(eps_rel=0.1))
        >>> found = attack([encoder.row(encoder.ask("..."), encoder.answer("Sure, here is"))])
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: AttackConfig | None = None,
        *,
        batch_tokens: int = 8192,
        impl: str = "auto",
    ) -> None:
        if batch_tokens < 1:
            raise ValueError(f"batch_tokens: expected at least 1, got {batch_tokens}")
        self.model, self.config = model, config or AttackConfig()
        self.perturbed = Perturbed(model, self.config.sites, impl)
        self.batch_tokens = batch_tokens

    def __call__(self, rows: Sequence[Row], *, evaluate: bool = True, seed: int = 0) -> Attacked:
        """Attacks the targets of rows.

        Args:
            evaluate: also run the model on the last iterate.
            seed: of init "ball".

        Raises:
            ValueError: no rows.
        """
        found: list[Attacked | None] = [None] * len(rows)
        for places in self._groups(rows):
            some = self._attack([rows[place] for place in places], evaluate, seed)
            for at, place in enumerate(places):
                found[place] = _only(some, at)
        return _joined(found)

    @torch.no_grad()
    def losses(self, rows: Sequence[Row], deltas: Sequence[Tensor]) -> Tensor:
        """[B] mean losses of targets under deltas, such as those found for other targets.

        Args:
            deltas: [P, D] for each site, of the rows' prompts.
        """
        return self._read(rows, deltas, self.perturbed.loss.means)

    def greedy(self, rows: Sequence[Row], deltas: Sequence[Tensor]) -> Tensor:
        """[B] bool: rows whose target is what the likeliest tokens under the deltas write."""
        return self._read(rows, deltas, self.perturbed.loss.greedy)

    def _read(
        self,
        rows: Sequence[Row],
        deltas: Sequence[Tensor],
        read: Callable[[Batch, Tensor], Tensor],
    ) -> Tensor:
        counts = [row.moved for row in rows]
        pieces = [delta.split(counts) for delta in deltas]
        found: list[Tensor | None] = [None] * len(rows)
        for places in self._groups(rows):
            batch = Batch([rows[place] for place in places], self.model.device)
            here = [torch.cat([parts[place] for place in places]) for parts in pieces]
            with self.perturbed.applied(batch, here) as embeddings:
                values = read(batch, embeddings)
            for place, value in zip(places, values, strict=True):
                found[place] = value
        return torch.stack(found)

    def _groups(self, rows: Sequence[Row]) -> list[list[int]]:
        """Places of rows of similar length, so that little is padded."""
        if not rows:
            raise ValueError("rows: expected at least one, got none")
        groups: list[list[int]] = []
        for place in sorted(range(len(rows)), key=lambda place: -len(rows[place])):
            if groups and len(rows[groups[-1][0]]) * (len(groups[-1]) + 1) <= self.batch_tokens:
                groups[-1].append(place)
            else:
                groups.append([place])
        return groups

    def _attack(self, rows: list[Row], evaluate: bool, seed: int) -> Attacked:
        config, perturbed = self.config, self.perturbed
        batch = Batch(rows, self.model.device)
        radii = [norms * config.eps_rel for norms in perturbed.norms(batch)]
        widths = [perturbed.width(site) for site in config.sites]
        deltas = start(rows, radii, widths, None if config.init == "zero" else seed)
        run = Descent(perturbed, config, batch, deltas, radii)
        with frozen(self.model), torch.enable_grad():
            for _ in range(config.steps):
                if not run.step():
                    break
            if evaluate or config.keep == "best":
                run.look()
        return Attacked(tuple(rows), run.result(), tuple(radii), run.losses(), run.walked)


def _only(attacked: Attacked, at: int) -> Attacked:
    row, ends = attacked.rows[at], sum(row.moved for row in attacked.rows[: at + 1])
    part = slice(ends - row.moved, ends)
    return Attacked(
        (row,),
        tuple(delta[part] for delta in attacked.deltas),
        tuple(radius[part] for radius in attacked.radii),
        attacked.losses[:, at : at + 1],
        attacked.steps[at : at + 1],
    )


def _joined(parts: Sequence[Attacked]) -> Attacked:
    longest = max(len(part.losses) for part in parts)
    losses = [
        torch.cat([p.losses, p.losses[-1:].expand(longest - len(p.losses), -1)]) for p in parts
    ]
    return Attacked(
        tuple(row for part in parts for row in part.rows),
        tuple(map(torch.cat, zip(*(part.deltas for part in parts), strict=True))),
        tuple(map(torch.cat, zip(*(part.radii for part in parts), strict=True))),
        torch.cat(losses, 1),
        torch.cat([part.steps for part in parts]),
    )
