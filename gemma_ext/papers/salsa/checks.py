"""Is a soup fit to be a reference, and is the policy still writing?"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gemma_ext.nn.ppo import Reference, Sequences, exact_kl, read
from gemma_ext.souping.scoring import IGNORED, Scores, unpack

Batch = Tensor | Mapping[str, Any]
"""Token ids [B, T], or a mapping with input_ids and perhaps attention_mask and labels (-100 takes
no part)."""
SHORT = 0.3  # of the SFT model's median length; below it a policy has collapsed


def nll(model: nn.Module | Scores, batch: Batch, call: Any = None) -> tuple[Tensor, int]:
    """(sum of the negative log-likelihoods of the labels in nats, differentiable; their count)."""
    scores = model if isinstance(model, Scores) else Scores(model)
    ids, mask = unpack(batch, scores.head.weight.device)
    labels = ids if isinstance(batch, Tensor) else batch.get("labels")
    labels = ids if labels is None else labels.to(ids.device)
    labels = labels.masked_fill(mask == 0, IGNORED)
    logprobs, _ = scores(ids, mask, labels) if call is None else call(scores, ids, mask, labels)
    return -logprobs.sum(), int((labels[:, 1:] != IGNORED).sum())


@torch.no_grad()
def held_out_loss(model: nn.Module, batches: Sequence[Batch]) -> float:
    """Mean negative log-likelihood of a label over all batches, in nats.

    Raises:
        ValueError: no label.
    """
    training = model.training
    scores = Scores(model.eval())
    total, count = 0.0, 0
    for batch in batches:
        loss, labels = nll(scores, batch)
        total, count = total + float(loss), count + labels
    model.train(training)
    if not count:
        raise ValueError("expected labels in the held-out batches, got none")
    return total / count


@dataclass(frozen=True)
class LinearMode:
    """Held-out losses of a soup and its parents, in nats a token.

    Attributes:
        parents: K. soup: of the soup.
        tolerance: that the soup may be worse by than the worst parent.
    """

    parents: tuple[float, ...]
    soup: float
    tolerance: float = 0.0

    @property
    def barrier(self) -> float:
        """How much worse the soup is than the worst parent; negative where it is better."""
        return self.soup - max(self.parents)

    @property
    def holds(self) -> bool:
        return self.barrier <= self.tolerance  # False for a NaN

    def require(self) -> LinearMode:
        """Itself.

        Raises:
            ValueError: the soup is worse than all of its parents.
        """
        if self.holds:
            return self
        losses = ", ".join(f"{loss:.4f}" for loss in self.parents)
        raise ValueError(
            f"expected a soup with a held-out loss of at most {max(self.parents):.4f}, the worst "
            f"of its parents ({losses}), got {self.soup:.4f}: they are not in one basin; tune them "
            f"from one start, shorter or at a smaller rate, or hold on to each (multi-KL)"
        )


def linear_mode(
    parents: Sequence[nn.Module],
    soup: nn.Module,
    batches: Sequence[Batch],
    *,
    tolerance: float = 0.0,
) -> LinearMode:
    """Measures whether a soup is at least as good as its worst parent on held-out SFT data."""
    losses = tuple(held_out_loss(parent, batches) for parent in parents)
    return LinearMode(losses, held_out_loss(soup, batches), tolerance)


class Collapse:
    """Watches a policy's responses get shorter than `share` of the SFT model's.

    At step 0 a policy that starts beside its reference pays at every token, so that the sum of
    penalties is least for the response that ends at once.

    Args:
        lengths: tokens of the SFT model's responses to the same prompts.
        share: of their median.
        patience: updates in a row below it until `collapsed`.

    Raises:
        ValueError: no length, or numbers out of range.

    Example:
        >>> watch = Collapse(sft.lengths)
        >>> if watch.update(rollout.lengths, rollout.ended): stop()
    """

    def __init__(
        self, lengths: Sequence[int] | Tensor, *, share: float = SHORT, patience: int = 2
    ) -> None:
        lengths = _floats(lengths)
        if not lengths:
            raise ValueError("expected lengths of the SFT model's responses, got none")
        if not 0 < share < 1 or patience < 1:
            raise ValueError(
                f"expected share in (0, 1) and a patience of at least 1, got {share}, {patience}"
            )
        self.least = share * statistics.median(lengths)
        self.patience = patience
        self.below = 0
        self.seen: dict[str, float] = {}

    @property
    def collapsed(self) -> bool:
        return self.below >= self.patience

    def update(self, lengths: Sequence[int] | Tensor, ended: Sequence[bool] | Tensor) -> bool:
        """Takes in an update's responses: tokens of each, and which ended by themselves."""
        lengths, ended = _floats(lengths), _floats(ended)
        if not lengths:
            return self.collapsed
        median = statistics.median(lengths)
        self.below = self.below + 1 if median < self.least else 0
        self.seen = {
            "collapse/median_length": median,
            "collapse/least_length": self.least,
            "collapse/eos_rate": sum(ended) / len(ended),
            "collapse/updates_below": float(self.below),
        }
        return self.collapsed

    def sentence(self) -> str:
        """What happened, for whoever reads the log."""
        return (
            f"the median response has {self.seen['collapse/median_length']:g} tokens, below "
            f"{self.least:g} for {self.below} updates, and {self.seen['collapse/eos_rate']:.0%} "
            f"end: the policy has collapsed; lower kl_coef, warm it up, start from the soup, "
            f"subtract the divergence of step 0, or ask for a least length"
        )

    def state_dict(self) -> dict[str, Any]:
        return {"below": self.below, "seen": self.seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.below, self.seen = state["below"], dict(state["seen"])


@torch.no_grad()
def divergences(
    policy: nn.Module,
    references: Mapping[str, Reference | nn.Module],
    sequences: Sequences,
    temperature: float = 1.0,
) -> dict[str, float]:
    """KL(policy || reference) along the policy's own responses, each step summed over the whole
    vocabulary, so that no estimator's variance is in it.

    Returns:
        "kl_NAME" per response and "kl_NAME_per_token", in nats; of a `MultiReference` its weighted
        sum.
    """
    training = policy.training
    own = read(policy.eval(), sequences).head
    policy.train(training)
    found = {}
    for name, reference in references.items():
        if isinstance(reference, nn.Module):
            heads = [(1.0, read(reference, sequences).head)]
        else:
            heads = reference.heads(sequences)
        total = float(exact_kl(own, heads, temperature).double().sum())
        found[f"kl_{name}"] = total / max(len(sequences), 1)
        found[f"kl_{name}_per_token"] = total / max(len(own.hidden), 1)
    return found


def step_zero(
    policy: nn.Module,
    references: Mapping[str, Reference | nn.Module],
    sequences: Sequences,
    ended: Sequence[bool] | Tensor,
    temperature: float = 1.0,
) -> dict[str, float]:
    """What is paid before anything is learned: divergences, lengths and ends of responses."""
    lengths = _floats(sequences.lengths)
    return {
        **divergences(policy, references, sequences, temperature),
        "length_mean": sum(lengths) / max(len(lengths), 1),
        "length_median": statistics.median(lengths) if lengths else 0.0,
        "eos_rate": sum(_floats(ended)) / max(len(lengths), 1),
    }


def _floats(values: Sequence[Any] | Tensor) -> list[float]:
    return [float(value) for value in (values.tolist() if isinstance(values, Tensor) else values)]
