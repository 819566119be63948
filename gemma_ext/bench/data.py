"""Inputs for loss benchmarks that behave like a trained language model, without weights.

Random hidden states against a random classifier keep either no vocabulary tile or all of them and
prove nothing about a filter. ``plaw-<alpha>`` plants a power law instead: each row has K distinct
ids, drawn log-uniformly, whose capped logits are exactly z_i = 18 - alpha ln(i + 1); all the other
logits are the small noise that near-orthogonal rows give. K grows as alpha falls (flatter rows).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

WIDTHS = {4.0: 16, 2.5: 32, 1.6: 64, 1.3: 96}  # alpha -> planted ids per row
TOP_LOGIT = 18.0
DATA_KINDS = (
    *(f"plaw-{alpha:g}" for alpha in WIDTHS),
    *(f"plaw-{alpha:g}-shuffled" for alpha in WIDTHS),
    "random-init",
)
_BLOCK = 8192  # classifier rows made at a time
_POOL = 4096  # background ids that stand for the rest of the vocabulary when a target is drawn


@dataclass(frozen=True)
class HeadData:
    """A language-model head and a batch for it, float32.

    Attributes:
        e: [N, D] hidden states.
        c: [V, D] classifier.
        targets: [N] int64 labels.
    """

    e: Tensor
    c: Tensor
    targets: Tensor


def classifier(
    v: int, d: int, *, unit: bool, scale: float, seed: int, device: str = "cpu"
) -> Tensor:
    """Gaussian [V, D] classifier: unit-norm rows if ``unit``, else standard deviation ``scale``."""
    generator = torch.Generator(device).manual_seed(seed)
    c = torch.empty(v, d, device=device)
    for start in range(0, v, _BLOCK):
        block = c[start : start + _BLOCK].normal_(generator=generator)
        if unit:
            block.div_(block.norm(dim=1, keepdim=True))
        else:
            block.mul_(scale)
    return c


def log_uniform_ids(n: int, k: int, v: int, *, generator: torch.Generator) -> Tensor:
    """[n, k] ids in [0, v), distinct in each row, in order of drawing; id density ~ 1 / (id + 1).

    Raises:
        ValueError: if fewer than k ids exist.
    """
    if k > v:
        raise ValueError(f"v: expected at least {k} ids for {k} distinct draws, got {v}")
    drawn = _log_uniform((n, 8 * k), v, generator)
    order = torch.argsort(drawn, dim=1, stable=True)
    ranked = drawn.gather(1, order)
    repeat_sorted = torch.zeros_like(ranked, dtype=torch.bool)
    repeat_sorted[:, 1:] = ranked[:, 1:] == ranked[:, :-1]
    repeat = torch.zeros_like(repeat_sorted).scatter(1, order, repeat_sorted)
    first = torch.argsort(repeat.to(torch.int8), dim=1, stable=True)[:, :k]
    ids = drawn.gather(1, first)
    for row in repeat.logical_not().sum(1).lt(k).nonzero().flatten().tolist():
        ids[row] = _complete(ids[row, : int((~repeat[row]).sum())], k, v)
    return ids


def batch(
    c: Tensor, kind: str, n: int, *, softcap: float = 30.0, seed: int = 1
) -> tuple[Tensor, Tensor]:
    """Hidden states [N, D] and targets [N] of a data kind over the classifier ``c`` [V, D].

    Made on the device of ``c``; the bits of another device are others.

    Raises:
        ValueError: for an unknown kind, or a width or vocabulary too small for its planted ids.
    """
    device = c.device
    generator = torch.Generator(device).manual_seed(seed)
    v, d = c.shape
    if kind == "random-init":
        e = torch.empty(n, d, device=device).normal_(generator=generator)
        return e, _log_uniform((n,), v, generator)
    alpha, shuffled = parse_plaw(kind)
    k = WIDTHS[alpha]
    if d < k:
        raise ValueError(f"d: expected at least {k} for {kind}, got {d}")
    ids = log_uniform_ids(n, k, v, generator=generator)
    if shuffled:
        # The same relabelling for every batch of a vocabulary: it is a property of the tokenizer.
        ids = torch.randperm(v, generator=torch.Generator().manual_seed(v)).to(device)[ids]
    ranks = torch.arange(1, k + 1, dtype=torch.float32, device=device)
    capped = TOP_LOGIT - alpha * torch.log(ranks)
    wanted = softcap * torch.atanh(capped / softcap)
    pool = torch.randperm(v, generator=generator, device=device)[:_POOL]
    e = torch.empty(n, d, device=device)
    targets = torch.empty(n, dtype=torch.int64, device=device)
    block = 128 if device.type == "cpu" else 2048
    for start in range(0, n, block):
        part = ids[start : start + block]
        rows = c[part]  # [R, K, D]
        gram = torch.bmm(rows, rows.transpose(1, 2))
        weights = torch.linalg.solve(gram, wanted.expand(len(part), k).unsqueeze(2))
        hidden = torch.bmm(weights.transpose(1, 2), rows).squeeze(1)
        e[start : start + block] = hidden
        targets[start : start + block] = _draw_targets(
            hidden, c, part, capped, pool, softcap, generator
        )
    return e, targets


def head_data(
    kind: str,
    n: int,
    d: int,
    v: int,
    *,
    softcap: float = 30.0,
    seed: int = 0,
    device: str = "cpu",
) -> HeadData:
    """A classifier and one batch of a data kind; the same bits for the same arguments.

    Memory: 4 V D bytes for the classifier, 4 N D for the hidden states, and about 100 MB beside
    (2 GB on a card).
    """
    c = classifier(v, d, unit=kind != "random-init", scale=0.02, seed=seed, device=device)
    e, targets = batch(c, kind, n, softcap=softcap, seed=seed + 1)
    return HeadData(e, c, targets)


def parse_plaw(kind: str) -> tuple[float, bool]:
    """``plaw-<alpha>[-shuffled]`` as (alpha, shuffled).

    Raises:
        ValueError: for any other text.
    """
    if kind not in DATA_KINDS or not kind.startswith("plaw-"):
        raise ValueError(f"kind: expected one of {', '.join(DATA_KINDS)}, got {kind}")
    name = kind.removeprefix("plaw-").removesuffix("-shuffled")
    return float(name), kind.endswith("-shuffled")


def _log_uniform(shape: tuple[int, ...], v: int, generator: torch.Generator) -> Tensor:
    u = torch.rand(shape, generator=generator, dtype=torch.float64, device=generator.device)
    return torch.exp(u * math.log(v + 1)).long().sub_(1).clamp_(0, v - 1)


def _complete(ids: Tensor, k: int, v: int) -> Tensor:
    """Fill ``ids`` up to k distinct entries with the lowest ids that are not in it."""
    used = set(ids.tolist())
    spare = (i for i in range(v) if i not in used)
    filled = [*ids.tolist(), *(next(spare) for _ in range(k - len(used)))]
    return torch.tensor(filled, device=ids.device)


def _draw_targets(
    e: Tensor,
    c: Tensor,
    ids: Tensor,
    capped: Tensor,
    pool: Tensor,
    softcap: float,
    generator: torch.Generator,
) -> Tensor:
    """Targets from the softmax; the pool ids carry the weight of all ids that are not planted."""
    background = softcap * torch.tanh(e @ c[pool].T / softcap)
    background += math.log(c.shape[0] / len(pool))
    member = torch.searchsorted(pool.sort().values, ids).clamp_(max=len(pool) - 1)
    order = pool.argsort()
    column = order[member]
    planted_in_pool = pool[column] == ids
    row, rank = planted_in_pool.nonzero(as_tuple=True)
    background[row, column[row, rank]] = -math.inf
    scores = torch.cat([capped.expand(len(e), -1), background], dim=1)
    choice = torch.multinomial(scores.softmax(1), 1, generator=generator)
    candidates = torch.cat([ids, pool.expand(len(e), -1)], dim=1)
    return candidates.gather(1, choice).squeeze(1)
