"""The souping ops in plain torch: parts taken apart, formulas applied, results put back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gemma_ext.ops.souping.inputs import first_tensor, models_of, rows_of
from gemma_ext.ops.souping.parts import Part
from gemma_ext.ops.souping.rules import Cut, RowMask, Rule
from gemma_ext.reference import random_numbers
from gemma_ext.reference import souping as formulas

COARSE, FINE = 1 << 15, 1 << 16
"""Bins of the two readings of a survey: by the upper 15 bits of a key, by its lower 16."""


def stacked(part: Part) -> tuple[Tensor, Tensor | None]:
    """(x [M, n] float64, base [n] float64) on the CPU."""
    n = first_tensor(part).numel()
    x = [s.detach().cpu().double().reshape(n) for s in part.sources]
    base = None if part.base is None else part.base.detach().cpu().double().reshape(n)
    return torch.stack(x) if x else torch.zeros(0, n, dtype=torch.float64), base


def write(part: Part, value: Tensor, rounding: str, seed: int, out: Tensor | None = None) -> None:
    """Rounds float64 [n] into the part's out."""
    out = part.out if out is None else out
    noise = None
    if rounding == "stochastic" and out.dtype != torch.float32:
        key = random_numbers.random_key(seed, part.name)
        noise = random_numbers.random_words(key, 0, random_numbers.ROUND, part.offset, len(value))
    with torch.no_grad():
        out.copy_(formulas.rounded(value, out.dtype, noise).reshape(out.shape))


