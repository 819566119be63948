"""Every souping op once on awkward inputs; the results' bits as one text.

python soup_digest.py THREADS      prints the digest of this build under that many threads
"""

from __future__ import annotations

import hashlib
import sys

import torch
from soup_problem import DTYPES, bits, generator, models

from gemma_ext.ops.souping import (
    Gram,
    Magnitudes,
    Mask,
    Move,
    Norms,
    Part,
    RowMask,
    Rule,
    consensus_,
    crossover_,
    dots,
    fisher_,
    gather_rows_,
    gram_rows,
    merge_,
    mutate_,
    nearswap_,
    overlaps,
    sign_balance,
    soup_,
    swarm_,
)

SPECIAL = (0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-40, 65504.0, 1e-7)


def problem(dtype: torch.dtype, device: str = "cpu", shape=(61, 1031)) -> Part:
    part = models(shape, 3, dtype=dtype, spread=2e-3, seed=3, device=device)
    for m, x in enumerate(part.sources):
        flat = x.view(-1)
        for k, value in enumerate(SPECIAL):
            flat[1000 * m + 37 * k] = value
    return part


def results(dtype: torch.dtype, device: str = "cpu") -> dict[str, torch.Tensor]:
    """By name, everything that the ops give for `problem`."""
    part = problem(dtype, device)
    n = part.base.numel()
    found: dict[str, torch.Tensor] = {}

    def out(name: str) -> Part:
        found[name] = torch.empty_like(part.base)
        return Part(part.sources, part.base, found[name], "layers.7.w")

    weights = [0.3, -0.7, 1.1]
    for rounding in ("nearest", "stochastic"):
        soup_([out(f"soup {rounding}")], weights, scale=0.9, rounding=rounding, seed=5)
    soup_([out("soup wide")], weights, wide=True)
    rows = torch.rand(61, 3, generator=generator(1))
    soup_([out("soup rows")], rows, rows=True)
    plain = Part(part.sources, None, torch.empty_like(part.base), "p")
    soup_([plain], weights)
    found["soup plain"] = plain.out

    for quantity in ("delta", "variance"):
        magnitudes = Magnitudes(3, cuts=2, quantity=quantity)
        for _ in range(2):
            magnitudes.survey([part])
            magnitudes.settle([[n // 5, n // 90]] * magnitudes.streams)
        keep, drop = magnitudes.cut(0), magnitudes.cut(1)
        found |= {f"bits {quantity}": keep.bits, f"ties {quantity}": keep.ties}
        found[f"counts {quantity}"] = magnitudes.counts - magnitudes.zeros
        for election, weighted, zero, combine in (
            ("sum", True, 1, "weighted_mean"),
            ("count", False, -1, "mean"),
            ("none", True, 1, "max"),
        ):
            rule = Rule(election, weighted, zero, combine)
            mask = Mask(keep.fresh(), drop.fresh(), 0.9)
            name = f"merge {quantity} {election}"
            merge_([out(name)], rule, weights, mask=mask, divide=0.9, seed=6, alone=[1.1, 1.2, 1.3])
        norms = Norms(3)
        norms.add([out("unused")], mask=Mask(keep.fresh(), None, 0.5), seed=2)
        found[f"norms {quantity}"] = norms.value
        found[f"overlaps {quantity}"] = overlaps([out("unused")], Mask(keep.fresh()))
    for spread in ("rank", "value"):
        rule = Rule("sum", combine="weighted_mean")
        mask = RowMask(800, 9, 0.6, 0.2, spread, True)
        merge_([out(f"rows {spread}")], rule, weights, mask=mask, seed=7, rounding="stochastic")
    found["balance"] = sign_balance([out("unused")], Rule("sum"), weights)

    gram = Gram(3)
    gram.add([part])
    found["gram"] = gram.value
    found["gram rows"] = gram_rows([part])
    found["dots"] = dots([part], [part.sources[0]])

    consensus_([out("consensus")], 0.4, scale=0.5)
    consensus_([out("task")], 0.4, task=1)
    f = [x.abs() for x in part.sources]
    fisher_([out("fisher")], [f], [1.0, 2.0, 3.0], floor=1e-6, add=1e-10)
    found["nearswap"] = torch.empty_like(part.base)
    nearswap_([Part(part.sources[:1], part.base, found["nearswap"], "n")], 1e-3)
    found["mutate"] = torch.empty_like(part.base)
    mutate_([Part([part.base], None, found["mutate"], "m", 0, [4])], 0.3, 0.1, seed=8)
    for kind in ("pick", "magnitude", "blend"):
        found[kind] = torch.empty_like(part.base)
        crossover_([Part(part.sources, None, found[kind], "c")], [0.2, 0.3, 0.5], kind=kind)
    x, v = part.base.clone(), part.sources[0].clone()
    swarm_([Move(x, v, *part.sources)], [0.2, 0.3, 0.1, 0.05], 0.5, rounding="stochastic")
    found |= {"x": x, "v": v}
    index = torch.randint(-1, 61, (80, 3), generator=generator(2)).to(device)
    found["gathered"] = torch.empty(80, 1031, dtype=dtype, device=device)
    gather_rows_(found["gathered"], part.sources, index)
    del found["unused"]
    return {name: bits(x) for name, x in found.items()}


def digests() -> dict[str, str]:
    return {
        f"{str(dtype).removeprefix('torch.')} {name}": hashlib.sha256(
            x.numpy().tobytes()
        ).hexdigest()
        for dtype in DTYPES
        for name, x in results(dtype).items()
    }


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]))
    for name, digest in digests().items():
        print(digest, name)
