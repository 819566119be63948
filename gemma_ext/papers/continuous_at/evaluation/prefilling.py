"""Prefilling: the answer's beginning is put into the model's mouth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from gemma_ext.lm.protocol import LanguageModel, Sampling
from gemma_ext.papers.continuous_at.evaluation.template import render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def prefilled(tokenizer: PreTrainedTokenizerBase, request: str, beginning: str) -> str:
    """The text of a chat whose answer begins with `beginning` and is to go on."""
    return render(tokenizer, [{"role": "user", "content": request}]) + beginning


def prefill(
    lm: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[str],
    beginnings: Sequence[str],
    sampling: Sampling = Sampling(),  # noqa: B008
) -> list[str]:
    """Answers to requests, each with the beginning that it was given.

    Args:
        lm: completes texts; an endpoint of chats alone cannot.
        tokenizer: of the model, for its chat template.
        beginnings: of each answer.

    Raises:
        ValueError: other than a beginning for each request.
    """
    if len(requests) != len(beginnings):
        raise ValueError(
            f"expected a beginning for each of {len(requests)} requests, got {len(beginnings)}"
        )
    pairs = list(zip(requests, beginnings, strict=True))
    done = lm.generate([prefilled(tokenizer, *pair) for pair in pairs], sampling)
    return [start + one.text for start, one in zip(beginnings, done, strict=True)]
