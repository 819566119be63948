"""Log-probabilities of chosen tokens, and what reinforcement learning asks for beside them.

    s = softcap(logit_scale e . c + bias) / temperature,   p = softmax(s)

| field              | of a row with target y                | gradient | costs besides            |
|--------------------|---------------------------------------|----------|--------------------------|
| `logprobs`         | log p_y                               | yes      |                          |
| `entropy`          | - sum p log p                         | yes      | sums of the same sweep   |
| `log_sum_sq_probs` | log sum p^2                           | no       | sums of the same sweep   |
| `mean_logits`      | sum s / V                             | no       | sums of the same sweep   |
| `is_top1`          | y = argmax s, the lowest id of equals | no       | sums of the same sweep   |
| `kl` k1, k2, k3    | d,  d^2 / 2,  exp(-d) - 1 + d         | yes      | a sweep of the reference |
|                    | with d = log p_y - log r_y            |          | unless log r_y is given  |
| `kl` full          | sum p log(p / r)                      | yes      | a sweep of the reference |
|                    |                                       |          | and, for entropy, sums,  |
|                    |                                       |          | top-1, one more of p     |

r is the reference's distribution, which has no gradient. Rows whose upstream gradients are all 0
take no part in the backward.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from gemma_ext.ops.cce.divergence import rows_of_heads
from gemma_ext.ops.cce.divergence_inputs import SAME, Divergence, check_heads, teacher_head
from gemma_ext.ops.cce.head import Head
from gemma_ext.ops.cce.inputs import Method, check_tensor, to_autocast
from gemma_ext.ops.cce.loss import LossTerms, Rows, Tokens
from gemma_ext.ops.cce.rows import enter, rows_of_head
from gemma_ext.ops.vocab_state import warn_ignored

__all__ = ["KL_KINDS", "LinearLogprobsOutput", "estimate_kl", "linear_logprobs"]

KL_KINDS = ("k1", "k2", "k3", "full")


class LinearLogprobsOutput(NamedTuple):
    """Per-token values [..., T - shift], 0 (False) where ignored; None where not asked for.

    Attributes:
        logprobs, entropy, log_sum_sq_probs, mean_logits, is_top1, kl: see the table of
            `gemma_ext.ops.cce.logprobs`; float32, is_top1 bool.
        ref_logprobs: log-probability of the target under the reference, without gradient.
    """

    logprobs: Tensor
    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None
    kl: Tensor | None = None
    ref_logprobs: Tensor | None = None


def estimate_kl(logprobs: Tensor, ref_logprobs: Tensor, kind: str) -> Tensor:
    """KL(p | r) from log-probabilities of tokens drawn from p, shaped as they are.

    Args:
        kind: "k1" d, "k2" d^2 / 2 or "k3" exp(-d) - 1 + d, with d = logprobs - ref_logprobs, of
            which only `logprobs` has a gradient (Schulman, Approximating KL divergence, 2020). The
            mean of k1 and k3 is the divergence.

    Raises:
        ValueError: another kind.
    """
    d = logprobs - ref_logprobs.detach()
    if kind == "k1":
        return d
    if kind == "k2":
        return d.square() / 2
    if kind == "k3":
        return torch.expm1(-d) + d
    raise ValueError(f"expected kind to be one of k1, k2, k3, got {kind!r}")


def linear_logprobs(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    shift: int | bool = 0,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    filter_eps: float | str | None = "auto",
    impl: str = "auto",
    filter_seed: int = 0,
    memory: str = "default",
    state: object = None,
    return_entropy: bool = True,
    return_moments: bool = False,
    return_top1: bool = False,
    kl: str | None = None,
    ref_e: Tensor | None = None,
    ref_c: Tensor | None = None,
    ref_bias: Tensor | None = None,
    ref_softcap: float | str | None = SAME,
    ref_logit_scale: float | str = SAME,
    ref_temperature: float | str = SAME,
    ref_logprobs: Tensor | None = None,
) -> tuple[Tensor, Tensor] | LinearLogprobsOutput:
    """Log-probability of each target and entropy of each distribution, for RL and scoring.

    The scale comes first, then the bias, the cap, and the temperature last. A head without
    `requires_grad` (frozen, or under LoRA of the backbone) gets no dC and costs none.

    Args:
        e, c, targets, bias, ..., state: as in `linear_cross_entropy`, memory too.
        return_entropy: False saves its part of the forward; the field is None then.
        return_moments: also `log_sum_sq_probs` and `mean_logits`.
        return_top1: also `is_top1`.
        kl: of `KL_KINDS`, asks for `kl` and `ref_logprobs`.
        ref_e: [..., T, D'] hidden states of the reference at the same positions; ref_c: [V, D'];
            ref_bias: [V]; in a dtype of their own.
        ref_softcap, ref_logit_scale, ref_temperature: those of the policy are the "same" unless
            given (ref_softcap=None is no cap).
        ref_logprobs: [..., T - shift], in place of a head of the reference where `kl` is no "full".

    Returns:
        (logprobs, entropy), float32 [..., T - shift], both differentiable, 0 where ignored; a
        `LinearLogprobsOutput` where any other fields are asked for.

    Raises:
        TypeError, ValueError: as `linear_cross_entropy`; a `kl` without its reference.

    Example:
        >>> out = linear_logprobs(hidden, head, ids, shift=True, softcap=30.0, temperature=0.7,
        ...                       kl="full", ref_e=ref_hidden, ref_c=ref_head)
        >>> loss = (-advantages * out.logprobs + 0.05 * out.kl).mean()
    """
    head = Head(softcap, logit_scale, temperature, ignore_index)
    if state is not None:
        warn_ignored("state")
    method = Method(impl, filter_eps, filter_seed, memory)
    terms = LossTerms(reduction="none", shift=shift)
    check_reference(kl, ref_e=ref_e, ref_c=ref_c, ref_bias=ref_bias, ref_logprobs=ref_logprobs)
    reference = dataclasses.replace(
        teacher_head(head, ref_softcap, ref_logit_scale, ref_temperature, role="ref"),
        ignore_index=ignore_index,
    )
    if ref_e is not None:
        check_heads(e, c, ref_e, ref_c, targets, bias, ref_bias, method, role="ref")
        ref_e, ref_c, ref_bias = to_autocast(ref_e, ref_c, ref_bias)
        ref_e = ref_e.reshape(-1, ref_e.shape[-1])
    tokens, e, c, bias = enter(e, c, targets, bias, head, terms, method)

    both = None
    if kl == "full":
        both = rows_of_heads(
            *(e, c, bias),
            *(ref_e, ref_c, ref_bias),
            tokens.labels,
            head,
            reference,
            Divergence("reverse_kl"),
            method,
        )
        out = LinearLogprobsOutput(
            tokens.unflatten(-both.nll),
            kl=tokens.unflatten(both.divergence),
            ref_logprobs=tokens.unflatten(-both.teacher_nll),
        )
        if not (return_entropy or return_moments or return_top1):
            return out
    rows = rows_of_head(
        *(e, c, tokens.labels, bias),
        head,
        method,
        want_entropy=return_entropy,
        want_argmax=return_top1,
        want_moments=return_moments,
    )
    fields = fields_of(tokens, rows)
    if kl is None:
        plain = return_entropy and not (return_moments or return_top1)
        return (fields.logprobs, fields.entropy) if plain else fields
    if both is not None:
        return fields._replace(logprobs=out.logprobs, kl=out.kl, ref_logprobs=out.ref_logprobs)
    if ref_logprobs is None:
        with torch.no_grad():
            theirs = rows_of_head(ref_e, ref_c, tokens.labels, ref_bias, reference, method)
        ref_logprobs = tokens.unflatten(-theirs.nll)
    else:
        ref_logprobs = given_logprobs(ref_logprobs, tokens, fields.logprobs)
    estimate = estimate_kl(fields.logprobs, ref_logprobs, kl)
    return fields._replace(kl=estimate, ref_logprobs=ref_logprobs)


def fields_of(tokens: Tokens, rows: Rows) -> LinearLogprobsOutput:
    """What a sweep of the policy's head has, in the shape of the targets."""

    def shaped(values: Tensor | None) -> Tensor | None:
        return None if values is None else tokens.unflatten(values)

    top1 = None if rows.argmax is None else rows.is_top1(tokens.labels) & tokens.valid
    return LinearLogprobsOutput(
        logprobs=shaped(-rows.nll),
        entropy=None if rows.mean_logit is None else shaped(rows.entropy()),
        log_sum_sq_probs=shaped(rows.log_sum_sq_probs),
        mean_logits=shaped(rows.average_logit),
        is_top1=shaped(top1),
    )


