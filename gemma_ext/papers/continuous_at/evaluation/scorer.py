"""Losses of a target behind many candidates, what they have in common run once.

Candidates of one step of GCG differ from the current string in a token or a few. The pass that
computes the gradient leaves the keys and values of the whole string; candidates are sorted by the
first token they change, and a batch of them runs from there on. The head sees only the rows that
predict a target, and its logits are never held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gemma_ext.lm.huggingface import evaluating
from gemma_ext.nn._defer_head import defer_head
from gemma_ext.nn._deferred_logits import DeferredLogits, LossOptions
from gemma_ext.nn._models import output_head
from gemma_ext.papers.continuous_at.embeddings import Embeddings
from gemma_ext.papers.continuous_at.evaluation.keys import Keys, Start, cache_name, taken
from gemma_ext.papers.continuous_at.evaluation.target_rows import (
    Shortlist,
    joined,
    losses_of,
    shortlist,
)
from gemma_ext.papers.continuous_at.evaluation.template import Parts

Keep = Callable[[Tensor], Tensor]
"""From candidates [B, n] to the mask [B] of those that are to be scored."""

# run at once: larger batches share less of what their candidates have in common
_BATCH_TOKENS = {"cpu": 1536}
_BATCH_TOKENS_OF_A_CARD = 8192
_VOCABULARY_ROWS = 16384  # embedded at a time
_SURELY_RUN = 16  # candidates that the head is run for whatever their bounds
_ROUNDING = 1e-3  # of a bound, in units of the loss


class Scores(NamedTuple):
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
        likely: tokens that the model finds likely where it is to write the target.
    """

    ids: Tensor
    loss: float
    gradient: Tensor
    keys: Keys | None
    likely: Shortlist


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
            rows = self._rows_before(logits, first.to(self.device))
            losses, _ = losses_of(rows, self.target, self.mellowmax)
            (gradient,) = torch.autograd.grad(losses.sum(), string)
        length = len(self.before) + len(ids)
        keys = taken(cache, length) if cache is not None else None
        return Opened(ids, losses.item(), gradient.float(), keys, shortlist(rows, self.target))

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
        found = _Found(len(candidates))
        for at, rows in self._batches(candidates, opened, keep):
            found.add(at, losses_of(rows, self.target, self.mellowmax))
        return found.scores()

    @torch.no_grad()
    def best(self, candidates: Tensor, opened: Opened, keep: Keep | None = None) -> Scores:
        """As `score`, with an infinite loss where a candidate cannot have the lowest one.

        All candidates are scored under the shortlist of the string that they are changes of, which
        bounds their losses from below. The head is run for those with the lowest bounds, and then
        for all whose bound is below the lowest loss so far, so that the lowest loss is that of
        `score`. So are all matches.
        """
        likely = opened.likely
        bounds, parts, order = _Found(len(candidates)), [], []
        for at, rows in self._batches(candidates, opened, keep):
            bounds.add(at, losses_of(likely.of(rows), likely.target, self.mellowmax))
            parts.append(rows)
            order.append(at)
        if not parts:
            return bounds.scores()
        rows, order = joined(parts), torch.cat(order)
        bound, may_match = bounds.scores()
        found = _Found(len(candidates))

        def run(chosen: Tensor) -> None:
            """Of places in `order`."""
            steps = torch.arange(len(self.target))
            at = (chosen[:, None] * len(steps) + steps).flatten().to(self.device)
            found.add(order[chosen], losses_of(rows[at], self.target, self.mellowmax))

        sorted_bound = bound[order]
        first = sorted_bound.argsort(stable=True)[:_SURELY_RUN]
        run(first)
        left = torch.ones(len(order), dtype=torch.bool)
        left[first] = False
        lowest = found.scores().losses.min()
        left &= (sorted_bound < lowest + _ROUNDING) | may_match[order]
        if left.any():
            run(left.nonzero().flatten())
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
                run = self._run(self._start(0), inputs, first)
                found.add(torch.tensor(chosen), losses_of(run, self.target, self.mellowmax))
        return found.scores()

    def _batches(
        self, candidates: Tensor, opened: Opened | None, keep: Keep | None
    ) -> Iterator[tuple[Tensor, DeferredLogits]]:
        """Places of candidates [b] that are run together, and their logits [b * T, V]."""
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
                    yield at, self._run(self._start(begin, opened), inputs, first)

    def _run(self, start: Start, inputs: Tensor, first: Tensor) -> DeferredLogits:
        """Logits [B * T, V] of rows [B, t] that go on at `start`; in halves where memory is short.

        Args:
            first: [B] inputs that predict the first target.
        """
        count = len(inputs)
        rows = torch.cat([start.before.expand(count, -1), inputs], 1)
        try:
            logits = self._forward(start.cache(count), input_ids=rows)
            return self._rows_before(logits, first + len(start.before))
        except torch.OutOfMemoryError:
            if count == 1:
                raise
        halves = zip(inputs.tensor_split(2), first.tensor_split(2), strict=True)
        return joined([self._run(start, *half) for half in halves])

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

    def _rows_before(self, logits: DeferredLogits, first: Tensor) -> DeferredLogits:
        """[B * T, V] of [B, t, V], from `first` [B] on in each row."""
        steps = torch.arange(len(self.target), device=self.device)
        rows = torch.arange(len(first), device=self.device).repeat_interleave(len(steps))
        return logits[rows, (first[:, None] + steps).flatten()]


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
