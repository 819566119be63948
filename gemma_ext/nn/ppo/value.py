"""The head of a value or a reward, and its names in files."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

TRL, CLASSIFIER = "v_head.summary.", "score."
"""Prefixes of its parameters: trl's models with a value head; sequence classification."""


class ValueHead(nn.Module):
    """v = w . h + b in float32; begins at 0 for every state.

    Args:
        width: D.
        bias: whether there is a b.
    """

    def __init__(self, width: int, *, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, width))
        self.bias = nn.Parameter(torch.zeros(1)) if bias else None

    def forward(self, states: Tensor) -> Tensor:
        """float32 [N] of states [N, D]."""
        with torch.autocast(states.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return nn.functional.linear(states.float(), self.weight.float(), bias).squeeze(-1)

    def tensors(self, prefix: str = TRL) -> dict[str, Tensor]:
        """Its parameters under the names of a file, each `prefix` + "weight" or "bias"."""
        return {prefix + name: value.detach() for name, value in self.named_parameters()}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> ValueHead:
        """The head among the tensors of a checkpoint, under either of its names.

        Raises:
            ValueError: there is none, or one with several outputs.
        """
        for prefix in (TRL, CLASSIFIER):
            # a wrapper may have put its own name before it
            found = [name for name in tensors if name.endswith(prefix + "weight")]
            if found:
                weight = tensors[found[0]]
                bias = tensors.get(found[0].removesuffix("weight") + "bias")
                if weight.dim() != 2 or weight.shape[0] != 1:
                    raise ValueError(
                        f"{found[0]}: expected one output, [1, D], got {list(weight.shape)}"
                    )
                head = cls(weight.shape[1], bias=bias is not None)
                state = {"weight": weight} | ({} if bias is None else {"bias": bias})
                head.load_state_dict({k: v.float() for k, v in state.items()})
                return head
        raise ValueError(f"expected a tensor {TRL}weight or {CLASSIFIER}weight, got neither")
