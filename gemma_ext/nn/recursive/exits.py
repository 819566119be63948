"""Predictions from the end of each loop: the state there through the final norm and the head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gemma_ext.nn._defer_head import defer_head
from gemma_ext.nn._deferred_logits import OF_THE_HEAD, DeferredLogits, LossOptions
from gemma_ext.nn._models import output_head, unwrap
from gemma_ext.nn.recursive.plan import Plan

_NORMS = ("norm", "final_layer_norm", "ln_f")


def final_norm(model: Any) -> nn.Module:
    """The norm between the last layer and the head.

    Raises:
        TypeError: there is none of a known name.
    """
    base = model.base_model
    for name in _NORMS:
        if hasattr(base, name):
            return getattr(base, name)
    raise TypeError(
        f"model: expected a final norm named {', '.join(_NORMS)}, got {type(base).__name__}"
    )


def exit_heads(
    model: nn.Module, batch: Mapping[str, Any], *, early: bool = True
) -> list[dict[str, Any]]:
    """What stands for the logits of every loop; none is computed.

    An early exit goes from the end of its loop through the final norm, past a coda if there is one.
    The model's own forward runs up to its head, so that scales, soft-caps, biases and adapters of
    the head are the model's own.

    Args:
        model: causal language model of transformers, also wrapped.
        batch: what its forward takes, without labels.
        early: False for the last loop alone.

    Returns:
        for each loop e [batch, T, D], c [V, D], bias, softcap, logit_scale, as
        `gemma_ext.linear_cross_entropy` takes them.

    Raises:
        ValueError: a plan whose loops have no ends.
        TypeError, DeferredLogitsError: a model whose head cannot be deferred.
    """
    inner = unwrap(model)
    ends = Plan.of_model(inner).exits()[:-1] if early else []
    options = LossOptions(type(inner).__name__, remedy="train it on its last loop alone")
    with defer_head(output_head(inner), options):
        output = model(**batch, use_cache=False, output_hidden_states=bool(ends))
    logits = output.logits
    if not isinstance(logits, DeferredLogits) or (ends and len(logits.terms) > 1):
        raise TypeError(f"expected {options.owner} to return the logits of its plain head")
    states = _early(inner, ends, output.hidden_states)
    described = [logits.of_hidden(state).head() for state in states] + [logits.head()]
    return [{name: head[name] for name in OF_THE_HEAD} for head in described]


def _early(model: Any, ends: Sequence[int], hidden: Sequence[Tensor] | None) -> list[Tensor]:
    return [final_norm(model)(hidden[end]) for end in ends]


class ExitHead(nn.Module):
    """A low-rank change of the head for early exits: W + B A with A [r, D], B [V, r].

    Args:
        head: [V, D] weight that it changes.
        rank: r.

    Raises:
        ValueError: a rank below 1.
    """

    def __init__(self, head: Tensor, rank: int = 128) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank: expected a number >= 1, got {rank}")
        like = {"dtype": head.dtype, "device": head.device}
        self.lora_A = nn.Parameter(torch.empty(rank, head.shape[1], **like))
        self.lora_B = nn.Parameter(torch.zeros(head.shape[0], rank, **like))
        nn.init.normal_(self.lora_A, std=1 / rank)

    def forward(self, states: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """States [..., D + r] and weight [V, D + r] whose product is that of W + B A."""
        low = nn.functional.linear(states, self.lora_A)
        return torch.cat([states, low], -1), torch.cat([weight, self.lora_B], 1)
