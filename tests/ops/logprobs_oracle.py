"""float64 oracle of log-probabilities and all that goes with them, logits held."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from cce_oracle import IGNORE, scores
from torch import Tensor

FIELDS = ("logprobs", "entropy", "log_sum_sq_probs", "mean_logits", "kl", "ref_logprobs")


@dataclass
class Policy:
    """e [N, D], c [V, D], bias of a policy; the reference's; targets [N]; options of both heads."""

    e: Tensor
    c: Tensor
    bias: Tensor | None
    ref_e: Tensor
    ref_c: Tensor
    ref_bias: Tensor | None
    targets: Tensor
    options: dict[str, Any]

    def leaves(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        named = {"e": self.e, "c": self.c, "bias": self.bias}
        return {
            name: x.detach().to(x.dtype if dtype is None else dtype).clone().requires_grad_()
            for name, x in named.items()
            if x is not None
        }

    def reference(self) -> dict[str, Tensor]:
        named = {"ref_e": self.ref_e, "ref_c": self.ref_c, "ref_bias": self.ref_bias}
        return {name: x for name, x in named.items() if x is not None}


def policy(
    n: int,
    d: int,
    v: int,
    ref_d: int | None = None,
    *,
    spread: float = 3.0,
    distance: float = 0.3,
    bias: bool = True,
    ignored: float = 0.0,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **options: Any,
) -> Policy:
    """A policy and, `distance` away from it, its reference, of width `ref_d` if given."""
    g = torch.Generator().manual_seed(seed + 1009 * d + 9176 * v)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=g)

    def head(width: int) -> tuple[Tensor, Tensor, Tensor | None]:
        return normal(n, width), normal(v, width) * spread / width**0.5, normal(v) if bias else None

    mine = head(d)
    if ref_d is None:
        theirs = tuple(
            None if x is None else x + distance * x.square().mean().sqrt() * normal(*x.shape)
            for x in mine
        )
    else:
        theirs = head(ref_d)
    targets = torch.randint(0, v, (n,), generator=g)
    if ignored:
        targets = targets.masked_fill(torch.rand(n, generator=g) < ignored, IGNORE)
    heads = (x if x is None else x.to(dtype) for x in (*mine, *theirs))
    return Policy(*heads, targets, options)


def truth(p: Policy, leaves: dict[str, Tensor], kl: str = "full") -> dict[str, Tensor]:
    """Every field [N], differentiable in the leaves, zero where ignored."""
    s = scores(leaves["e"], leaves["c"], leaves.get("bias"), **p.options)
    wide = {name: x.double() for name, x in p.reference().items()}
    t = scores(wide["ref_e"], wide["ref_c"], wide.get("ref_bias"), **p.options)
    log_p, log_r = torch.log_softmax(s, -1), torch.log_softmax(t, -1)
    label = p.targets.clamp(min=0)[:, None]
    mine, theirs = log_p.gather(1, label)[:, 0], log_r.gather(1, label)[:, 0]
    d = mine - theirs
    values = {
        "logprobs": mine,
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "log_sum_sq_probs": torch.logsumexp(2 * log_p, -1),
        "mean_logits": s.mean(-1),
        "kl": {
            "k1": d,
            "k2": d**2 / 2,
            "k3": torch.exp(-d) - 1 + d,
            "full": (log_p.exp() * (log_p - log_r)).sum(-1),
        }[kl],
        "ref_logprobs": theirs,
        "is_top1": s.argmax(-1) == p.targets,
    }
    valid = p.targets != IGNORE
    return {name: torch.where(valid, x, torch.zeros_like(x)) for name, x in values.items()}
