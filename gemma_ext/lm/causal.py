"""Scoring by a decoder alone."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gemma_ext.lm.head import Scored, read
from gemma_ext.lm.plan import Family, Row, buckets, plan
from gemma_ext.lm.protocol import Score
from gemma_ext.lm.text import Job

_KEYS_PER_TOKEN = 2  # of a batch: the keys and values that the options of its prompts may hold


class Causal:
    """Scores jobs, the prefix of a prompt's options run once.

    Args:
        forward: of the model.
        window: inputs that the model takes.
        batch_tokens: padded inputs of a batch.
        device: of the inputs.
        share: False runs every option with its prompt.
    """

    def __init__(
        self,
        forward: Scored,
        window: int,
        batch_tokens: int,
        device: torch.device,
        share: bool = True,
    ) -> None:
        self.forward, self.window = forward, window
        self.batch_tokens, self.device, self.share = batch_tokens, device, share
        taken = inspect.signature(forward.model.forward).parameters
        self._cache_name = next((n for n in ("cache", "past_key_values") if n in taken), None)
        self._takes_positions = "position_ids" in taken

    def scores(
        self, jobs: Sequence[Job], places: Sequence[int]
    ) -> Iterator[list[tuple[int, Score]]]:
        """Scores of the jobs at `places`, batch by batch."""
        made = plan(jobs, places, self.window, share=self._shares())
        shared = [family for family in made if family.prefix]
        for group in buckets([len(family.prefix) for family in shared], self.batch_tokens):
            yield from self._families([shared[place] for place in group])
        rows = [family.rows[0] for family in made if not family.prefix]
        for group in buckets([len(row.inputs) for row in rows], self.batch_tokens):
            yield self._rows([rows[place] for place in group])

    def _rows(self, rows: list[Row]) -> list[tuple[int, Score]]:
        # padding on the right: nothing before it looks at it
        ids, _ = self._padded([row.inputs for row in rows], left=False)
        return read(self.forward(input_ids=ids, use_cache=False).logits, rows)

    def _families(self, families: list[Family]) -> Iterator[list[tuple[int, Score]]]:
        # padding on the left: a sliding layer keeps the last keys, and the options go on from them
        ids, real = self._padded([family.prefix for family in families], left=True)
        positions = (real.cumsum(1) - 1).clamp(min=0)
        output = self.forward(**self._inputs(ids, real, positions), use_cache=True)
        keys = getattr(output, self._cache_name)
        width = ids.shape[1]
        rows = [(place, row) for place, family in enumerate(families) for row in family.rows]
        lengths = [width + len(row.inputs) for _, row in rows]
        for group in buckets(lengths, _KEYS_PER_TOKEN * self.batch_tokens):
            owners = torch.tensor([rows[place][0] for place in group], device=self.device)
            yield self._follow([rows[place][1] for place in group], owners, real, keys)

    def _follow(
        self, rows: list[Row], owners: Tensor, real: Tensor, keys: Any
    ) -> list[tuple[int, Score]]:
        ids, follows = self._padded([row.inputs for row in rows], left=False)
        before = real[owners]
        steps = torch.arange(ids.shape[1], device=self.device)
        inputs = self._inputs(
            ids, torch.cat([before, follows], 1), before.sum(1, keepdim=True) + steps
        )
        inputs[self._cache_name] = _repeated(keys, owners)
        return read(self.forward(**inputs, use_cache=True).logits, rows)

    def _inputs(self, ids: Tensor, real: Tensor, positions: Tensor) -> dict[str, Any]:
        inputs = {"input_ids": ids, "attention_mask": real}
        return {**inputs, "position_ids": positions} if self._takes_positions else inputs

    def _padded(self, sequences: list[list[int]], left: bool) -> tuple[Tensor, Tensor]:
        return padded(sequences, left=left, device=self.device)

    def _shares(self) -> bool:
        return self.share and self._cache_name is not None and _keeps_plain_keys(self.forward.model)


def padded(
    sequences: list[list[int]], *, left: bool, device: torch.device
) -> tuple[Tensor, Tensor]:
    """ids [B, T] and the mask of what is no padding [B, T], both int64."""
    width = max(map(len, sequences))
    ids = torch.zeros(len(sequences), width, dtype=torch.int64)
    real = torch.zeros_like(ids)
    for row, mask, sequence in zip(ids, real, sequences, strict=True):
        where = slice(width - len(sequence), width) if left else slice(len(sequence))
        row[where] = torch.tensor(sequence)
        mask[where] = 1
    return ids.to(device), real.to(device)


def _keeps_plain_keys(model: Any) -> bool:
    """Whether a new cache of the model holds nothing but keys and values, layer by layer."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    if model._is_stateful:
        return False
    layers = DynamicCache(config=model.config).layers
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def _repeated(keys: Any, owners: Tensor) -> Any:
    """A cache whose row i is row owners[i] of `keys`, which stays as it is."""
    grown = copy.copy(keys)
    # copies of the layers are enough: an update replaces their tensors
    grown.layers = [copy.copy(layer) for layer in keys.layers]
    grown.batch_select_indices(owners)
    return grown