def given_logprobs(ref_logprobs: Tensor, tokens: Tokens, like: Tensor) -> Tensor:
    """The caller's log-probabilities, 0 where ignored, whatever was there."""
    if ref_logprobs.shape != like.shape:
        raise ValueError(
            f"expected ref_logprobs to be {list(like.shape)}, got {list(ref_logprobs.shape)}"
        )
    if ref_logprobs.device != like.device:
        raise ValueError(
            f"expected ref_logprobs on {like.device} like e, got {ref_logprobs.device}"
        )
    valid = tokens.unflatten(tokens.valid)
    return torch.where(valid, ref_logprobs.detach().to(like.dtype), torch.zeros_like(like))


def check_reference(kl: str | None, **reference: Tensor | None) -> None:
    """Raise unless `kl` has what it needs of ref_e, ref_c, ref_bias and ref_logprobs, by name."""
    if kl is not None and kl not in KL_KINDS:
        raise ValueError(f"expected kl to be None or one of {', '.join(KL_KINDS)}, got {kl!r}")
    given = {name: value for name, value in reference.items() if value is not None}
    for name, value in given.items():
        check_tensor(name, value)
        if kl is None:
            raise ValueError(f"expected kl with {name}, got None")
    if kl is None:
        return
    if ("ref_e" in given) != ("ref_c" in given):
        raise ValueError(f"expected ref_e and ref_c together, got {', '.join(given)}")
    if kl == "full" and "ref_e" not in given:
        raise ValueError("expected ref_e and ref_c with kl='full', got none")
    if ("ref_e" in given) == ("ref_logprobs" in given):
        got = "both" if "ref_e" in given else "neither"
        raise ValueError(f"expected either a head of the reference or ref_logprobs, got {got}")
