"""Hidden states of responses and the head that reads them: no [B, T, V] logits, no prompt rows."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from gemma_ext.nn._defer_head import defer_head
from gemma_ext.nn._deferred_logits import DeferredLogits, LossOptions
from gemma_ext.nn._models import output_head, unwrap
from gemma_ext.nn.ppo.adapters import peft_or_bare
from gemma_ext.nn.ppo.sequences import Sequences
from gemma_ext.ops.cce import linear_logprobs
from gemma_ext.ops.cce.divergence import divergence_rows

_REMEDY = "its log-probabilities cannot be had without holding its logits"


class HiddenHead(NamedTuple):
    """logits = softcap * tanh((logit_scale * hidden @ weight.T + bias) / softcap) of N rows.

    Attributes:
        hidden: [N, D]. weight: [V, D]. bias: [V] or None. softcap: None for none.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0

    def logprobs(self, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """(log-probability of each target, entropy), float32 [N], differentiable, exact.

        Args:
            targets: [N]. temperature: divides the logits behind the cap.
        """
        return linear_logprobs(
            self.hidden,
            self.weight,
            targets,
            bias=self.bias,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            temperature=temperature,
            filter_eps=None,
        )


class Read(NamedTuple):
    """What one forward of a causal LM gives for the response's tokens.

    Attributes:
        head: of the next token.
        states: [N, D] what the head is applied to, for further heads such as a value's.
    """

    head: HiddenHead
    states: Tensor


def read(model: nn.Module, sequences: Sequences, where: Tensor | None = None) -> Read:
    """Hidden states and head of a causal LM of transformers, under any wrapper of `unwrap`.

    The model's own forward runs, so that caps, scales, biases, adapters of the head and autocast
    are the model's; of its logits nothing is multiplied out.

    Args:
        where: bool [B, P + T], the places to read instead of those before response tokens.

    Raises:
        TypeError, DeferredLogitsError: the model makes its logits in another way than by a product
            with its head.
    """
    bare = unwrap(model)
    options = LossOptions(type(bare).__name__, filter_eps=None, remedy=_REMEDY)
    for part in dict.fromkeys((model, peft_or_bare(model), bare)):  # in one order on all ranks
        if isinstance(part, FSDPModule):
            part.unshard()  # before the head is looked at; the forward would do it a moment later
    with defer_head(output_head(bare), options):
        output = model(**model_inputs(bare, sequences), return_dict=True)
    logits = output.logits
    if not isinstance(logits, DeferredLogits):
        raise TypeError(f"expected {options.owner} to return the logits of its head; {_REMEDY}")
    rows = sequences.hidden_rows(logits) if where is None else logits[where]
    found = rows.head()
    head = HiddenHead(found["e"], found["c"], found["bias"], found["softcap"], found["logit_scale"])
    return Read(head, rows.terms[0].hidden)


def exact_kl(
    head: HiddenHead, references: Sequence[tuple[float, HiddenHead]], temperature: float = 1.0
) -> Tensor:
    """sum_k a_k KL(head || reference_k) of whole distributions, float32 [N], differentiable.

    Args:
        references: weights and heads, as `Reference.heads` gives them.
    """
    total = torch.zeros(head.hidden.shape[0], device=head.hidden.device)
    for weight, other in references:
        rows = divergence_rows(
            head.hidden,
            head.weight,
            other.hidden,
            other.weight,
            bias=head.bias,
            teacher_bias=other.bias,
            kind="reverse_kl",
            softcap=head.softcap,
            logit_scale=head.logit_scale,
            temperature=temperature,
            teacher_softcap=other.softcap,
            teacher_logit_scale=other.logit_scale,
            filter_eps=None,
        )
        total = total + weight * rows.divergence
    return total


def model_inputs(bare: nn.Module, sequences: Sequences) -> dict[str, Any]:
    """Arguments of a forward over whole sequences, counted as generation counts positions."""
    inputs = {"input_ids": sequences.ids, "attention_mask": sequences.mask, "use_cache": False}
    if "position_ids" in inspect.signature(bare.forward).parameters:
        inputs["position_ids"] = sequences.position_ids
    return inputs
