"""Divergences of two heads from the formulas, with both heads' logits materialised.

    q_n = softmax(s_n) of the student, p_n = softmax(t_n) of the teacher, s and t as in
    `gemma_ext.reference.cce`; all sums are over the vocabulary

    forward_kl  sum p log(p / q)
    reverse_kl  sum q log(q / p)
    jsd         beta sum p log(p / m) + (1 - beta) sum q log(q / m),  m = beta p + (1 - beta) q
    tvd         sum |p - q| / 2

Relaxed Recursive Transformers (arXiv 2410.20672) names the four; jsd with beta is the generalised
one of GKD (arXiv 2306.13649, eq. 1), at beta 1/2 the usual one. Computed in float64 where `e` is
float64 and in float32 otherwise; memory is several N x V matrices.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gemma_ext.reference.cce import logits, losses


def divergence(s: Tensor, t: Tensor, kind: str, beta: float = 0.5) -> Tensor:
    """Divergence [...] of logits s of the student and t of the teacher, [..., V]; t is detached.

    A column that both mask by -inf takes no part.
    """
    log_q, log_p = torch.log_softmax(s, -1), torch.log_softmax(t.detach(), -1)
    q, p = log_q.exp(), log_p.exp()

    def mean(weight: Tensor, log_ratio: Any) -> Tensor:
        """sum weight * log_ratio(lq, lp) over the columns that have a weight."""
        here = weight > 0
        values = log_ratio(torch.where(here, log_q, 0.0), torch.where(here, log_p, 0.0))
        return (weight * values).sum(-1)

    def log_mixture(lq: Tensor, lp: Tensor) -> Tensor:
        return torch.logaddexp(lp + math.log(beta), lq + math.log1p(-beta))

    if kind == "forward_kl":
        return mean(p, lambda lq, lp: lp - lq)
    if kind == "reverse_kl":
        return mean(q, lambda lq, lp: lq - lp)
    if kind == "jsd":
        of_teacher = mean(p, lambda lq, lp: lp - log_mixture(lq, lp))
        of_student = mean(q, lambda lq, lp: lq - log_mixture(lq, lp))
        return beta * of_teacher + (1 - beta) * of_student
    return (p - q).abs().sum(-1) / 2


def rows(
    e: Tensor,
    c: Tensor,
    teacher_e: Tensor,
    teacher_c: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    *,
    kind: str = "forward_kl",
    beta: float = 0.5,
    student: dict[str, Any] | None = None,
    teacher: dict[str, Any] | None = None,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Twin of `gemma_ext.ops.cce.divergence_rows`; differentiable by plain autograd.

    Args:
        e: [N, D]; c: [V, D]; teacher_e: [N, D']; teacher_c: [V, D']; targets: [N].
        bias, teacher_bias: [V] or None.
        student, teacher: options of `gemma_ext.reference.cce.logits`.

    Returns:
        (divergence, nll, lse, teacher_nll), [N] each and zero in ignored rows.
    """
    valid = targets != ignore_index
    keep = valid.unsqueeze(-1)
    s = logits(torch.where(keep, e, torch.zeros_like(e)), c, bias, **(student or {}))
    with torch.no_grad():
        theirs = torch.where(keep, teacher_e, torch.zeros_like(teacher_e))
        t = logits(theirs, teacher_c, teacher_bias, **(teacher or {})).to(s.dtype)
    label = torch.where(valid, targets, torch.zeros_like(targets)).long()
    nll, lse = losses(s, label, valid)
    teacher_nll, _ = losses(t, label, valid)
    values = (divergence(s, t, kind, beta), nll, lse, teacher_nll)
    return tuple(torch.where(valid, x, s.new_zeros(())) for x in values)
