"""Text to token ids: where a text begins, and where a prompt ends in what follows it."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from gemma_ext.lm.protocol import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LOOKBACK = 8  # tokens before a completion that its first character may depend on


class Job(NamedTuple):
    """Tokens of which the last are scored.

    Attributes:
        context: what comes before, not empty; the input of the encoder if there is one.
        targets: what is scored, given the context and the targets before.
    """

    context: list[int]
    targets: list[int]


class Text:
    """A tokenizer as the scoring of a model needs it.

    A text begins with the token that the tokenizer puts before every text (<bos> of Gemma), if it
    does and the text does not begin with it already; what it puts behind is left out, except in
    the input of an encoder.

    Args:
        tokenizer: of `transformers`.
        encoder_decoder: whether prompt and continuation go to two halves of a model.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, encoder_decoder: bool) -> None:
        self.tokenizer = tokenizer
        self.encoder_decoder = encoder_decoder
        bos = tokenizer.bos_token_id
        around_nothing = tokenizer("")["input_ids"]
        self._begin = [bos] if bos is not None and bos in around_nothing[:1] else []

    @property
    def prefix(self) -> int:
        """The token that stands for nothing before a text: <bos>, else <eos>.

        Raises:
            ValueError: the tokenizer has neither.
        """
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return token
        raise ValueError("expected a tokenizer with a bos or eos token, got one with neither")

    def render(self, prompt: Prompt) -> str:
        """A prompt as text; messages by the tokenizer's chat template, open for an answer.

        Raises:
            ValueError: messages, and the tokenizer has no template.
        """
        if isinstance(prompt, str):
            return prompt
        if not self.tokenizer.chat_template:
            raise ValueError("expected prompts of text, got messages and no chat template")
        return self.tokenizer.apply_chat_template(
            prompt, tokenize=False, add_generation_prompt=True
        )

    def bare(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts alone; equal texts are encoded once."""
        distinct = list(dict.fromkeys(texts))
        if not distinct:
            return []
        encoded = self.tokenizer(distinct, add_special_tokens=False, verbose=False)["input_ids"]
        ids = dict(zip(distinct, encoded, strict=True))
        return [list(ids[text]) for text in texts]

    def encode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Ids of prompts, none of them empty."""
        texts = [self.render(prompt) for prompt in prompts]
        if self.encoder_decoder and texts:
            encoded = [list(ids) for ids in self.tokenizer(texts, verbose=False)["input_ids"]]
        else:
            encoded = self._opened(texts)
        return [ids or [self.prefix] for ids in encoded]

    def jobs(self, pairs: Sequence[tuple[Prompt, str]]) -> list[Job]:
        """The two parts of each prompt + continuation.

        Tokens are those of the joined text, so that a continuation starts in the way the model has
        seen it start, with or without a space; the split lies behind the last token that the
        prompt alone has too. A token across the joint belongs to the continuation.
        """
        texts = [self.render(prompt) for prompt, _ in pairs]
        if self.encoder_decoder:
            targets = self.bare([continuation for _, continuation in pairs])
            return [Job(*parts) for parts in zip(self.encode(texts), targets, strict=True)]
        joined = [text + more for text, (_, more) in zip(texts, pairs, strict=True)]
        jobs = []
        for before, whole in zip(self._opened(texts), self._opened(joined), strict=True):
            split = shared_length((before, whole))
            jobs.append(Job(whole[:split] or [self.prefix], whole[split:]))
        return jobs

    def windows(self, text: str, length: int) -> list[Job]:
        """A text in parts of at most `length` tokens, each token scored once.

        Every part but the first sees as many tokens before it as fit, at least one.
        """
        (ids,) = self.bare([text])
        first = ids[:length]
        jobs = [Job([self.prefix], first)] if first else []
        for start in range(length, len(ids), length):
            end = min(start + length, len(ids))
            jobs.append(Job(ids[max(0, end - length - 1) : start], ids[start:end]))
        return jobs

    def decode(self, before: Sequence[int], ids: Sequence[int]) -> str:
        """The text that `ids` add to `before`, special tokens left out.

        A tokenizer that drops the space at the start of what it decodes keeps it this way.
        """
        tail = list(before)[-_LOOKBACK:]
        head, whole = self._decoded(tail), self._decoded([*tail, *ids])
        return whole[len(head) :] if whole.startswith(head) else self._decoded(list(ids))

    def describe(self) -> dict[str, Any]:
        """What texts depend on besides their ids, for the name of a cached answer."""
        tokenizer = self.tokenizer
        return {
            "vocabulary": self._vocabulary,
            "special": {name: str(value) for name, value in tokenizer.special_tokens_map.items()},
            "begin": self._begin,
            "template": tokenizer.chat_template,
        }

    @functools.cached_property
    def _vocabulary(self) -> str:
        """Digest of the tokenizer as it is when it is first asked for."""
        core = getattr(self.tokenizer, "backend_tokenizer", None)
        text = core.to_str() if core else repr(sorted(self.tokenizer.get_vocab().items()))
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass")).hexdigest()

    def _opened(self, texts: Sequence[str]) -> list[list[int]]:
        begin = self._begin
        return [ids if ids[: len(begin)] == begin else begin + ids for ids in self.bare(texts)]

    def _decoded(self, ids: list[int]) -> str:
        return self.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


def shared_length(sequences: Sequence[Sequence[int]]) -> int:
    """How many ids all sequences begin with."""
    low, high = min(sequences), max(sequences)  # all others lie between
    if high[: len(low)] == low:
        return len(low)
    return next(place for place, token in enumerate(low) if token != high[place])
