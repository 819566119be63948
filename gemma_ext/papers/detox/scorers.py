"""How toxic a text is, in [0, 1]: a classifier, or a list of words where there is none."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from gemma_ext.extras import require

Scorer = Callable[[Sequence[str]], list[float]]
"""Texts to scores in [0, 1]."""


class Lexicon:
    """1 for a text with a word of the list, else 0; whole words, whatever their case.

    A list sees words and not what is meant: it is for planted styles and for machines without a
    classifier, not for claims about people.
    """

    def __init__(self, words: Iterable[str]) -> None:
        self.words = sorted({word.casefold() for word in words if word.strip()})
        if not self.words:
            raise ValueError("words: expected at least one, got none")
        any_of = "|".join(re.escape(word) for word in self.words)
        self._pattern = re.compile(rf"(?<!\w)(?:{any_of})(?!\w)")

    def __call__(self, texts: Sequence[str]) -> list[float]:
        return [float(bool(self._pattern.search(text.casefold()))) for text in texts]


class Detoxify:
    """The classifier of the `detoxify` package (Apache-2.0), by default that of the paper.

    It leans on profanity; report a second judge beside it.

    Args:
        kind: "original", "unbiased" or "multilingual".
        label: of its outputs.
    """

    def __init__(
        self,
        kind: str = "original",
        label: str = "toxicity",
        *,
        device: str = "cpu",
        batch: int = 64,
    ) -> None:
        require("the Detoxify classifier", "detox", "detoxify")
        from detoxify import Detoxify as Model

        self.label, self.batch, self._model = label, batch, Model(kind, device=device)

    def __call__(self, texts: Sequence[str]) -> list[float]:
        scores: list[float] = []
        for start in range(0, len(texts), self.batch):
            found: dict[str, Any] = self._model.predict(list(texts[start : start + self.batch]))
            if self.label not in found:
                raise ValueError(f"label: expected one of {sorted(found)}, got {self.label!r}")
            scores += [float(score) for score in found[self.label]]
        return scores
