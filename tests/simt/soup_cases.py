"""Digests of the souping ops on awkward inputs: `soup_cases.py [OPS]`, OPS the device's library.

Any number of models of mixed types at odd addresses, in parts of any length; the lines of a run
with OPS, whose kernels are the device code as fibers, are those of the CPU's own kernels.
"""

from __future__ import annotations

import hashlib
import sys
import warnings
from pathlib import Path

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1] / "ops"))
from soup_problem import DTYPES, bits, generator

from gemma_ext.ops.souping import (
    Gram,
    Magnitudes,
    Mask,
    Norms,
    Part,
    RowMask,
    Rule,
    consensus_,
    crossover_,
    gram_rows,
    merge_,
    overlaps,
    sample,
    sign_balance,
    soup_,
)

LENGTHS = (1, 7, 4097, 0, 9000, 64)
RULE = Rule("sum", combine="weighted_mean")


def parts_of(models: int, g: torch.Generator, *, width: int | None = None) -> list[Part]:
    """One part per length, or with `width` of so many rows, of types and at addresses by chance."""

    def tensor(n: int, centre: Tensor) -> Tensor:
        lead = int(torch.randint(0, 9, (), generator=g))
        dtype = DTYPES[int(torch.randint(0, 3, (), generator=g))]
        room = torch.empty(lead + n, dtype=dtype)
        room[lead:] = centre + torch.randint(-9, 10, (n,), generator=g) * 2.0**-12
        return room[lead:] if width is None else room[lead:].view(-1, width)

    found, offset = [], 0
    for k, length in enumerate(LENGTHS if width is None else (3, 1, 5)):
        n = length if width is None else length * width
        centre = 0.02 * torch.randn(n, generator=g)
        sources = [tensor(n, centre) for _ in range(models)]
        out = torch.full_like(tensor(n, centre), torch.nan)
        order = [(m + k) % models for m in range(models)]
        found.append(Part(sources, tensor(n, centre), out, f"layer.{k % 2}", offset, order))
        offset += n
    return found


def results(models: int) -> dict[str, Tensor]:
    g = generator(models)
    parts = parts_of(models, g)
    count, weights = len(parts), torch.rand(len(parts), models, generator=g)
    found: dict[str, Tensor] = {}

    def keep_outs(name: str) -> None:
        for k, part in enumerate(parts):
            found[f"{name} {k}"] = part.out.clone()

    for rounding in ("nearest", "stochastic"):
        soup_(parts, weights, scale=0.7, rounding=rounding, seed=3)
        keep_outs(f"soup {rounding}")
    for groups, quantity in ((1, "delta"), (count, "delta"), (1, "variance")):
        magnitudes = Magnitudes(models, groups=groups, cuts=2, quantity=quantity)
        group = list(range(count)) if groups > 1 else 0
        for _ in range(2):
            magnitudes.survey(parts, group)
            magnitudes.settle([[1500, 20]] * magnitudes.streams)
        keep, drop = magnitudes.cut(0), magnitudes.cut(1)
        at_once = Magnitudes(models, groups=groups, cuts=2, quantity=quantity)
        at_once.find(parts, [[1500, 20]] * magnitudes.streams, group)
        found[f"found {groups} {quantity}"] = torch.cat([at_once.cut(0).bits, at_once.cut(1).ties])
        masks = {"": Mask(keep.fresh(), drop.fresh(), 0.8), "all ": Mask(keep.resolved("all"))}
        for which, mask in masks.items():
            merge_(parts, RULE, weights, mask=mask, divide=0.8, seed=4)
            keep_outs(f"merge {which}{groups} {quantity}")
            found[f"ties {which}{groups} {quantity}"] = mask.keep.ties
        norms = Norms(models, groups=2)
        norms.add(parts, [k % 2 for k in range(count)], mask=Mask(keep.fresh()), seed=4)
        found[f"norms {groups} {quantity}"] = norms.value
        found[f"overlaps {groups} {quantity}"] = overlaps(parts, Mask(keep.fresh(), None, 0.5))
    merge_(parts, Rule("count", False, -1, "max"), weights, alone=1.5, wide=True)
    keep_outs("merge max")
    found["balance"] = sign_balance(parts, Rule("count"), weights)
    gram = Gram(models, groups=2)
    for _ in range(2):
        gram.add(parts, [0, 0, 1, 1, 0, 1])
    found["gram"] = gram.value
    consensus_(parts, 0.3, votes=1)
    keep_outs("consensus")
    crossover_(parts, weights, kind="magnitude", seed=9)
    keep_outs("crossover")

    parts = parts_of(models, g, width=37)
    for spread in ("rank", "value"):
        mask = RowMask(30, 2, 0.6, 0.3, spread, True)
        merge_(parts, RULE, weights[:3], mask=mask, seed=5)
        keep_outs(f"rows {spread}")
    soup_(parts, torch.rand(9, models, generator=g), rows=True)
    keep_outs("soup rows")
    found["gram rows"] = gram_rows(parts)
    return found


def main() -> None:
    torch.set_num_threads(1)
    sample.ENOUGH = 1
    if len(sys.argv) > 1:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch tells of every kernel that is replaced
            torch.ops.load_library(sys.argv[1])
    for models in (1, 2, 4, 7, 9, 17):
        for name, x in results(models).items():
            digest = hashlib.sha256(bits(x).numpy().tobytes()).hexdigest()[:16]
            print(f"{models} models, {name}: {digest}")


if __name__ == "__main__":
    main()
