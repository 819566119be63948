"""Early exits from the formulas: tests on the distribution of the head, and tests without it.

    s[n, v] = softcap(scale norm(h_n) . W_v + bias_v)          n rows, V vocabulary, D width
    lse = log sum_v exp(s),  p = exp(s - lse),  entropy = -sum_v p log p
    sample = argmax_v s / T + g_v,   g = -log(-log(1 - u)),   u = (word + 1/2) 2^-32

`word` is word v % 4 of Philox4x32-10 (Salmon et al. 2011) of the key `seed` (its low 63 bits) and
the counter (v / 4, position, request, request >> 32). A row's sample depends on its seed, request
and position alone, so that no schedule changes it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gemma_ext.reference.depth_batching_linear import by_rows, rms_norm, row_products
from gemma_ext.reference.random_numbers import philox

LEAST_HEAT = 1e-6
"""A row of less temperature takes the best token."""
_WORD = 0xFFFFFFFF


class HeadRows(NamedTuple):
    """[n] of each, but for two of `top` and C candidates."""

    ids: Tensor
    top: Tensor
    lse: Tensor
    gap: Tensor
    """float64 lse - top[:, 0]: at large logits the two leave no bits for it."""
    entropy: Tensor
    tempered: Tensor
    samples: Tensor
    values: Tensor
    indices: Tensor


def head_logits(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    *,
    plus_one: bool,
    softcap: float | None,
    logit_scale: float,
) -> Tensor:
    """s [n, V], at least float32. A norm is rounded to the dtype of `weight`."""
    if norm_weight is not None:
        h = rms_norm(h, norm_weight, eps, plus_one=plus_one).to(weight.dtype)
    wide = torch.promote_types(torch.promote_types(h.dtype, weight.dtype), torch.float32)
    s = logit_scale * row_products(h.to(wide), weight.to(wide))
    if bias is not None:
        s = s + bias.to(wide)
    return s if softcap is None else softcap * by_rows(torch.tanh, s / softcap)


def gumbel(ids: Tensor, keys: Tensor) -> Tensor:
    """float64 g of `ids` [n, C] by `keys` int64 [n, 3]: seed, request, position."""
    seed, request, position = (x.unsqueeze(-1).expand(ids.shape) for x in keys.unbind(-1))
    at = ids.long()
    key = seed & ((1 << 63) - 1)
    words = philox(key, [at // 4, position & _WORD, request & _WORD, request >> 32 & _WORD])
    word = torch.stack(words, -1).gather(-1, (at % 4).unsqueeze(-1)).squeeze(-1)
    return -torch.log(-torch.log1p(-(word.double() + 0.5) * 2.0**-32))


def _log_sum(s: Tensor) -> Tensor:
    return s.logsumexp(-1)


def _entropy(log_p: Tensor) -> Tensor:
    return -torch.where(log_p == -torch.inf, 0, log_p.exp() * log_p).sum(-1)


def head_rows(
    s: Tensor, temperature: Tensor | None, keys: Tensor | None, candidates: int
) -> HeadRows:
    """What is read off logits [n, V]. NaN counts as -inf wherever logits are compared, and NaN and
    +inf make the sums NaN; rows of a temperature below `LEAST_HEAT` take the best as their sample,
    and lse as `tempered`, log sum exp(s / T)."""
    n, vocabulary = s.shape
    order = torch.where(s.isnan(), -torch.inf, s).sort(dim=-1, descending=True, stable=True)
    ids = order.indices[:, 0]
    second = order.values[:, 1] if vocabulary > 1 else torch.full_like(s[:, 0], -torch.inf)
    best = order.values[:, :1].double()
    base = torch.where(best == -torch.inf, 0, best)
    below = s.double() - base
    log_sum = by_rows(_log_sum, below)
    lse = (base.squeeze(-1) + log_sum).to(s.dtype)
    gap = log_sum + (base - best).squeeze(-1)
    entropy = by_rows(_entropy, s - lse.unsqueeze(-1))
    entropy = torch.where(lse.isfinite(), entropy, torch.nan)
    tempered, samples = s.new_empty(0), ids.new_empty(0)
    if temperature is not None and keys is not None:
        hot = (temperature >= LEAST_HEAT).unsqueeze(-1)
        heat = torch.where(hot, temperature.unsqueeze(-1).to(s.dtype), 1)
        scaled = s / heat
        noise = gumbel(torch.arange(vocabulary, device=s.device).expand(n, -1), keys).to(s.dtype)
        score = scaled + noise
        drawn = torch.where(score.isnan(), -torch.inf, score).argmax(-1)
        tempered = ((base / heat).squeeze(-1) + by_rows(_log_sum, below / heat)).to(s.dtype)
        samples = torch.where(hot.squeeze(-1), drawn, ids)
    return HeadRows(
        ids.int(),
        torch.stack([order.values[:, 0], second], -1),
        lse,
        gap,
        entropy,
        tempered,
        samples.int(),
        order.values[:, :candidates],
        order.indices[:, :candidates].int(),
    )


def exits_by_head(
    mode: str, rows: HeadRows, threshold: Tensor, *, strict: bool
) -> tuple[Tensor, Tensor]:
    """(bool [n], score [n]): the largest probability and the margin of the two largest leave above
    the threshold, the entropy below; NaN does not leave."""
    first, second = rows.top.double().unbind(-1)
    p = by_rows(torch.exp, -rows.gap)
    if mode == "max_prob":
        score = p
    elif mode == "margin":
        score = p - by_rows(torch.exp, second - first - rows.gap)
    else:
        score = rows.entropy
        return (score < threshold if strict else score <= threshold), score
    score = score.to(rows.lse.dtype)
    return (score > threshold if strict else score >= threshold), score


def gate_scores(
    mode: str,
    h: Tensor,
    previous: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    survival: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(score [n], survival [n]), at least float32.

    gate: sigmoid(h . w + b). hazard: of lambda = sigmoid(h . w + b), the share 1 - survival of
    probability that has left up to this loop, survival being the product of 1 - lambda.
    cosine: cos(h, previous). latent_diff: |h - previous| / |h|.
    """
    wide = torch.promote_types(h.dtype, torch.float32)
    h = h.to(wide)
    if mode in ("gate", "hazard"):
        z = row_products(h, weight.to(wide).unsqueeze(0)).squeeze(-1)
        if bias is not None:
            z = z + bias.to(wide)
        if mode == "gate":
            return by_rows(torch.sigmoid, z), z.new_empty(0)
        survival = survival.to(wide) * by_rows(torch.sigmoid, -z)
        return 1 - survival, survival
    before = previous.to(wide)
    norm = h.square().sum(-1).sqrt()
    if mode == "cosine":
        return (h * before).sum(-1) / (norm * before.square().sum(-1).sqrt()), h.new_empty(0)
    return (h - before).square().sum(-1).sqrt() / norm, h.new_empty(0)


