"""float64 oracle of the sampled backward, row by row and strip by strip as it is defined.

A strip is one valid row and one tile of 256 consecutive ids. With a = d_nll + d_lse + d_m,
b = d_nll, q = d_m (m the mean logit) and p' = p T ds/da, a strip has

    x = sum p' (|a| + |q| max(1, |max s - m|)),  u = x / (tau ref),  ref = min(scale, mean of scale)

and is kept with weight 1 if the label lies in it or u >= 1; otherwise with weight 1 / u if the
phase of its row, in turns, passes a whole number when it gains u.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from cce_oracle import IGNORE, Problem, scores
from torch import Tensor

TILE = 256
WORD = 2**32


@dataclass
class Sampled:
    """What a sampled backward must return, and why."""

    grads: dict[str, Tensor]
    exact: dict[str, Tensor]
    weight: Tensor  # [rows with an upstream, tiles], 0 where left out
    size: Tensor  # [rows with an upstream, tiles] x over ref
    drawn: Tensor  # [rows with an upstream, tiles] bool, whether the strip takes part in the draw

    @property
    def kept_fraction(self) -> float:
        return (self.weight > 0).double().mean().item()


def philox(first: int, second: int, key: int) -> int:
    """First word of philox2x32-10."""
    for _ in range(10):
        product = 0xD256D193 * first
        first, second = product // WORD ^ key ^ second, product % WORD
        key = (key + 0x9E3779B9) % WORD
    return first


def weights(u: list[float], label: int | None, phase: int) -> tuple[list[float], list[bool]]:
    """Weight of each strip of a row, and whether it was drawn; `label` is the label's strip."""
    out, drawn = [], []
    for j, share in enumerate(u):
        drawn.append(j != label and share < 1)
        if not drawn[-1]:
            out.append(1.0)
            continue
        step = max(1, int(share * WORD)) if share > 0 else 0
        phase = (phase + step) % WORD
        out.append(WORD / step if phase < step else 0.0)
    return out, drawn


def sampled(
    p: Problem,
    d_nll: Tensor,
    d_lse: Tensor | float = 0.0,
    d_mean: Tensor | float = 0.0,
    *,
    tau: float,
    lse: Tensor,
    seed: int = 0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
) -> Sampled:
    """Gradients of sum_n d_nll nll + d_lse lse + d_mean m, sampled, in float64; rows are [N].

    ``lse`` [N] float32 is the one of the call under test: its bits enter the draw.
    """
    vocab = p.c.shape[0]
    valid = torch.nonzero(p.targets != IGNORE).squeeze(1)
    e, y, c = p.e.double()[valid], p.targets[valid].long(), p.c.double()
    bias = None if p.bias is None else p.bias.double()
    options = {"softcap": softcap, "logit_scale": logit_scale, "temperature": temperature}
    s = scores(e, c, bias, **options)
    slope = torch.ones_like(s)
    if softcap is not None:
        slope = 1 - (s * temperature / softcap) ** 2
    prob = torch.softmax(s, 1)
    m = (prob * s).sum(1)

    def rows(u: Tensor | float) -> Tensor:
        return torch.as_tensor(u, dtype=torch.float64).expand(p.targets.shape)[valid]

    b, q = rows(d_nll), rows(d_mean)
    a = b + rows(d_lse) + q
    scale = torch.stack((a.abs(), b.abs(), q.abs())).amax(0)
    ref = torch.minimum(scale, scale[scale != 0].mean())
    hot = torch.nn.functional.one_hot(y, vocab).double()
    soft = prob * (a[:, None] + q[:, None] * (s - m[:, None]))
    exact = (soft - b[:, None] * hot) * slope / temperature

    tiles = torch.arange(vocab).split(TILE)
    top = torch.stack([s[:, t].amax(1) for t in tiles], 1)
    mass = torch.stack([(prob * slope)[:, t].sum(1) for t in tiles], 1)
    reach = (top - m[:, None]).abs().clamp(min=1)
    size = mass * (a.abs()[:, None] + q.abs()[:, None] * reach) / ref.clamp(min=1e-300)[:, None]
    bits = lse[valid].float().view(torch.int32).tolist()
    key = (seed % WORD) ^ (seed // WORD % WORD)
    found = [
        weights(
            (x / tau).float().tolist() if tau else [1.0] * len(tiles),
            int(label) // TILE,
            philox(int(row), word % WORD, key),
        )
        for x, label, row, word in zip(size, y, valid, bits, strict=True)
    ]
    weight = torch.tensor([w for w, _ in found], dtype=torch.float64).reshape(mass.shape)
    weight = weight * (scale > 0)[:, None]
    drawn = torch.tensor([d for _, d in found], dtype=torch.bool).reshape(mass.shape)
    spread = weight.repeat_interleave(TILE, 1)[:, :vocab]
    got = (spread * soft - b[:, None] * hot) * slope / temperature

    def matrices(grad: Tensor) -> dict[str, Tensor]:
        de = torch.zeros(*p.targets.shape, p.e.shape[1], dtype=torch.float64)
        de[valid] = logit_scale * grad @ c
        named = {"e": de, "c": logit_scale * grad.T @ e}
        return named if bias is None else named | {"bias": grad.sum(0)}

    active = scale > 0
    return Sampled(matrices(got), matrices(exact), weight[active], size[active], drawn[active])


def zipf_problem(
    n: int,
    d: int,
    v: int,
    *,
    alpha: float = 1.3,
    spread: float = 1.5,
    ignored: float = 0.0,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Problem:
    """A head that has learned unigram counts: bias -alpha ln(rank), targets drawn from p."""
    g = torch.Generator().manual_seed(seed)
    e = torch.randn(n, d, generator=g).to(dtype)
    c = (torch.randn(v, d, generator=g) * spread / d**0.5).to(dtype)
    bias = -alpha * torch.arange(1, v + 1).double().log()
    bias = bias.to(dtype)
    p = torch.softmax(scores(e.double(), c.double(), bias.double()), 1)
    y = torch.multinomial(p, 1, generator=g).squeeze(1)
    if ignored:
        y = y.masked_fill(torch.rand(n, generator=g) < ignored, IGNORE)
    return Problem(e, c, y, bias)
