"""Tensors of models as the engine reads them, rows of tokens mapped to the output's vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gemma_ext.souping.engine.files.checkpoint import Stored
from gemma_ext.souping.engine.files.sources import RowMap, Source
from gemma_ext.souping.recipes.models import Model
from gemma_ext.souping.recipes.peek import read_pieces, read_whole
from gemma_ext.souping.recipes.resolve import Input, Resolved
from gemma_ext.souping.recipes.vocabulary import Rows


class Sources:
    """Sources of M models.

    Args:
        models: of the recipe.
        maps: of each; None to take rows as they are.
    """

    def __init__(self, models: Sequence[Model], maps: Sequence[Rows] | None) -> None:
        self.models, self.maps = models, maps

    def count(self, one: Resolved) -> int:
        """First dimension of an output tensor."""
        origin = one.sources[0]
        if self.maps and self.models[origin.model].layout.is_vocabulary(origin.name):
            return len(self.maps[origin.model].rows)
        return one.info.shape[0]

    def of(self, tensor: Input) -> Source:
        model = self.models[tensor.model]
        if not self.maps or not model.layout.is_vocabulary(tensor.name):
            return model.source(tensor.name)
        rows = self.maps[tensor.model]
        shape = model.layout.shapes[tensor.name]
        if rows.is_identity(tensor.model, shape[0]):
            return model.source(tensor.name)
        stored = [_rows_of(each, tensor.name) for each in self.models]
        own = stored[tensor.model]
        # a model without such a tensor owns no row of it
        present = [index for index, each in enumerate(stored) if each is not None]
        places = torch.full((len(stored) + 1,), -1)
        places[present] = torch.arange(len(present))
        owned = [stored[index] for index in present]
        owners, picks = places[rows.owners], rows.rows
        if rows.mean.any():
            tokens = RowMap(owned, owners[~rows.mean], picks[~rows.mean])
            owned.append(Stored.of(_mean_row(Source(own, rows=tokens))))
            owners[rows.mean, 0] = len(owned) - 1
        mapped = RowMap(owned, owners, picks)
        if len(shape) > 1:
            return Source(own, rows=mapped)
        # an engine maps rows of matrices; a head's bias is small
        return Source(Stored.of(read_whole(Source(own, rows=mapped), mapped.shape).view(-1)))


def _rows_of(model: Model, name: str) -> Stored | None:
    """A model's tensor with a row per token as a matrix, its adapter already added."""
    found = model.layout.find(name)
    if found is None:
        return None
    source, shape = model.source(found), model.layout.shapes[found]
    stored = Stored.of(read_whole(source, shape)) if source.adapt else source.stored
    return stored if len(shape) > 1 else replace(stored, shape=(*shape, 1))


def _mean_row(source: Source) -> Tensor:
    """[1, D] float32."""
    rows, width = source.shape
    total = torch.zeros(width, dtype=torch.float64)
    for (piece,) in read_pieces([source], source.shape):
        total += piece.view(-1, width).double().sum(0)
    return (total / max(rows, 1)).float()[None]
