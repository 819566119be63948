"""Losses of a target behind many candidates, what they have in common run once.

Candidates of one step of GCG differ from the current string in a token or a few. The pass that
computes the gradient leaves the keys and values of the whole string; candidates are sorted by the
first token they change, and a batch of them runs from there on. The head sees only the rows that
predict a target, and its logits are never held.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gemma_ext.lm.huggingface import evaluating
from gemma_ext.nn._defer_head import defer_head
from gemma_ext.nn._deferred_logits import DeferredLogits, LossOptions
from gemma_ext.nn._models import output_head
from gemma_ext.ops.cce import cce_rows
from gemma_ext.papers.continuous_at.embeddings import Embeddings
from gemma_ext.papers.continuous_at.evaluation.keys import Keys, Start, cache_name, taken
from gemma_ext.papers.continuous_at.evaluation.template import Parts

Keep = Callable[[Tensor], Tensor]
"""From candidates [B, n] to the mask [B] of those that are to be scored."""

# run at once: larger batches share less of what their candidates have in common
_BATCH_TOKENS = {"cpu": 1536}
_BATCH_TOKENS_OF_A_CARD = 8192
_VOCABULARY_ROWS = 16384  # embedded at a time


@dataclass(frozen=True)
class Scores:
    """Of candidates.

    Attributes:
        losses: float32 [B] on the CPU, infinite where a candidate was not kept.
        matched: bool [B] on the CPU, whether every token of the target is the likeliest one.
    """

    losses: Tensor
    matched: Tensor


class Opened(NamedTuple):
    """What one pass over the current string leaves.

    Attributes:
        ids: int64 [n] of the string.
        loss: of the target behind it.
        gradient: float32 [n, D], of the loss by the string's embeddings.
        keys: of what stands before the string and of the string; None where nothing is shared.
    """

    ids: Tensor
    loss: float
    gradient: Tensor
    keys: Keys | None


class TargetScorer:
    """-log p(target | before, candidate, after), averaged over the tokens of the target.

    The model runs in evaluation mode and is left as it was; its parameters get no gradients.

    Args:
        model: causal, of `transformers`.
        parts: what stands around a candidate.
        share: False runs every candidate with all that stands before it.
        batch_size: candidates run at once; None chooses by their length.
        mellowmax: alpha of the mellowmax over target logits that replaces the loss; None for none.
        impl: as in `gemma_ext.linear_cross_entropy`.

    Raises:
        TypeError: a model without a head that can be scored by.
        ValueError: no target, or `batch_size` below 1; from `open`, a model that does not read the
            embeddings of its embedding module.
    """

    def __init__(
        self,
        model: nn.Module,
        parts: Parts,
        *,
        share: bool = True,
        batch_size: int | None = None,
        mellowmax: float | None = None,
        impl: str = "auto",
    ) -> None:
        if not parts.target:
            raise ValueError("expected a target of at least one token, got none")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"expected batch_size to be at least 1, got {batch_size}")
        self.model, self.batch_size, self.mellowmax = model, batch_size, mellowmax
        self._head = output_head(model)
        self._options = LossOptions(
            type(model).__name__,
            impl=impl,
            filter_eps=None,
            remedy="it cannot be attacked without holding its logits",
        )
        self.device = model.get_input_embeddings().weight.device
        self.before, self.after, self.target = (
            torch.tensor(ids, dtype=torch.int64, device=self.device) for ids in parts
        )
        # the last token of the target predicts nothing that is scored
        self._tail = torch.cat([self.after, self.target[:-1]])
        self._cache_name = cache_name(model) if share and len(self.before) else None
        self._prefix: Keys | None = None

    @cached_property
    def embeddings(self) -> Embeddings:
        """Of the model, which agrees with them."""
        return Embeddings(self.model)

    @property
    def shares(self) -> bool:
        return self._cache_name is not None

    def open(self, ids: Tensor) -> Opened:
        """Loss, gradient and keys of a string [n]."""
        ids = ids.to(self.device)
        string = self.embeddings(ids).requires_grad_()
        others = self.embeddings(self._tail)
        start = self._start(0)
        with evaluating(self.model), torch.enable_grad():
            inputs = torch.cat([self.embeddings(start.before), string, others])
            cache = start.cache(1)
            logits = self._forward(cache, inputs_embeds=inputs.unsqueeze(0))
            first = torch.tensor([len(start.before) + len(ids) + len(self.after) - 1])
            losses, _ = self._read(logits, first.to(self.device))
            (gradient,) = torch.autograd.grad(losses.sum(), string)
        length = len(self.before) + len(ids)
        keys = taken(cache, length) if cache is not None else None
        return Opened(ids, losses.item(), gradient.float(), keys)

    def token_gradient(self, opened: Opened) -> Tensor:
        """float32 [n, V]: gradient of the loss by the one-hot rows of the string.

        It is that of the input the model really has: whatever the embedding multiplies its rows by
        is part of it.
        """
        vocabulary = torch.arange(self.embeddings.vocab, device=self.device)
        rows = vocabulary.split(_VOCABULARY_ROWS)
        return torch.cat([opened.gradient @ self.embeddings(ids).float().T for ids in rows], 1)

    @torch.no_grad()
    def score(
        self, candidates: Tensor, opened: Opened | None = None, keep: Keep | None = None
    ) -> Scores:
        """Losses of candidates [B, n], in their order.

        Args:
            opened: of a string [n] that they are changes of; its keys are shared.
            keep: which of them are scored; it runs in a thread of its own beside the model.
        """
        candidates = candidates.cpu()
        count, width = candidates.shape
        first = torch.zeros(count, dtype=torch.int64)
        if opened is not None and opened.keys is not None:
            first = _first_change(candidates, opened.ids.cpu())
            # the row that predicts the first target is never shared
            first = first.clamp(max=width + len(self.after) - 1)
        order = first.argsort(stable=True)
        begins = first[order].tolist()
        chunks: list[tuple[Tensor, int]] = []
        at = 0
        while at < count:
            rows = self._rows(width + len(self._tail) - begins[at])
            chunks.append((order[at : at + rows], begins[at]))
            at += rows
        found = _Found(count)
        with evaluating(self.model), ThreadPoolExecutor(1) as pool:
            kept = [None] * len(chunks)
            if keep is not None:
                kept = pool.map(keep, [candidates[at] for at, _ in chunks])
            for (at, begin), mask in zip(chunks, kept, strict=True):
                at = at if mask is None else at[mask]
                if len(at):
                    string = candidates[at].to(self.device)
                    inputs = torch.cat([string, self._tail.expand(len(at), -1)], 1)[:, begin:]
                    first = torch.full_like(inputs[:, 0], inputs.shape[1] - len(self.target))
                    found.add(at, self._run(self._start(begin, opened), inputs, first))
        return found.scores()

    @torch.no_grad()
    def score_lists(self, candidates: Sequence[Sequence[int]]) -> Scores:
        """The same for candidates of any lengths; those of similar length are run together."""
        order = sorted(range(len(candidates)), key=lambda place: -len(candidates[place]))
        tail = self._tail.tolist()
        found = _Found(len(candidates))
        at = 0
        with evaluating(self.model):
            while at < len(order):
                longest = len(candidates[order[at]]) + len(tail)
                chosen = order[at : at + self._rows(longest)]
                at += len(chosen)
                # padding on the right: nothing before it looks at it
                rows = [[*candidates[place], *tail] for place in chosen]
                inputs = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
                first = torch.tensor([len(row) - len(self.target) for row in rows])
                inputs, first = inputs.to(self.device), first.to(self.device)
                found.add(torch.tensor(chosen), self._run(self._start(0), inputs, first))
        return found.scores()

    def _run(self, start: Start, inputs: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
        """Losses of rows [B, t] that go on at `start`; in halves where memory is short."""
        count = len(inputs)
        rows = torch.cat([start.before.expand(count, -1), inputs], 1)
        try:
            logits = self._forward(start.cache(count), input_ids=rows)
            return self._read(logits, first + len(start.before))
        except torch.OutOfMemoryError:
            if count == 1:
                raise
        halves = zip(inputs.tensor_split(2), first.tensor_split(2), strict=True)
        found = [self._run(start, *half) for half in halves]
        return tuple(torch.cat(parts) for parts in zip(*found, strict=True))

    def _rows(self, length: int) -> int:
        """How many rows of that many tokens are run at once."""
        if not self.shares:
            length += len(self.before)
        limit = _BATCH_TOKENS.get(self.device.type, _BATCH_TOKENS_OF_A_CARD)
        return self.batch_size or max(1, limit // length)

    def _start(self, begin: int, opened: Opened | None = None) -> Start:
        """Where candidates go on that are alike up to token `begin`."""
        if not self.shares:
            return Start(self.before, None, 0)
        if begin:
            return Start(self.before[:0], opened.keys, len(self.before) + begin)
        if self._prefix is None:
            cache = Start(self.before, [], 0).cache(1)
            with evaluating(self.model), torch.no_grad():
                self._forward(cache, input_ids=self.before.unsqueeze(0))
            self._prefix = taken(cache, len(self.before))
        return Start(self.before[:0], self._prefix, len(self.before))

    def _forward(self, cache: Any, **inputs: Tensor) -> DeferredLogits:
        if cache is not None:
            inputs[self._cache_name] = cache
        with defer_head(self._head, self._options):
            logits = self.model(**inputs, use_cache=cache is not None, return_dict=True).logits
        if not isinstance(logits, DeferredLogits):
            owner = self._options.owner
            raise TypeError(
                f"expected {owner} to return the logits of its head; {self._options.remedy}"
            )
        return logits

    def _read(self, logits: DeferredLogits, first: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and match of rows whose first target is predicted at `first` [B]."""
        steps = torch.arange(len(self.target), device=self.device)
        rows = torch.arange(len(first), device=self.device).repeat_interleave(len(steps))
        chosen = logits[rows, (first[:, None] + steps).flatten()]
        targets = self.target.repeat(len(first))
        with chosen.autocast_of_the_head():
            head = chosen.head()
            # the weights of an attacked model are no part of the derivative
            head.update(
                c=head["c"].detach(), bias=None if head["bias"] is None else head["bias"].detach()
            )
            head.pop("memory")
            found = cce_rows(**head, targets=targets, want_argmax=True)
        matched = (found.argmax == targets).view(len(first), -1).all(1)
        if self.mellowmax is None:
            return found.nll.view(len(first), -1).mean(1), matched
        negated = (found.nll - found.lse).view(len(first), -1) * self.mellowmax
        count = torch.tensor(float(len(self.target)), device=self.device)
        return (negated.logsumexp(1) - count.log()) / self.mellowmax, matched


class _Found:
    """Losses and matches of batches, moved off their device when all are there."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._places: list[Tensor] = []
        self._values: list[tuple[Tensor, Tensor]] = []

    def add(self, places: Tensor, values: tuple[Tensor, Tensor]) -> None:
        self._places.append(places)
        self._values.append(values)

    def scores(self) -> Scores:
        losses = torch.full((self._count,), torch.inf)
        matched = torch.zeros(self._count, dtype=torch.bool)
        if self._places:
            at = torch.cat(self._places)
            found = [torch.cat(values) for values in zip(*self._values, strict=True)]
            losses[at], matched[at] = found[0].float().cpu(), found[1].cpu()
        return Scores(losses, matched)


def _first_change(candidates: Tensor, ids: Tensor) -> Tensor:
    """Place [B] of the first token that differs, n where none does."""
    changed = candidates != ids
    return torch.where(changed.any(1), changed.int().argmax(1), candidates.shape[1])
