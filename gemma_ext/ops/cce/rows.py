"""From the arguments of a call to the scored positions, and from a checked head to its rows."""

from __future__ import annotations

from torch import Tensor

from gemma_ext.ops.cce import op
from gemma_ext.ops.cce.head import Head
from gemma_ext.ops.cce.inputs import Method, check_labels, check_problem, to_autocast
from gemma_ext.ops.cce.loss import LossTerms, Rows, Tokens, weigh
from gemma_ext.reference import cce as reference


def enter(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    head: Head,
    terms: LossTerms,
    method: Method,
) -> tuple[Tokens, Tensor, Tensor, Tensor | None]:
    """The scored positions, e [N, D], c and bias, checked and in the dtype of autocast."""
    check_problem(e, c, targets, bias, method)
    terms.check(targets, c.shape[0])
    e, c, bias = to_autocast(e, c, bias)
    tokens = weigh(e, targets, head, terms)
    check_labels(
        tokens.labels,
        c.shape[0],
        head.ignore_index,
        offset=tokens.steps,
        wait=method.materialises,
    )
    return tokens, e.reshape(-1, e.shape[-1]), c, bias


def rows_of_head(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    head: Head,
    method: Method,
    *,
    class_weight: Tensor | None = None,
    want_entropy: bool = False,
    want_argmax: bool = False,
    want_stats: bool = False,
    want_moments: bool = False,
    allow_missing: bool = False,
) -> Rows:
    """`cce_rows` of a problem that has been checked, in the dtype that autocast asks for."""
    if method.materialises:
        options = {**head.map(), "ignore_index": head.ignore_index}
        rows = Rows(
            *reference.rows(
                e,
                c,
                targets,
                bias,
                **options,
                class_weight=class_weight,
                want_entropy=want_entropy,
                want_argmax=want_argmax,
            )
        )
        if not want_moments:
            return rows
        squares, average = reference.moments(e, c, targets, bias, **options)
        return rows._replace(log_sum_sq_probs=squares, average_logit=average)
    return op.rows(
        e,
        c,
        targets,
        bias,
        head,
        # the gradient of a weighted sum of logits is dense
        tau=method.tau(e.dtype) if class_weight is None else 0.0,
        seed=method.seed,
        class_weight=class_weight,
        want_entropy=want_entropy,
        want_argmax=want_argmax,
        want_stats=want_stats,
        want_moments=want_moments,
        allow_missing=allow_missing,
        lean=method.lean,
    )
