"""Sequence classifiers of `transformers`: texts to probabilities of labels."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from gemma_ext.extras import require

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class TextClassifier:
    """Probabilities of a sequence classifier's labels, which the model's configuration names.

    A model of one label, or of labels that may hold together (`problem_type`
    "multi_label_classification"), gives the sigmoid of each, any other a softmax.

    Args:
        model: with a sequence-classification head, on its device.
        tokenizer: of the model; texts longer than it or the model's positions lose their end.
        batch: texts at a time, of similar length.

    Example:
        >>> tone = TextClassifier.load("holistic-ai/personality_classifier")
        >>> tone(["I love meeting people!"])[0]["extraversion"]
        0.98
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch: int = 32
    ) -> None:
        if batch < 1:
            raise ValueError(f"batch: expected at least 1, got {batch}")
        self.model, self.tokenizer, self.batch = model.eval(), tokenizer, batch
        names = model.config.id2label
        self.labels = [str(names[place]) for place in range(len(names))]
        kind = getattr(model.config, "problem_type", None)
        self._together = len(self.labels) == 1 or kind == "multi_label_classification"
        # a tokenizer of no length has a huge one
        self._longest = min(_positions(model), tokenizer.model_max_length)

    @classmethod
    def load(cls, path: str | Path, *, device: str = "cpu", batch: int = 32) -> TextClassifier:
        """The classifier of a folder or of a name on the hub."""
        require("a classifier of transformers", "hf", "transformers", "tokenizers", "safetensors")
        import transformers

        model = transformers.AutoModelForSequenceClassification.from_pretrained(path).to(device)
        return cls(model, transformers.AutoTokenizer.from_pretrained(path), batch=batch)

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> list[dict[str, float]]:
        """The probabilities of each text by label."""
        if isinstance(texts, str):
            raise TypeError("texts: expected a sequence of strings, got one string")
        found: dict[int, dict[str, float]] = {}
        order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
        for start in range(0, len(order), self.batch):
            places = order[start : start + self.batch]
            for place, row in zip(
                places, self._probabilities([texts[p] for p in places]), strict=True
            ):
                found[place] = dict(zip(self.labels, row, strict=True))
        return [found[place] for place in range(len(texts))]

    def top(self, texts: Sequence[str]) -> list[str]:
        """The likeliest label of each text."""
        return [max(row, key=row.__getitem__) for row in self(texts)]

    def probability(self, texts: Sequence[str], label: str) -> list[float]:
        """Of one label.

        Raises:
            ValueError: the model has no such label.
        """
        if label not in self.labels:
            raise ValueError(f"label: expected one of {', '.join(self.labels)}, got {label!r}")
        return [row[label] for row in self(texts)]

    def _probabilities(self, texts: list[str]) -> list[list[float]]:
        inputs = self.tokenizer(
            texts, padding=True, truncation=True, max_length=self._longest, return_tensors="pt"
        )
        logits = self.model(**inputs.to(self.model.device)).logits.float()
        return (logits.sigmoid() if self._together else logits.softmax(-1)).tolist()


def _positions(model: nn.Module) -> int:
    """Most tokens that a model has positions for."""
    for name, module in model.named_modules():
        if (
            name.endswith("position_embeddings")
            and getattr(module, "padding_idx", None) is not None
        ):
            # RoBERTa's first position is the one behind the padding's
            return module.num_embeddings - module.padding_idx - 1
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return most if most and most > 0 else sys.maxsize
