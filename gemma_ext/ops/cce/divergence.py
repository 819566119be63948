"""Divergence of a student's head from a teacher's, without the N x V logits of either.

With q = softmax(s) of the student, p = softmax(t) of the teacher, which has no gradient:

| kind         | D                                                   | dD / ds            |
|--------------|-----------------------------------------------------|--------------------|
| "forward_kl" | sum p log(p / q)                                    | q - p              |
| "reverse_kl" | sum q log(q / p)                                    | q (log(q / p) - D) |
| "jsd"        | beta sum p log(p / m) + (1 - beta) sum q log(q / m) | q (h - sum q h)    |
| "tvd"        | sum abs(p - q) / 2                                  | q (h - sum q h)    |

with m = beta p + (1 - beta) q and h = (1 - beta) log(q / m) of "jsd", h = sign(q - p) / 2 of "tvd".
The four of Relaxed Recursive Transformers (arXiv 2410.20672); "jsd" is the generalised one of GKD
(arXiv 2306.13649), whose beta 0 is "forward_kl" and beta 1 "reverse_kl".
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from gemma_ext.ops.cce import divergence_op as op
from gemma_ext.ops.cce.divergence_inputs import (
    SAME,
    Divergence,
    check_heads,
    check_mix,
    no_targets,
    teacher_head,
)
from gemma_ext.ops.cce.divergence_op import KINDS
from gemma_ext.ops.cce.head import Head
from gemma_ext.ops.cce.inputs import Method, check_labels, to_autocast
from gemma_ext.ops.cce.loss import FilterStats, LossTerms, Tokens, weigh
from gemma_ext.reference import cce_divergence as reference

__all__ = [
    "KINDS",
    "Divergence",
    "DivergenceRows",
    "LinearDivergenceOutput",
    "divergence_rows",
    "linear_divergence",
    "rows_of_heads",
]


class DivergenceRows(NamedTuple):
    """Per-row quantities of two heads, float32, zero in ignored rows.

    Attributes:
        divergence: [N].
        nll: [N] negative log-likelihood of the target under the student.
        lse: [N] log-sum-exp of the student.
        teacher_nll: [N] that of the target under the teacher; without gradient.
        stats: [3] float64, the values of `FilterStats`; None where nothing is ever left out.
    """

    divergence: Tensor
    nll: Tensor
    lse: Tensor
    teacher_nll: Tensor
    stats: Tensor | None = None


class LinearDivergenceOutput(NamedTuple):
    """What `linear_divergence` returns with `return_parts`.

    Attributes:
        loss: divergence + ce_weight * cross_entropy.
        divergence, cross_entropy: reduced as the loss is; cross_entropy is None without targets.
        stats: what the sampled backward keeps.
    """

    loss: Tensor
    divergence: Tensor
    cross_entropy: Tensor | None
    stats: FilterStats


def divergence_rows(
    e: Tensor,
    c: Tensor,
    teacher_e: Tensor,
    teacher_c: Tensor,
    targets: Tensor | None = None,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    *,
    kind: str = "forward_kl",
    beta: float = 0.5,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    teacher_softcap: float | str | None = SAME,
    teacher_logit_scale: float | str = SAME,
    teacher_temperature: float | str = SAME,
    ignore_index: int = -100,
    filter_eps: float | str | None = "auto",
    filter_seed: int = 0,
    impl: str = "auto",
) -> DivergenceRows:
    """Differentiable per-row quantities of a student's and a teacher's head.

    Args:
        e: [N, D]; c: [V, D] of the student. teacher_e: [N, D']; teacher_c: [V, D'].
        targets: [N] labels or None: every row counts, and the likelihoods are of label 0.
        bias, teacher_bias: [V] or None. The rest: as `linear_divergence`.

    Returns:
        DivergenceRows of float32 [N] vectors.

    Raises:
        TypeError, ValueError: as `linear_divergence`.
    """
    head = Head(softcap, logit_scale, temperature, ignore_index)
    teacher = teacher_head(head, teacher_softcap, teacher_logit_scale, teacher_temperature)
    method = Method(impl, filter_eps, filter_seed)
    divergence = Divergence(kind, beta)
    if targets is None:
        head = Head(softcap, logit_scale, temperature)
        targets = no_targets(e)
    check_heads(e, c, teacher_e, teacher_c, targets, bias, teacher_bias, method)
    check_labels(targets, c.shape[0], head.ignore_index, wait=method.materialises)
    return rows_of_heads(
        *to_autocast(e, c, bias),
        *to_autocast(teacher_e, teacher_c, teacher_bias),
        targets,
        head,
        teacher,
        divergence,
        method,
    )


def linear_divergence(
    e: Tensor,
    c: Tensor,
    teacher_e: Tensor,
    teacher_c: Tensor,
    targets: Tensor | None = None,
    *,
    kind: str = "forward_kl",
    beta: float = 0.5,
    ce_weight: float = 0.0,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    teacher_softcap: float | str | None = SAME,
    teacher_logit_scale: float | str = SAME,
    teacher_temperature: float | str = SAME,
    ignore_index: int = -100,
    shift: int | bool = 0,
    reduction: str = "mean",
    token_weights: Tensor | None = None,
    num_items_in_batch: int | Tensor | None = None,
    return_parts: bool = False,
    filter_eps: float | str | None = "auto",
    filter_seed: int = 0,
    impl: str = "auto",
) -> Tensor | LinearDivergenceOutput:
    """Divergence of a student's next-token distributions from a teacher's, and their cross-entropy.

        loss_n = t_n [ D(p_n, q_n) + ce_weight nll_n ],   t = token weights

    of scores softcap(logit_scale * e @ c.T + bias) / temperature and the teacher's alike. Nothing
    of size N x V is held (except impl="reference"), and the teacher gets no gradient. Whoever
    scales the loss by temperature^2 does so outside.

    Args:
        e: [..., T, D] hidden states of the student, float32, bfloat16 or float16; c: [V, D].
        teacher_e: [..., T, D'] of the teacher at the same positions; teacher_c: [V, D'], in a dtype
            of their own.
        targets: [..., T] labels, or None: every position takes part.
        kind: "forward_kl", "reverse_kl", "jsd" or "tvd", as in `gemma_ext.ops.cce.divergence`.
        beta: share of the teacher in the mixture of "jsd"; 0 is "forward_kl", 1 "reverse_kl".
        ce_weight: of the cross-entropy against `targets`, which comes from the same pass and so
            wants temperature 1.
        bias, teacher_bias: [V]. softcap, logit_scale, temperature: of the student; those of the
            teacher are the "same" unless given (teacher_softcap=None is no cap).
        return_parts: return a `LinearDivergenceOutput`.
        ignore_index, shift, reduction, token_weights, num_items_in_batch, filter_eps, filter_seed,
            impl: as in `linear_cross_entropy`.

    Returns:
        The float32 loss, 0-d or [..., T - shift] with reduction "none".

    Raises:
        TypeError, ValueError: an argument that does not fit. Heads of two vocabularies are refused;
            of padded ones cut the longer, `c[:V]`.

    Example:
        >>> loss = linear_divergence(hidden, student.lm_head.weight, teacher_hidden,
        ...                          teacher.lm_head.weight, labels, shift=True, softcap=30.0)
    """
    head = Head(softcap, logit_scale, temperature, ignore_index)
    teacher = teacher_head(head, teacher_softcap, teacher_logit_scale, teacher_temperature)
    method = Method(impl, filter_eps, filter_seed)
    divergence = Divergence(kind, beta)
    terms = LossTerms(
        reduction=reduction,
        shift=shift,
        token_weights=token_weights,
        num_items_in_batch=num_items_in_batch,
    )
    check_mix(ce_weight, temperature, shift, targets)
    labelled = targets is not None
    if not labelled:
        head = Head(softcap, logit_scale, temperature)
        targets = no_targets(e)
    check_heads(e, c, teacher_e, teacher_c, targets, bias, teacher_bias, method)
    terms.check(targets, c.shape[0])
    e, c, bias = to_autocast(e, c, bias)
    teacher_e, teacher_c, teacher_bias = to_autocast(teacher_e, teacher_c, teacher_bias)
    tokens = weigh(e, targets, head, terms)
    check_labels(
        tokens.labels,
        c.shape[0],
        head.ignore_index,
        offset=tokens.steps,
        wait=method.materialises,
    )
    rows = rows_of_heads(
        e.reshape(-1, e.shape[-1]),
        c,
        bias,
        teacher_e.reshape(-1, teacher_e.shape[-1]),
        teacher_c,
        teacher_bias,
        tokens.labels,
        head,
        teacher,
        divergence,
        method,
        want_stats=return_parts,
    )
    return _assemble(tokens, rows, terms, ce_weight, labelled, return_parts)


def _assemble(
    tokens: Tokens,
    rows: DivergenceRows,
    terms: LossTerms,
    ce_weight: float,
    labelled: bool,
    return_parts: bool,
) -> Tensor | LinearDivergenceOutput:
    def reduced(values: Tensor) -> Tensor:
        values = tokens.coef * values
        return tokens.unflatten(values) if terms.reduction == "none" else values.sum()

    loss = divergence = reduced(rows.divergence)
    cross_entropy = reduced(rows.nll) if labelled and (ce_weight or return_parts) else None
    if ce_weight:
        loss = divergence + ce_weight * cross_entropy
    if not return_parts:
        return loss
    return LinearDivergenceOutput(loss, divergence, cross_entropy, FilterStats(rows.stats))


def rows_of_heads(
    e: Tensor,
    c: Tensor,
    bias: Tensor | None,
    teacher_e: Tensor,
    teacher_c: Tensor,
    teacher_bias: Tensor | None,
    targets: Tensor,
    head: Head,
    teacher: Head,
    divergence: Divergence,
    method: Method,
    want_stats: bool = False,
) -> DivergenceRows:
    """`divergence_rows` of heads that have been checked, in the dtypes autocast asks for."""
    teacher_e, teacher_c = teacher_e.detach(), teacher_c.detach()
    teacher_bias = None if teacher_bias is None else teacher_bias.detach()
    if method.materialises:
        return DivergenceRows(
            *reference.rows(
                e,
                c,
                teacher_e,
                teacher_c,
                targets,
                bias,
                teacher_bias,
                kind=divergence.proper,
                beta=divergence.beta,
                student=head.map(),
                teacher=teacher.map(),
                ignore_index=head.ignore_index,
            )
        )
    out = op.rows(
        e,
        c,
        bias,
        teacher_e,
        teacher_c,
        teacher_bias,
        targets,
        head,
        teacher,
        kind=divergence.proper,
        beta=divergence.beta,
        tau=method.tau(e.dtype),
        seed=method.seed,
        want_stats=want_stats,
    )
    return DivergenceRows(out.divergence, out.nll, out.lse, out.teacher_nll, out.summary)
