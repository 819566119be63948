"""What a head says about a target, from the hidden states that predict it.

Everything here takes the logits of B sequences at the T places before a target, [B * T, V],
described and not computed (`gemma_ext.nn._deferred_logits`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gemma_ext.nn._deferred_logits import DeferredLogits
from gemma_ext.ops.cce import cce_rows

_LEAST = 8  # tokens of a place


def losses_of(
    logits: DeferredLogits, target: Tensor, mellowmax: float | None
) -> tuple[Tensor, Tensor]:
    """Mean loss [B] of a target [T], and whether each of its tokens is the likeliest one [B].

    Args:
        mellowmax: alpha of the mellowmax over negated target logits that replaces the loss.
    """
    targets = target.repeat(logits.shape[0] // len(target))
    with logits.autocast_of_the_head():
        head = logits.head()
        # the weights of an attacked model are no part of a derivative
        for name in ("c", "bias"):
            head[name] = None if head[name] is None else head[name].detach()
        found = cce_rows(**head, targets=targets, want_argmax=True)
    matched = (found.argmax == targets).view(-1, len(target)).all(1)
    if mellowmax is None:
        return found.nll.view(-1, len(target)).mean(1), matched
    negated = (found.nll - found.lse).view(-1, len(target)) * mellowmax
    count = torch.tensor(float(len(target)), device=negated.device)
    return (negated.logsumexp(1) - count.log()) / mellowmax, matched


def joined(parts: Sequence[DeferredLogits]) -> DeferredLogits:
    """The logits of one head over the hidden states of several, one after another."""
    terms = tuple(
        same[0]._replace(hidden=torch.cat([term.hidden for term in same]))
        for same in zip(*(part.terms for part in parts), strict=True)
    )
    return dataclasses.replace(parts[0], terms=terms)


class Shortlist(NamedTuple):
    """The tokens that a head finds likely before a target, and its rows for them.

    The sum over a part of the vocabulary is below that over all of it, so a loss under a shortlist
    is never above the loss; where the shortlist holds nearly all of the probability, it is nearly
    the loss. A target that is not the likeliest on the list is not the likeliest at all.

    Attributes:
        weights: [K, D] for each term of the head. bias: [K] or None.
        target: [T] places of the target's tokens on the list.
    """

    weights: tuple[Tensor, ...]
    bias: Tensor | None
    target: Tensor

    def of(self, logits: DeferredLogits) -> DeferredLogits:
        """[B * T, K] of the tokens on the list."""
        pairs = zip(logits.terms, self.weights, strict=True)
        terms = tuple(term._replace(weight=weight) for term, weight in pairs)
        return dataclasses.replace(logits, terms=terms, bias=self.bias)


@torch.no_grad()
def shortlist(logits: DeferredLogits, target: Tensor, share: int = 16) -> Shortlist:
    """Tokens that are likely at one sequence's T places, at most V / `share` of them or few.

    Holds the [T, V] logits of that sequence for a moment.
    """
    rows, vocabulary = logits.shape
    count = min(vocabulary, max(_LEAST, vocabulary // (share * rows)))
    likely = logits.materialize().topk(count, dim=1).indices
    tokens = torch.cat([likely.flatten(), target]).unique()
    return Shortlist(
        tuple(term.weight[tokens] for term in logits.terms),
        None if logits.bias is None else logits.bias[tokens],
        torch.searchsorted(tokens, target),
    )