def exits_by_gate(
    mode: str, score: Tensor, threshold: Tensor, last: Tensor | None, *, strict: bool
) -> Tensor:
    """bool [n]. A score of NaN does not leave; rows of `last` do in any case."""
    if mode == "latent_diff":
        leaves = score < threshold if strict else score <= threshold
    else:
        leaves = score > threshold if strict else score >= threshold
    return leaves if last is None else leaves | last


def codes_of(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """int8 codes [V, D], scales [V] and slacks [V] of rows of a head: how far a row is from its
    codes, and 2^-22 (D + 16) of its norm for the rounding of two float32 sums."""
    w = weight.double()
    scale = (w.abs().amax(-1) / 127).float()
    step = torch.where(scale > 0, scale.double(), 1).unsqueeze(-1)
    codes = (w / step).round().clamp(-127, 127)
    off = (w - codes * step).square().sum(-1).sqrt()
    norm = w.square().sum(-1).sqrt()
    slack = (off + 2.0**-22 * (w.shape[1] + 16) * norm) * (1 + 2.0**-20)
    return codes.to(torch.int8), scale, slack.float()


def shortlist(
    h: Tensor,
    codes: Tensor,
    scale: Tensor,
    slack: Tensor,
    candidates: int,
    *,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    plus_one: bool,
    softcap: float | None,
    logit_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(ids, top [n, 2], rest, low, high): the best candidate and the two best logits of them, what
    no other logit is above, and float64 bounds of lse - top[:, 0]."""
    if norm_weight is not None:
        h = rms_norm(h, norm_weight, eps, plus_one=plus_one).to(weight.dtype)
    wide = torch.promote_types(h.dtype, torch.float32)
    x = h.to(wide)

    def cap(a: Tensor) -> Tensor:
        return a if softcap is None else softcap * torch.tanh(a / softcap)

    middle = logit_scale * row_products(x, codes.to(wide)) * scale.to(wide)
    if bias is not None:
        middle = middle + bias.to(wide)
    around = abs(logit_scale) * x.norm(dim=-1, keepdim=True) * slack.to(wide)
    # a bias is added here and in the head, and a width to it: each rounds by 2^-24 of the sum
    around = around + torch.where(middle.isfinite(), middle.abs(), 0) * 2.0**-21
    upper, lower = middle + around, middle - around
    exact = head_logits(
        h, weight, bias, None, eps, plus_one=plus_one, softcap=softcap, logit_scale=logit_scale
    )
    order = upper.sort(dim=-1, descending=True, stable=True).indices
    chosen, others = order[:, :candidates], order[:, candidates:]
    chosen = chosen.sort(dim=-1).values
    found = exact.gather(-1, chosen)
    best = found.sort(dim=-1, descending=True, stable=True)
    least = torch.full_like(found[:, :1], -torch.inf)
    top = torch.cat([best.values, least], -1)[:, :2]
    error = 2.0**-18 + (softcap or 0.0) * 2.0**-20
    ids = chosen.gather(-1, best.indices[:, :1]).squeeze(-1)
    above = torch.cat([cap(upper).gather(-1, others), least], -1).amax(-1)
    rest = torch.where(above == -torch.inf, above, above + error)
    base = top[:, :1].double()

    def log_sum(s: Tensor) -> Tensor:
        return (s.double() - base).logsumexp(-1)

    high = log_sum(torch.cat([found, cap(upper).gather(-1, others)], -1)) + error
    low = torch.maximum(log_sum(found), log_sum(cap(lower))) - error
    return ids.int(), top, rest, low, high


def exit_bounds(
    mode: str, top: Tensor, rest: Tensor, low: Tensor, high: Tensor
) -> tuple[Tensor, Tensor]:
    """Least and most that the score of a certified row can be."""
    low, high = low.double(), high.double()
    if mode == "max_prob":
        return (-high).exp(), (-low).exp()
    first, second = top.double().unbind(-1)
    most = torch.maximum(second, rest.double())
    return (
        (-high).exp() * -torch.expm1(most - first),
        (-low).exp() * -torch.expm1(second - first),
    )
