"""What a policy is held near: the protocol, a frozen model, and a policy without its adapter."""

from __future__ import annotations

import hashlib
from collections.abc import Container, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gemma_ext.nn.ppo.adapters import adapter_parameters, peft_model, without
from gemma_ext.nn.ppo.hidden import HiddenHead, read
from gemma_ext.nn.ppo.sequences import Sequences


@runtime_checkable
class Reference(Protocol):
    """A distribution over responses that may move with the policy.

    A reference of several models (a multi-KL) answers with the weighted sum of their divergences:
    `heads` names each with its weight.
    """

    def logprobs(self, sequences: Sequences, temperature: float = 1.0) -> Tensor:
        """float32 [N], without gradient: log-probability of each response token."""

    def heads(self, sequences: Sequences) -> list[tuple[float, HiddenHead]]:
        """(weight, head) of every model, without gradient, for exact divergences."""

    def after_update(self, policy: nn.Module, step: int) -> dict[str, float]:
        """Moves the reference behind step `step`, counted from 1; metrics of the move."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beyond what the constructor was given."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class FrozenReference:
    """A causal LM that never changes.

    Args:
        model: of transformers; put in evaluation mode, its parameters without gradients.

    Attributes:
        identity: tells references apart that a resumed run must not confuse.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval().requires_grad_(False)
        self.identity = f"{type(self).__name__} {_sample(model)}"

    @torch.no_grad()
    def logprobs(self, sequences: Sequences, temperature: float = 1.0) -> Tensor:
        return read(self.model, sequences).head.logprobs(sequences.targets, temperature)[0]

    @torch.no_grad()
    def heads(self, sequences: Sequences) -> list[tuple[float, HiddenHead]]:
        return [(1.0, read(self.model, sequences).head)]

    def after_update(self, policy: nn.Module, step: int) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


def _sample(model: nn.Module, left_out: Container[int] = ()) -> str:
    """Digest of the first values of every parameter; of sharded ones, of their names.

    Args:
        left_out: ids of parameters.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name, parameter in model.named_parameters():
        if id(parameter) in left_out:
            continue
        digest.update(name.encode())
        if not isinstance(parameter, DTensor):
            digest.update(parameter.detach().flatten()[:16].float().cpu().numpy().tobytes())
    return digest.hexdigest()


class AdapterOffReference:
    """The policy itself with its adapters off: the base model to the bit, without a second copy.

    Attributes:
        identity: of the base model; a resumed run must not confuse it with another.

    Args:
        policy: of peft, or a wrapper of one.

    Raises:
        TypeError: a policy without adapters.
        ValueError: one that trains more than adapters, with which the reference would move.
    """

    def __init__(self, policy: nn.Module) -> None:
        self.policy = policy
        adapters = {
            id(p)
            for name in peft_model(policy).peft_config
            for p in adapter_parameters(policy, name)
        }
        for name, parameter in policy.named_parameters():
            if parameter.requires_grad and id(parameter) not in adapters:
                raise ValueError(
                    f"policy: expected only adapters to train beside a reference without them, "
                    f"got {name}"
                )
        self.identity = f"{type(self).__name__} {_sample(policy, adapters)}"

    @torch.no_grad()
    def logprobs(self, sequences: Sequences, temperature: float = 1.0) -> Tensor:
        return self.heads(sequences)[0][1].logprobs(sequences.targets, temperature)[0]

    @torch.no_grad()
    def heads(self, sequences: Sequences) -> list[tuple[float, HiddenHead]]:
        training = self.policy.training
        self.policy.eval()
        try:
            with self.acting():
                return [(1.0, read(self.policy, sequences).head)]
        finally:
            self.policy.train(training)

    def acting(self) -> AbstractContextManager[None]:
        """Within it the policy is the reference."""
        return without(self.policy)

    def after_update(self, policy: nn.Module, step: int) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass
