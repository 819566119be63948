"""The souping ops as torch sees them: calls with named arguments, fakes, no derivatives."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from gemma_ext.ops._derivatives import refuse_derivatives
from gemma_ext.ops.souping.inputs import models_of
from gemma_ext.ops.souping.parts import Part
from gemma_ext.ops.souping.rules import Cut, Mask, RowMask, Rule
from gemma_ext.reference.random_numbers import random_key

_ops = torch.ops.gemma_ext
STATE = 66
"""float64 numbers of one sum: 64 strands of the open block, the open span, the total."""
GRAM, NORMS, DOTS = range(3)
OVERLAPS, BALANCE = range(2)
CONSENSUS, FISHER, NEARSWAP, MUTATE, PICK, PICK_MAGNITUDE, BLEND = range(7)
_ELECTIONS = ("none", "sum", "count")
_COMBINES = ("sum", "mean", "weighted_mean", "max")


@lru_cache(maxsize=1 << 16)
def _key(seed: int, name: str) -> int:
    key = random_key(seed, name)
    return key - (1 << 64) if key >= 1 << 63 else key


def _parts(parts: Sequence[Part]) -> dict[str, list[Tensor]]:
    bases = [part.base for part in parts if part.base is not None]
    return {"sources": [x for part in parts for x in part.sources], "bases": bases}


def _places(parts: Sequence[Part], seed: int) -> dict[str, list[int]]:
    return {
        "offsets": [part.offset for part in parts],
        "keys": [_key(seed, part.name) for part in parts],
    }


def _random(parts: Sequence[Part], seed: int) -> dict[str, list[int]]:
    return {**_places(parts, seed), "models": [m for part in parts for m in models_of(part)]}


def _mask(mask: Mask | RowMask | None, *, rescale: bool = True) -> dict[str, Any]:
    """A mask of `options.per_part` as arguments."""
    rows = None
    keep = drop = density = None
    if isinstance(mask, Mask):
        keep, drop, density = mask.keep, mask.drop, mask.density
    if isinstance(mask, RowMask):
        rows = torch.tensor(
            [
                (drop, keep, low if draw else 0.0, spread if draw else 0.0, draw)
                for drop, keep, low, spread, draw in _row_choices(mask)
            ],
            dtype=torch.float64,
        )
        keep = drop = None
    found = {
        **_cut("keep", keep),
        **_cut("drop", drop),
        "density": None if density is None else density.contiguous(),
        "rows": rows,
        "by_value": isinstance(mask, RowMask) and mask.spread == "value",
    }
    if rescale:
        found["rescale"] = isinstance(mask, RowMask) and mask.rescale
    return found


def _row_choices(mask: RowMask):
    for keep, drop, density, epsilon in zip(
        mask.keep, mask.drop, mask.density, mask.epsilon, strict=True
    ):
        draw = density is not None
        yield drop, keep, density - epsilon if draw else 0.0, 2 * epsilon, draw


def _cut(name: str, cut: Cut | None) -> dict[str, Any]:
    return {
        name: None if cut is None else cut.bits,
        f"{name}_ties": None if cut is None else cut.ties,
        f"{name}_variance": cut is not None and cut.quantity == "variance",
    }


def _written(*tensors: Tensor) -> None:
    """Tells autograd that these have changed."""
    torch.autograd.graph.increment_version(tensors)


def soup_(parts, weights, scale, rows, rounding, seed, wide):
    outs = [part.out for part in parts]
    with torch.no_grad():
        _ops.soup_(
            **_parts(parts),
            outs=outs,
            **_places(parts, seed),
            weights=weights.contiguous(),
            scale=scale.contiguous(),
            by_row=rows,
            wide=wide,
            stochastic=rounding == "stochastic",
        )
    _written(*outs)


def merge_(parts, rule: Rule, weights, mask, divide, alone, scale, rounding, seed, wide):
    outs = [part.out for part in parts]
    with torch.no_grad():
        _ops.soup_merge_(
            **_parts(parts),
            outs=outs,
            **_random(parts, seed),
            **_rule(rule),
            zero=rule.zero,
            combine=_COMBINES.index(rule.combine),
            **_mask(mask),
            weights=weights.contiguous(),
            divide=divide.contiguous(),
            alone=None if alone is None else alone.contiguous(),
            scale=scale.contiguous(),
            wide=wide,
            stochastic=rounding == "stochastic",
        )
    _written(*outs)


def _rule(rule: Rule) -> dict[str, Any]:
    return {"election": _ELECTIONS.index(rule.election), "weighted": rule.weighted}


def survey(parts, groups, quantity, coarse, zeros, odd, window, prefix, fine):
    with torch.no_grad():
        _ops.soup_survey_(
            **_parts(parts),
            groups=list(groups),
            variance=quantity == "variance",
            coarse=coarse,
            zeros=zeros,
            odd=odd,
            window=window,
            prefix=None if prefix is None else prefix.contiguous(),
            fine=fine,
        )


def sums_(parts, kind: int, groups, state, *, mask=None, seed=0, extras=(), top=None):
    with torch.no_grad():
        _ops.soup_sums_(
            **_parts(parts),
            extras=list(extras),
            **_random(parts, seed),
            groups=list(groups),
            sum=kind,
            **_mask(mask, rescale=False),
            state=state,
            top=top,
        )


def gram_rows(parts) -> Tensor:
    with torch.no_grad():
        return _ops.soup_gram_rows(**_parts(parts), models=len(parts[0].sources))


def counts(parts, kind: int, rule: Rule, weights, mask, divide, seed) -> Tensor:
    with torch.no_grad():
        return _ops.soup_counts(
            **_parts(parts),
            **_random(parts, seed),
            parts=len(parts),
            count=kind,
            **_rule(rule),
            **_mask(mask),
            weights=weights.contiguous(),
            divide=divide.contiguous(),
        )


def apply_(parts, element: int, numbers, rounding, seed, *, extras=(), votes=0, task=-1):
    outs = [part.out for part in parts]
    with torch.no_grad():
        _ops.soup_apply_(
            **_parts(parts),
            extras=list(extras),
            outs=outs,
            **_random(parts, seed),
            element=element,
            numbers=numbers.contiguous(),
            votes=votes,
            task=task,
            stochastic=rounding == "stochastic",
        )
    _written(*outs)


def swarm_(moves, coefficients, step, rounding, seed):
    xs, vs = [move.x for move in moves], [move.v for move in moves]
    with torch.no_grad():
        _ops.soup_swarm_(
            xs=xs,
            vs=vs,
            pulls=[p for m in moves for p in (m.best, m.group_best, m.group_worst)],
            **_places(moves, seed),
            numbers=torch.cat([coefficients, step.unsqueeze(-1)], -1).contiguous(),
            stochastic=rounding == "stochastic",
        )
    _written(*xs, *vs)


def gather_rows_(out, sources, rows):
    with torch.no_grad():
        _ops.soup_gather_rows_(out, list(sources), rows.contiguous())
    _written(out)


_WRITING = (
    "soup_",
    "soup_merge_",
    "soup_survey_",
    "soup_sums_",
    "soup_apply_",
    "soup_swarm_",
    "soup_gather_rows_",
)
_REMEDY = "gemma_ext.ops.souping.soup has the first ones of a weighted sum"
for _op in (*_WRITING, "soup_gram_rows", "soup_counts"):
    refuse_derivatives(_op, _REMEDY)


def _fake_nothing(*args: Any, **kwargs: Any) -> None:
    return None


for _op in _WRITING:
    torch.library.register_fake(f"gemma_ext::{_op}", _fake_nothing)


@torch.library.register_fake("gemma_ext::soup_gram_rows")
def _gram_rows_fake(sources, bases, models):
    rows = sum(x.numel() // max(x.shape[-1] if x.dim() else 1, 1) for x in sources[::models])
    return sources[0].new_empty((rows, models, models), dtype=torch.float64)


@torch.library.register_fake("gemma_ext::soup_counts")
def _counts_fake(sources, bases, offsets, keys, models, parts, count, *rest, **more):
    shape = (parts, len(sources) // parts, 2) if count == OVERLAPS else (parts,)
    return sources[0].new_empty(shape, dtype=torch.int64)
