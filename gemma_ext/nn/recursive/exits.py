"""Predictions from the end of each loop: the state there through the final norm and the head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

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


def exit_states(model: Any, input_ids: Tensor, **inputs: Any) -> list[Tensor]:
    """States [batch, T, D] that the head is to read, of every loop; the last is the model's own.

    An early exit goes from the end of its loop through the final norm, past a coda if there is one.

    Raises:
        ValueError: a plan whose loops have no ends.
    """
    ends = Plan.of_model(model).exits()[:-1]
    inputs = {"use_cache": False, **inputs}
    if not ends:
        return [model.base_model(input_ids, **inputs).last_hidden_state]
    seen = model.base_model(input_ids, output_hidden_states=True, **inputs)
    norm = final_norm(model)
    return [*(norm(seen.hidden_states[end]) for end in ends), seen.last_hidden_state]


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
