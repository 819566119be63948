"""The vocabulary of the output and, for each model, which of its rows stand for which token.

A model that has a token gives its own row. One that has not gets the base's row, else that of the
only model with the token, else the mean of all that have it. A rule of the recipe names another
row, or zeros, for the models without the token or, with `force`, for all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gemma_ext.souping.recipes.references import ModelReference
from gemma_ext.souping.recipes.tokens import TokenRule

Vocabulary = Mapping[str, int]  # token to id


@dataclass(frozen=True)
class Rows:
    """What the rows of one model become, for V tokens of the output.

    Attributes:
        owners: [V, K] int64, models that a row is the mean of, -1 for none.
        rows: [V, K] int64, which of their rows.
        mean: [V] bool, rows of no token: the mean over all other rows here.
    """

    owners: Tensor
    rows: Tensor
    mean: Tensor

    def is_identity(self, model: int, stored: int) -> bool:
        """Whether these are just the rows of `model`, which has `stored`, in their order."""
        owners, rows = self.owners, self.rows
        return bool(
            len(rows) == stored
            and not self.mean.any()
            and (owners[:, 0] == model).all()
            and (owners[:, 1:] == -1).all()
            and torch.equal(rows[:, 0], torch.arange(stored))
        )


def map_rows(
    out: Vocabulary,
    models: Sequence[ModelReference],
    vocabularies: Sequence[Vocabulary],
    stored: Sequence[int],
    *,
    base: int | None,
    rules: Mapping[str, TokenRule] | None = None,
    pad: int | None = None,
) -> list[Rows]:
    """The rows of each of M models.

    Args:
        out: the output's vocabulary; ids may have holes.
        models: for the models in `rules`.
        vocabularies: of the models.
        stored: rows that each model has; a token whose id is not below it has none there.
        base: which model is the base.
        rules: by token.
        pad: the number of rows is made a multiple of it.

    Returns:
        M maps of V rows: up to the last token that any model has a row for or that has a rule,
        rounded up to `pad`.

    Raises:
        RecipeError: a rule names a model that is not among `models` or a token that it has not.
    """
    rules = rules or {}
    tokens: list[str | None] = [None] * (max(out.values(), default=-1) + 1)
    for token, index in out.items():
        tokens[index] = token
    # models mostly share a vocabulary: looked up once
    ids = {id(each): _ids(tokens, each) for each in vocabularies}
    columns = [ids[id(each)] for each in vocabularies]
    own = torch.stack(columns, dim=1)
    own.masked_fill_(own >= torch.tensor(stored), -1)
    fill_owners, fill_rows = _fill(own, base)
    zero = torch.zeros(len(tokens), dtype=torch.bool)
    forced = torch.zeros(len(tokens), dtype=torch.bool)
    for token, rule in rules.items():
        index = out[token]
        fill_owners[index] = -1
        forced[index] = rule.force
        zero[index] = rule.kind == "zero"
        if rule.kind != "zero":
            model, row = _row_of(rule, token, models, vocabularies, stored)
            fill_owners[index, 0], fill_rows[index, 0] = model, row
    meant = ((own >= 0).any(1) | (fill_owners >= 0).any(1) | zero).nonzero()
    count = int(meant[-1]) + 1 if len(meant) else 0
    size = -(-count // (pad or 1)) * (pad or 1)
    found = []
    for model in range(len(models)):
        mine = (own[:count, model] >= 0) & ~forced[:count]
        owners = torch.full((size, len(models)), -1)
        rows = torch.zeros((size, len(models)), dtype=torch.int64)
        owners[:count] = torch.where(mine[:, None], -1, fill_owners[:count])
        rows[:count] = torch.where(mine[:, None], 0, fill_rows[:count])
        owners[:count, 0] = torch.where(mine, model, owners[:count, 0])
        rows[:count, 0] = torch.where(mine, own[:count, model], rows[:count, 0])
        mean = (owners < 0).all(1)
        mean[:count] &= ~zero[:count]
        width = int((owners >= 0).sum(1).max()) if size else 1
        found.append(Rows(owners[:, : max(width, 1)], rows[:, : max(width, 1)], mean))
    return found


def _ids(tokens: Sequence[str | None], vocabulary: Vocabulary) -> Tensor:
    """[V] ids of the output's tokens in a vocabulary, -1 for none."""
    return torch.tensor([vocabulary.get(token, -1) for token in tokens], dtype=torch.int64)


def _fill(own: Tensor, base: int | None) -> tuple[Tensor, Tensor]:
    """(owners, rows), both [V, M], for models without a token: those that have it moved left."""
    order = (own < 0).to(torch.int8).argsort(dim=1, stable=True)
    rows = own.gather(1, order)
    owners = torch.where(rows >= 0, order, -1)
    if base is not None:
        has = own[:, base] >= 0
        owners[has], rows[has] = -1, 0
        owners[has, 0], rows[has, 0] = base, own[has, base]
    return owners, rows.clamp(min=0)


def _row_of(
    rule: TokenRule,
    token: str,
    models: Sequence[ModelReference],
    vocabularies: Sequence[Vocabulary],
    stored: Sequence[int],
) -> tuple[int, int]:
    if rule.model not in models:
        raise rule.entry.error(f"{rule.model} is none of the models of this merge")
    model = models.index(rule.model)
    wanted = token if rule.token is None else rule.token
    row = wanted if isinstance(wanted, int) else vocabularies[model].get(wanted, -1)
    if not 0 <= row < stored[model]:
        raise rule.entry.error(f"{rule.model} has no row for {wanted!r}")
    return model, row