def soup_(parts, weights, scale, rows, rounding, seed):
    first = 0
    for t, part in enumerate(parts):
        x, base = stacked(part)
        if not rows:
            w, s = weights[t], scale[t]
        else:
            last, width = first + rows_of(part), max(x.shape[1] // max(rows_of(part), 1), 1)
            w = weights[first:last].T.repeat_interleave(width, 1)
            s = scale[first:last].repeat_interleave(width)
            first = last
        write(part, formulas.soup(x, base, w, s), rounding, seed)


def _cut_mask(cut: Cut, t: int, part: Part, x: Tensor, base: Tensor | None) -> Tensor:
    keys_of = formulas.delta_keys if cut.quantity == "delta" else formulas.variance_keys
    keys = keys_of(x, base)
    row = t if len(cut.bits) > 1 else 0
    masks = []
    for s in range(len(keys)):
        bits, ties = int(cut.bits[row, s]), int(cut.ties[row, s])
        masks.append(formulas.chosen(keys[s], bits, ties))
        cut.ties[row, s] = max(ties - int((keys[s] == bits).sum()), 0)
    return torch.stack(masks).expand(x.shape)


def _bernoulli(part: Part, seed: int, thresholds: Tensor) -> Tensor:
    """bool [M, n]: u < thresholds [M, n]."""
    key = random_numbers.random_key(seed, part.name)
    u = [
        random_numbers.uniforms(key, model, random_numbers.DROP, part.offset, thresholds.shape[1])
        for model in models_of(part)
    ]
    return torch.stack(u) < thresholds if u else torch.zeros_like(thresholds, dtype=torch.bool)


def masked(
    t: int, part: Part, mask: Any, x: Tensor, base: Tensor | None, seed: int
) -> tuple[Tensor | None, Tensor | None]:
    """(mask [M, n], divide [M, n]) of one part, None where everything counts or by 1."""
    if mask is None:
        return None, None
    if isinstance(mask, RowMask):
        return _row_masked(part, mask, x, base, seed)
    kept = torch.ones_like(x, dtype=torch.bool)
    if mask.keep is not None:
        kept = kept & _cut_mask(mask.keep, t, part, x, base)
    if mask.drop is not None:
        kept = kept & ~_cut_mask(mask.drop, t, part, x, base)
    if mask.density is not None:
        kept = kept & _bernoulli(part, seed, mask.density[t].unsqueeze(-1).expand(x.shape))
    return kept, None


def _row_masked(part, mask, x, base, seed):
    shape = (len(x), rows_of(part), -1) if x.numel() else (len(x), 0, 1)
    keys = formulas.delta_keys(x, base).reshape(shape)
    kept = torch.empty(keys.shape, dtype=torch.bool)
    share = torch.ones(keys.shape, dtype=torch.float64)
    for m, values in enumerate(zip(mask.drop, mask.keep, mask.density, mask.epsilon, strict=True)):
        drop, keep, density, epsilon = values
        place = formulas.row_order(keys[m])
        kept[m] = (place >= drop) & (place < drop + keep)
        if density is not None:
            by_value = mask.spread == "value"
            share[m] = formulas.rank_probabilities(keys[m], density, epsilon, by_value).double()
    kept, share = kept.reshape(x.shape), share.reshape(x.shape)
    if any(d is not None for d in mask.density):
        kept = kept & _bernoulli(part, seed, share)
    return kept, share if mask.rescale else None


def _merged(parts, mask, seed) -> Iterator[tuple[int, Part, Tensor, Tensor | None, Any, Any]]:
    for t, part in enumerate(parts):
        x, base = stacked(part)
        yield t, part, x, base, *masked(t, part, mask, x, base, seed)


def _divisor(divide: Tensor, t: int, by_place: Tensor | None) -> Tensor:
    column = divide[t].unsqueeze(-1)
    return divide[t] if by_place is None else column * by_place


def merge_(parts, rule: Rule, weights, mask, divide, alone, scale, rounding, seed):
    for t, part, x, base, kept, by_place in _merged(parts, mask, seed):
        merged = formulas.merge(
            formulas.deltas(x, base),
            base,
            weights[t],
            mask=kept,
            divide=_divisor(divide, t, by_place),
            alone=None if alone is None else alone[t],
            scale=float(scale[t]),
            election=rule.election,
            weighted=rule.weighted,
            zero=rule.zero,
            combine=rule.combine,
        )
        write(part, merged, rounding, seed)


def sign_balance(parts, rule: Rule, weights, mask, divide, seed) -> Tensor:
    balance = torch.zeros(len(parts), dtype=torch.int64)
    for t, _, x, base, kept, by_place in _merged(parts, mask, seed):
        _, _, sign = formulas.elect(
            formulas.deltas(x, base),
            weights[t],
            mask=kept,
            divide=_divisor(divide, t, by_place),
            election=rule.election,
            weighted=rule.weighted,
        )
        balance[t] = int(sign.nan_to_num(nan=0.0).sum())
    return balance


def norms(parts, mask, seed) -> Tensor:
    models = len(parts[0].sources)
    found = torch.zeros(len(parts), models, 2, 3, dtype=torch.float64)
    for t, _, x, base, kept, _ in _merged(parts, mask, seed):
        found[t] = formulas.norms(formulas.deltas(x, base), kept)
    return found


def gram(parts) -> Tensor:
    return torch.stack([formulas.gram(formulas.deltas(*stacked(part))) for part in parts])


def gram_rows(parts) -> Tensor:
    found = []
    for part in parts:
        d = formulas.deltas(*stacked(part))
        if d.numel():
            d = d.reshape(len(d), rows_of(part), -1).transpose(0, 1)
            found.append(d @ d.transpose(1, 2))
    models = len(parts[0].sources)
    return torch.cat([torch.zeros(0, models, models, dtype=torch.float64), *found])


def overlaps(parts, mask, seed) -> Tensor:
    found = []
    for _, _, x, _, kept, _ in _merged(parts, mask, seed):
        found.append(
            formulas.overlaps(torch.ones_like(x, dtype=torch.bool) if kept is None else kept)
        )
    return torch.stack(found)


def survey(parts, groups, quantity, coarse, zeros, odd, window, prefix, fine) -> None:
    """Adds a part's keys to the histograms, coarse [G, S, 2^15], or where `fine` [G, S, C, 2^16] is
    given those whose upper 15 bits are prefix [G, S, C]. Bins outside of `window` [G, S, 2] count
    as its nearer end; `odd` counts those inside whose lower bits are not all 0."""
    keys_of = formulas.delta_keys if quantity == "delta" else formulas.variance_keys
    for part, group in zip(parts, groups, strict=True):
        for s, keys in enumerate(keys_of(*stacked(part))):
            keys = keys[keys >= 0]
            if fine is None:
                below, above = (-1, COARSE - 1) if window is None else window[group, s].tolist()
                bins = keys >> 16
                held = bins.clamp(max(below, 0), above)
                coarse[group, s] += held.bincount(minlength=COARSE)
                zeros[group, s] += (keys == 0).sum()
                if odd is not None:
                    there = (keys & 0xFFFF != 0) & (bins > below) & (bins < above)
                    odd[group, s] += bins[there].bincount(minlength=COARSE)
                continue
            for c in range(prefix.shape[-1]):
                low = keys[keys >> 16 == prefix[group, s, c]] & 0xFFFF
                fine[group, s, c] += low.bincount(minlength=FINE)


def consensus_(parts, lambdas, votes, task, scale, rounding, seed):
    for t, part in enumerate(parts):
        x, base = stacked(part)
        merged = formulas.consensus(
            formulas.deltas(x, base),
            base,
            lambdas[t],
            votes=votes,
            task=task,
            scale=float(scale[t]),
        )
        write(part, merged, rounding, seed)


def fisher_(parts, fishers: Sequence[Sequence[Tensor]], weights, floor, add, rounding, seed):
    for t, (part, given) in enumerate(zip(parts, fishers, strict=True)):
        x, base = stacked(part)
        f = torch.stack([f.detach().cpu().double().reshape(-1) for f in given])
        write(part, formulas.fisher(x, base, f, weights[t], floor[t], add), rounding, seed)


def nearswap_(parts, t, rounding, seed):
    for row, part in enumerate(parts):
        x, base = stacked(part)
        write(part, formulas.nearswap(x[0], base, float(t[row])), rounding, seed)


def gather_rows_(out, sources, rows):
    found = formulas.gather_rows([s.detach().cpu() for s in sources], rows.cpu().long())
    with torch.no_grad():
        out.copy_(formulas.rounded(found, out.dtype))


def mutate_(parts, rate, sigma, rounding, seed):
    for t, part in enumerate(parts):
        x, _ = stacked(part)
        key, model = random_numbers.random_key(seed, part.name), models_of(part)[0]
        mutant = formulas.mutate(x[0], float(rate[t]), float(sigma[t]), key, model, part.offset)
        write(part, mutant, rounding, seed)


def crossover_(parts, weights, kind, alpha, rounding, seed):
    for t, part in enumerate(parts):
        x, _ = stacked(part)
        if kind == "blend":
            child = formulas.blend(x, weights[t], float(alpha[t]))
        else:
            key = random_numbers.random_key(seed, part.name)
            u = random_numbers.uniforms(key, 0, random_numbers.PICK, part.offset, x.shape[1])
            share = x.abs().softmax(0) if kind == "magnitude" else 1.0
            child = formulas.pick(x, weights[t].unsqueeze(-1) * share, u)
        write(part, child, rounding, seed)


def swarm_(moves, coefficients, step, rounding, seed):
    for t, move in enumerate(moves):
        tensors = [
            y.detach().cpu().reshape(-1)
            for y in (move.x, move.v, move.best, move.group_best, move.group_worst)
        ]
        x, v = formulas.swarm(*tensors, coefficients[t].tolist(), float(step[t]))
        part = Part([move.x], name=move.name, offset=move.offset)
        write(part, v, "nearest", seed, move.v)
        write(part, x, rounding, seed, move.x)


def dots(parts, along) -> Tensor:
    found = torch.zeros(len(parts), len(parts[0].sources) if parts else 0, dtype=torch.float64)
    for t, (part, grad) in enumerate(zip(parts, along, strict=True)):
        found[t] = formulas.deltas(*stacked(part)) @ grad.detach().cpu().double().reshape(-1)
    return found
