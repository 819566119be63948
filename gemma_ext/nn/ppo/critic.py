"""Where the value of a state comes from: the policy's states, an adapter's, or another model's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn

from gemma_ext.nn._models import unwrap
from gemma_ext.nn.ppo.adapters import VALUE, active, adapter_parameters
from gemma_ext.nn.ppo.hidden import Read, model_inputs, read
from gemma_ext.nn.ppo.sequences import Sequences
from gemma_ext.nn.ppo.value import ValueHead


class Critic(nn.Module, ABC):
    """The value of the state before each response token.

    Attributes:
        head: of the value.
        shares_states: whether it reads the policy's own states, so that one forward serves both.
    """

    shares_states = False

    def __init__(self, head: ValueHead) -> None:
        super().__init__()
        self.head = head

    @abstractmethod
    def forward(self, sequences: Sequences, policy: Read | None = None) -> Tensor:
        """float32 [N].

        Args:
            policy: what the policy read of the same sequences, for a critic that shares its states.
        """

    def acting(self) -> AbstractContextManager[None]:
        """Goes around a forward and its backward."""
        return nullcontext()

    def trained(self) -> Iterator[nn.Parameter]:
        """Parameters of the critic alone."""
        return (p for p in self.parameters() if p.requires_grad)


class SharedCritic(Critic):
    """A head on the policy's states: no second model, and gradients of both losses meet.

    Args:
        width: D.
        head: to go on from; a fresh one by default.
    """

    shares_states = True

    def __init__(self, width: int, head: ValueHead | None = None) -> None:
        super().__init__(head or ValueHead(width))

    def forward(self, sequences: Sequences, policy: Read | None = None) -> Tensor:
        if policy is None:
            raise ValueError("policy: expected what the policy read of the sequences, got None")
        return self.head(policy.states)


class AdapterCritic(Critic):
    """A head on the states of the policy's backbone under an adapter of its own.

    Args:
        policy: of peft, with an adapter of that name.
        adapter: name.
        head: to go on from; a fresh one by default.

    Raises:
        ValueError: no such adapter.
    """

    def __init__(
        self, policy: nn.Module, adapter: str = VALUE, head: ValueHead | None = None
    ) -> None:
        super().__init__(head or ValueHead(width_of(policy)))
        self.adapter = adapter
        # peft freezes an adapter that is added beside the active one
        self.own = [p.requires_grad_(True) for p in adapter_parameters(policy, adapter)]
        # a plain attribute: the policy's parameters are not the critic's
        self.policy = (policy,)

    def forward(self, sequences: Sequences, policy: Read | None = None) -> Tensor:
        with self.acting():
            return self.head(states(self.policy[0], sequences))

    def acting(self) -> AbstractContextManager[None]:
        return active(self.policy[0], self.adapter)

    def trained(self) -> Iterator[nn.Parameter]:
        yield from self.own
        yield from super().trained()


class SeparateCritic(Critic):
    """A head on the states of a model of its own.

    Args:
        model: of transformers: a backbone, a causal LM, or a sequence classification with one
            output, whose `score` becomes the head.
        head: to go on from.
    """

    def __init__(self, model: nn.Module, head: ValueHead | None = None) -> None:
        score = getattr(unwrap(model), "score", None)
        if head is None and isinstance(score, nn.Linear):
            head = ValueHead.of({f"score.{k}": v for k, v in score.state_dict().items()})
        super().__init__(head or ValueHead(width_of(model)))
        self.model = model
        for name in ("lm_head", "score"):
            # not read: it would be an optimiser's dead weight
            unused = getattr(unwrap(model), name, None)
            if isinstance(unused, nn.Module) and not _tied(model, unused):
                unused.requires_grad_(False)

    def forward(self, sequences: Sequences, policy: Read | None = None) -> Tensor:
        return self.head(states(self.model, sequences))


def states(model: nn.Module, sequences: Sequences) -> Tensor:
    """[N, D] states behind the last norm, before each response token."""
    bare = unwrap(model)
    if bare.get_output_embeddings() is not None:
        return read(model, sequences).states
    body = getattr(bare, bare.base_model_prefix, bare)
    output = body(**model_inputs(body, sequences), return_dict=True)
    return sequences.hidden_rows(output.last_hidden_state)


def width_of(model: nn.Module) -> int:
    """D of a model of transformers."""
    return unwrap(model).config.get_text_config().hidden_size


def _tied(model: nn.Module, head: nn.Module) -> bool:
    embeddings = unwrap(model).get_input_embeddings()
    return getattr(head, "weight", None) is embeddings.weight
