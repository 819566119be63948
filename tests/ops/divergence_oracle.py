"""float64 oracle of the divergences of two heads, written from the formulas alone.

    forward_kl  sum p log(p / q)
    reverse_kl  sum q log(q / p)
    jsd         beta sum p log(p / m) + (1 - beta) sum q log(q / m)
    tvd         sum |p - q| / 2

with q of the student, p of the teacher, m = beta p + (1 - beta) q. Gradients with respect to the
student's scores by hand, not by autograd: `score_gradient`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from cce_oracle import IGNORE, scores
from torch import Tensor

KINDS = ("forward_kl", "reverse_kl", "jsd", "tvd")


@dataclass
class Problem:
    """Arguments of `divergence_rows`; maps are options of both heads."""

    e: Tensor
    c: Tensor
    teacher_e: Tensor
    teacher_c: Tensor
    targets: Tensor
    bias: Tensor | None = None
    teacher_bias: Tensor | None = None
    maps: dict[str, Any] = field(default_factory=dict)

    def tensors(self) -> tuple[Any, ...]:
        return (
            self.e,
            self.c,
            self.teacher_e,
            self.teacher_c,
            self.targets,
            self.bias,
            self.teacher_bias,
        )

    def to(self, dtype: torch.dtype) -> Problem:
        moved = [
            x.detach().to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
            for x in self.tensors()
        ]
        return Problem(*moved, self.maps)

    def scores(self) -> tuple[Tensor, Tensor]:
        """float64 scores (s, t), [N, V]."""
        x = self.to(torch.float64)
        names = ("softcap", "logit_scale", "temperature")
        mine = {name: self.maps[name] for name in names if name in self.maps}
        theirs = dict(mine)
        for name in names:
            if f"teacher_{name}" in self.maps:
                theirs[name] = self.maps[f"teacher_{name}"]
        return (
            scores(x.e, x.c, x.bias, **mine),
            scores(x.teacher_e, x.teacher_c, x.teacher_bias, **theirs),
        )


def problem(
    n: int,
    d: int,
    vocab: int,
    teacher_d: int,
    *,
    bias: bool = False,
    ignored: float = 0.0,
    dtype: torch.dtype = torch.float32,
    spread: float = 2.0,
    seed: int = 0,
    **maps: Any,
) -> Problem:
    """Scores of standard deviation `spread` in both heads."""
    g = torch.Generator().manual_seed(seed)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*size, generator=g, dtype=torch.float64)).to(dtype)

    targets = torch.randint(vocab, (n,), generator=g)
    targets[torch.rand(n, generator=g) < ignored] = IGNORE
    return Problem(
        normal(n, d),
        normal(vocab, d, scale=spread / d**0.5),
        normal(n, teacher_d),
        normal(vocab, teacher_d, scale=spread / teacher_d**0.5),
        targets,
        normal(vocab) if bias else None,
        normal(vocab) if bias else None,
        maps,
    )


def divergence(s: Tensor, t: Tensor, kind: str, beta: float = 0.5) -> Tensor:
    """[N] of scores [N, V] without infinities."""
    q, p = torch.softmax(s, -1), torch.softmax(t, -1)
    if kind == "tvd":
        return (p - q).abs().sum(-1) / 2
    m = beta * p + (1 - beta) * q
    of = {
        "forward_kl": lambda: p * (p / q).log(),
        "reverse_kl": lambda: q * (q / p).log(),
        "jsd": lambda: beta * p * (p / m).log() + (1 - beta) * q * (q / m).log(),
    }
    return of[kind]().sum(-1)


def score_gradient(s: Tensor, t: Tensor, kind: str, beta: float = 0.5) -> Tensor:
    """d divergence / d s, [N, V]."""
    q, p = torch.softmax(s, -1), torch.softmax(t, -1)
    if kind == "forward_kl":
        return q - p
    h = {
        "reverse_kl": lambda: (q / p).log(),
        "jsd": lambda: (1 - beta) * (q / (beta * p + (1 - beta) * q)).log(),
        "tvd": lambda: (q - p).sign() / 2,
    }[kind]()
    return q * (h - (q * h).sum(-1, keepdim=True))


def gradients(
    x: Problem,
    kind: str,
    beta: float,
    d_divergence: Tensor,
    d_nll: Tensor,
    d_lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dE, dC, dbias) of sum d_divergence D + d_nll nll + d_lse lse, over rows not ignored."""
    g, e, c = _factors(x, kind, beta, d_divergence, d_nll, d_lse)
    scale = x.maps.get("logit_scale", 1.0)
    return scale * g @ c, scale * g.T @ e, g.sum(0)


def walks(x: Problem, kind: str, beta: float, *upstream: Tensor) -> list[Tensor]:
    """Of every entry of `gradients`, the root of the sum of its squared terms: what the rounding
    of the terms adds up to, however much of the sum they cancel."""
    g, e, c = (t.square() for t in _factors(x, kind, beta, *upstream))
    scale = x.maps.get("logit_scale", 1.0) ** 2
    return [t.sqrt() for t in (scale * g @ c, scale * g.T @ e, g.sum(0))]


def _factors(
    x: Problem, kind: str, beta: float, d_divergence: Tensor, d_nll: Tensor, d_lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """d / d logits [N, V], E and C; 0 in ignored rows."""
    valid = x.targets != IGNORE
    s, t = x.scores()
    zero = torch.zeros((), dtype=torch.float64)
    label = torch.where(valid, x.targets, 0)
    q = torch.softmax(s, -1)
    g = d_divergence[:, None] * score_gradient(s, t, kind, beta) + (d_nll + d_lse)[:, None] * q
    g = g.scatter_add(1, label[:, None], -d_nll[:, None])
    g = torch.where(valid[:, None], g, zero)
    temperature = x.maps.get("temperature", 1.0)
    softcap = x.maps.get("softcap")
    slope = 1 / temperature
    if softcap is not None:
        slope = (1 - (s * temperature / softcap) ** 2) / temperature
    g = g * slope
    wide = x.to(torch.float64)
    return g, torch.where(valid[:, None], wide.e, zero), wide.c
