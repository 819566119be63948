"""Moves of population methods: mutation, crossover and swarm steps, one pass each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gemma_ext.ops.souping import inputs, op, plain
from gemma_ext.ops.souping.impls import is_reference
from gemma_ext.ops.souping.parts import Part
from gemma_ext.ops.souping.rules import Numbers

CROSSOVERS = ("pick", "magnitude", "blend")


@dataclass(frozen=True)
class Move:
    """A run of elements of a particle: where it is, its velocity, and what pulls it.

    Attributes:
        x, v: position and velocity, of one shape, both written.
        best, group_best, group_worst: its own best, the best and the worst of all, of that shape.
        name, offset: as of a `Part`.
    """

    x: Tensor
    v: Tensor
    best: Tensor
    group_best: Tensor
    group_worst: Tensor
    name: str = ""
    offset: int = 0


def mutate_(
    parts: Sequence[Part],
    rate: float | Sequence[float],
    sigma: float | Sequence[float],
    *,
    rounding: str = "nearest",
    seed: int = 0,
    impl: str = "auto",
) -> None:
    """out = x + m e with m ~ Bernoulli(rate), e ~ N(0, sigma^2), of parts with one source.

    Random numbers depend on (seed, name, `Part.models`, position). Args: one number or [T] each.
    """
    inputs.checked(parts, out=True, models=1)
    inputs.check_rounding(rounding)
    rate = inputs.column("rate", rate, len(parts))
    sigma = inputs.column("sigma", sigma, len(parts))
    if is_reference(impl, inputs.device_of(parts)):
        plain.mutate_(parts, rate, sigma, rounding, seed)
    else:
        op.apply_(parts, op.MUTATE, torch.stack([rate, sigma], -1), rounding, seed)


def crossover_(
    parts: Sequence[Part],
    weights: Numbers,
    *,
    kind: str = "pick",
    alpha: float | Sequence[float] = 0.5,
    rounding: str = "nearest",
    seed: int = 0,
    impl: str = "auto",
) -> None:
    """A child of M parents; a linear crossover is `soup_`.

    Args:
        weights: [M] or [T, M], not negative.
        kind: "pick": each element from one parent, with probability weights / sum; "magnitude":
            the same with weights times softmax over the parents of |x|; "blend": BLX-alpha,
            sum_m w_m x_m clamped to [min - alpha I, max + alpha I], I = max - min over the parents.
        alpha: of "blend", one number or [T].
    """
    models = inputs.checked(parts, out=True)
    inputs.check_rounding(rounding)
    if kind not in CROSSOVERS:
        raise ValueError(f"expected kind to be one of {CROSSOVERS}, got {kind!r}")
    weights = inputs.table("weights", weights, len(parts), models)
    if (weights < 0).any():
        raise ValueError(f"expected weights not to be negative, got {weights.min():g}")
    alpha = inputs.column("alpha", alpha, len(parts))
    if is_reference(impl, inputs.device_of(parts)):
        plain.crossover_(parts, weights, kind, alpha, rounding, seed)
        return
    element = (op.PICK, op.PICK_MAGNITUDE, op.BLEND)[CROSSOVERS.index(kind)]
    numbers = torch.cat([weights, alpha.unsqueeze(-1)], -1) if kind == "blend" else weights
    op.apply_(parts, element, numbers, rounding, seed)


def swarm_(
    moves: Sequence[Move],
    coefficients: Sequence[float] | Sequence[Sequence[float]] | Tensor,
    step: float | Sequence[float] = 1.0,
    *,
    rounding: str = "nearest",
    seed: int = 0,
    impl: str = "auto",
) -> None:
    """v = c0 v + c1 (best - x) + c2 (group_best - x) - c3 (group_worst - x); x = x + step v.

    Args:
        coefficients: c, [4] or [T, 4].
        step: one number or [T].
        rounding: of x; v is rounded to nearest.
    """
    inputs.check_moves(moves)
    inputs.check_rounding(rounding)
    coefficients = inputs.table("coefficients", coefficients, len(moves), 4)
    step = inputs.column("step", step, len(moves))
    if is_reference(impl, moves[0].x.device if moves else None):
        plain.swarm_(moves, coefficients, step, rounding, seed)
    else:
        op.swarm_(moves, coefficients, step, rounding, seed)
