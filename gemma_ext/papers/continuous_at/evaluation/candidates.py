"""Changes of a string that GCG tries: which tokens may stand in it, draws, and what is left out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gemma_ext.lm.text import Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_DECODED = 8192  # tokens at a time


def banned_ids(
    tokenizer: PreTrainedTokenizerBase, vocabulary: int, allow_non_ascii: bool
) -> Tensor:
    """int64 ids below `vocabulary` that no attacked string holds.

    Special tokens and ids without a token never do: the text of a string that held one
    would be read as a control of the chat. Without `allow_non_ascii` neither do tokens whose text
    has other characters than printable ASCII.
    """
    banned = torch.ones(vocabulary, dtype=torch.bool)
    known = min(len(tokenizer), vocabulary)
    banned[:known] = False
    if not allow_non_ascii:
        for first in range(0, known, _DECODED):
            ids = range(first, min(first + _DECODED, known))
            texts = tokenizer.batch_decode([[token] for token in ids])
            odd = [not (text.isascii() and text.isprintable()) for text in texts]
            banned[first : first + len(odd)] = torch.tensor(odd)
    added = [token for token, kind in tokenizer.added_tokens_decoder.items() if kind.special]
    for token in {*tokenizer.all_special_ids, *added}:
        if token < vocabulary:
            banned[token] = True
    return banned.nonzero().flatten()


def draw(
    ids: Tensor,
    gradient: Tensor,
    width: int,
    topk: int,
    n_replace: int,
    generator: torch.Generator,
) -> Tensor:
    """Candidates [width, n]: `n_replace` places of `ids` [n], a token of the `topk` best in each.

    Places are drawn uniformly without repetition, tokens uniformly among the `topk` smallest
    entries of `gradient` [n, V] in their row.
    """
    best = (-gradient).topk(topk, dim=1).indices.cpu()
    places = torch.rand((width, len(ids)), generator=generator).argsort()[:, :n_replace]
    picks = torch.randint(0, topk, (width, n_replace, 1), generator=generator)
    tokens = best[places].gather(2, picks).squeeze(2)
    return ids.cpu().repeat(width, 1).scatter_(1, places, tokens)


class RoundTrip:
    """Which candidates are the ids of their own text, so that the text is what was scored.

    Args:
        around: texts before and after the string and their ids, to read the string where it
            stands; None reads it alone.

    Example:
        >>> keep = RoundTrip(tokenizer)
        >>> keep(candidates)  # bool [B]
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        around: tuple[tuple[str, list[int]], tuple[str, list[int]]] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self._text = Text(tokenizer, False)
        self._around = around

    def __call__(self, candidates: Tensor) -> Tensor:
        """bool [B] of ids [B, n]."""
        rows = candidates.tolist()
        texts = self.tokenizer.batch_decode(rows)
        if self._around is None:
            found = self._text.bare(texts)
        else:
            (before, before_ids), (after, after_ids) = self._around
            found = self._text.encode([before + text + after for text in texts])
            rows = [before_ids + row + after_ids for row in rows]
        return torch.tensor([a == b for a, b in zip(rows, found, strict=True)], dtype=torch.bool)
