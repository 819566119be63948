"""Merges of deltas: trim, elect, combine; and the element rules that are no sum."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gemma_ext.ops.souping import inputs, op, plain
from gemma_ext.ops.souping.impls import is_reference
from gemma_ext.ops.souping.options import per_part
from gemma_ext.ops.souping.parts import Part
from gemma_ext.ops.souping.rules import Mask, Numbers, RowMask, Rule


def merge_(
    parts: Sequence[Part],
    rule: Rule,
    weights: Numbers = 1.0,
    *,
    mask: Mask | RowMask | None = None,
    divide: Numbers = 1.0,
    alone: Numbers | None = None,
    scale: float | Sequence[float] | Tensor = 1.0,
    rounding: str = "nearest",
    seed: int = 0,
    wide: bool = False,
    impl: str = "auto",
) -> None:
    """out = base + scale * combine_{m in A} w_m mask_m delta_m / divide_m, A as `rule` elects it.

    Without a base, deltas are the sources and nothing is added. Where a delta is NaN, so is out.

    Args:
        parts: T parts of M models; `out` may be the base or a source. Those of one tensor in
            ascending order where `mask` has cuts, which count their ties down.
        rule: election and combination.
        weights, divide: one number, [M] or [T, M].
        mask: which elements of a delta count; None: all.
        alone: factor of a model's term where it stands alone in A, like `weights`.
        scale: one number or [T].
        rounding, seed, wide, impl: as of `soup_`; `seed` also draws `Mask.density`.

    Raises:
        ValueError, TypeError: shapes, dtypes or counts that do not fit; one sentence says which.
    """
    models = inputs.checked(parts, out=True)
    if not isinstance(rule, Rule):
        raise TypeError(f"expected rule to be a Rule, got {type(rule).__name__}")
    inputs.check_rounding(rounding)
    count = len(parts)
    mask = per_part(mask, count, models)
    weights = inputs.table("weights", weights, count, models)
    divide = inputs.table("divide", divide, count, models)
    alone = None if alone is None else inputs.table("alone", alone, count, models)
    scale = inputs.column("scale", scale, count)
    if is_reference(impl, inputs.device_of(parts)):
        plain.merge_(parts, rule, weights, mask, divide, alone, scale, rounding, seed)
    else:
        op.merge_(parts, rule, weights, mask, divide, alone, scale, rounding, seed, wide)


def consensus_(
    parts: Sequence[Part],
    lambdas: Numbers,
    *,
    votes: int = 2,
    task: int | None = None,
    scale: float | Sequence[float] | Tensor = 1.0,
    rounding: str = "nearest",
    seed: int = 0,
    impl: str = "auto",
) -> None:
    """out = base + scale * sum_m delta_m where at least `votes` models use an element, or where
    model `task` does; model m uses it if |delta_m| > lambda_m |sum_j delta_j - delta_m|.

    Wang et al. 2024, arXiv 2405.07813, TALL masks and consensus merging.
    """
    models = inputs.checked(parts, out=True, base=True)
    inputs.check_rounding(rounding)
    if task is not None and not 0 <= task < models:
        raise ValueError(f"expected task to be a model below {models}, got {task}")
    lambdas = inputs.table("lambdas", lambdas, len(parts), models)
    scale = inputs.column("scale", scale, len(parts))
    if is_reference(impl, inputs.device_of(parts)):
        plain.consensus_(parts, lambdas, votes, task, scale, rounding, seed)
        return
    numbers = torch.cat([lambdas, scale.unsqueeze(-1)], -1)
    which = -1 if task is None else task
    op.apply_(parts, op.CONSENSUS, numbers, rounding, seed, votes=votes, task=which)


def fisher_(
    parts: Sequence[Part],
    fishers: Sequence[Sequence[Tensor]],
    weights: Numbers = 1.0,
    *,
    floor: Numbers = 0.0,
    add: float = 0.0,
    rounding: str = "nearest",
    seed: int = 0,
    impl: str = "auto",
) -> None:
    """out = sum_m c_m F_m x_m / sum_m c_m F_m with F_m = max(F_m, floor_m) + add.

    Where the divisor is 0, out is the base, or without one sum_m c_m x_m / sum_m c_m. With masks of
    0 and 1 for F this is the mean of the models whose mask is set.

    Args:
        fishers: for each part M tensors of its shape.
        weights: c, one number, [M] or [T, M].
    """
    models = inputs.checked(parts, out=True)
    inputs.check_rounding(rounding)
    if len(fishers) != len(parts):
        raise ValueError(f"expected fishers of {len(parts)} parts, got {len(fishers)}")
    for part, given in zip(parts, fishers, strict=True):
        inputs.check_like(part, "fishers", given, models)
    weights = inputs.table("weights", weights, len(parts), models)
    floor = inputs.table("floor", floor, len(parts), models)
    if is_reference(impl, inputs.device_of(parts)):
        plain.fisher_(parts, fishers, weights, floor, add, rounding, seed)
        return
    numbers = torch.cat([weights, floor, torch.full_like(weights[:, :1], add)], -1)
    extras = [x for given in fishers for x in given]
    op.apply_(parts, op.FISHER, numbers, rounding, seed, extras=extras)


def nearswap_(
    parts: Sequence[Part],
    t: float | Sequence[float] | Tensor,
    *,
    rounding: str = "nearest",
    seed: int = 0,
    impl: str = "auto",
) -> None:
    """out = base + clamp(t / max(|delta|, 1e-6), 0, 1) delta, of one source against a base.

    Args:
        t: one number or [T].
    """
    inputs.checked(parts, out=True, base=True, models=1)
    inputs.check_rounding(rounding)
    t = inputs.column("t", t, len(parts))
    if is_reference(impl, inputs.device_of(parts)):
        plain.nearswap_(parts, t, rounding, seed)
    else:
        op.apply_(parts, op.NEARSWAP, t.unsqueeze(-1), rounding, seed)


def gather_rows_(
    out: Tensor, sources: Sequence[Tensor], rows: Tensor, *, impl: str = "auto"
) -> None:
    """out[v] = the mean over the models m with rows[v, m] >= 0 of sources[m][rows[v, m]]; zeros
    where there is none.

    Embeddings brought to another vocabulary: one owner copies its row, several are averaged in
    float32, in ascending order, and rounded once.

    Args:
        out: [V, D].
        sources: M tensors [V_m, D]; dtypes may differ.
        rows: int64 [V, M], below V_m.
    """
    inputs.check_rows(out, sources, rows)
    if is_reference(impl, out.device):
        plain.gather_rows_(out, sources, rows)
    else:
        op.gather_rows_(out, sources, rows)
