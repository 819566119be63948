"""What the stored layers are made of (section 2.3 of the paper)."""

from __future__ import annotations

import dataclasses
from fractions import Fraction

import torch

from gemma_ext.nn.recursive import Plan

INITS = ("stepwise", "average", "lower", "upper", "random")


def stepwise_indices(layers: int, count: int) -> list[int]:
    """`count` layers spread over all L, first and last among them, counted from 0.

    Places in the middle are rounded half to even, in exact arithmetic, as the published code's
    round(linspace(0, L - 1, K)) does.

    Raises:
        ValueError: a count outside 1..L.

    Example:
        >>> stepwise_indices(18, 9)
        [0, 2, 4, 6, 8, 11, 13, 15, 17]
    """
    if not 1 <= count <= layers:
        raise ValueError(f"count: expected a number in 1..{layers}, got {count}")
    if count == 1:
        return [0]
    return [round(Fraction(i * (layers - 1), count - 1)) for i in range(count)]


def source_indices(plan: Plan, seed: int = 0) -> Plan:
    """The plan with the source layers of each stored layer; those alone are their own.

    Raises:
        ValueError: an unknown `plan.init`.
    """
    if plan.init not in INITS:
        raise ValueError(f"init: expected one of {', '.join(INITS)}, got {plan.init!r}")
    first, count = plan.prelude, plan.stored
    shared = plan.layers - plan.prelude - plan.coda
    block = range(first, first + count)
    if plan.init == "average":
        groups = [tuple(plan.depths_of(s)) for s in block]
    else:
        groups = [(first + place,) for place in _places(plan.init, shared, count, seed)]
    alone = [(depth,) for depth in range(plan.prelude)]
    last = [(depth,) for depth in range(plan.layers - plan.coda, plan.layers)]
    return dataclasses.replace(plan, source_indices=(*alone, *groups, *last))


def _places(init: str, layers: int, count: int, seed: int) -> list[int]:
    if init == "stepwise":
        return stepwise_indices(layers, count)
    if init == "lower":
        return list(range(count))
    if init == "upper":
        return list(range(layers - count, layers))
    generator = torch.Generator().manual_seed(seed)
    return sorted(torch.randperm(layers, generator=generator)[:count].tolist())
