"""A reward model that is an adapter of the policy's own backbone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gemma_ext.nn.ppo.adapters import REWARD, active, adapter_parameters
from gemma_ext.nn.ppo.hidden import read
from gemma_ext.nn.ppo.sequences import Sequences
from gemma_ext.nn.ppo.value import ValueHead


class AdapterReward:
    """Scores the state at the last token of a response, under an adapter of its own.

    Args:
        policy: of peft, with an adapter of that name.
        head: of the score; frozen here, as the adapter is.
        adapter: name.
        batch: responses of a pass.

    Raises:
        ValueError: no such adapter.
    """

    def __init__(
        self, policy: nn.Module, head: ValueHead, adapter: str = REWARD, batch: int = 64
    ) -> None:
        for parameter in adapter_parameters(policy, adapter):
            parameter.requires_grad_(False)
        self.policy, self.adapter, self.batch = policy, adapter, batch
        self.head = head.requires_grad_(False)
        self.__name__ = adapter

    @torch.no_grad()
    def score_sequences(self, sequences: Sequences) -> Tensor:
        """float32 [B]."""
        found = []
        with active(self.policy, self.adapter):
            for start in range(0, len(sequences), self.batch):
                part = sequences[start : start + self.batch].trimmed()
                found.append(self.head(read(self.policy, part, part.last()).states))
        return torch.cat(found)
