"""Where in a conversation the attacked string stands, as token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from gemma_ext.lm.text import Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SLOT = "{optim_str}"


class Parts(NamedTuple):
    """A prompt around the attacked string, and what is to follow it.

    Attributes:
        before: ids up to the string, the beginning of a text included.
        after: ids between the string and the answer.
        target: ids of the answer that is sought, at least one.
    """

    before: list[int]
    after: list[int]
    target: list[int]


def with_slot(messages: str | Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """The messages, with the place of the string at their end where they name none.

    Raises:
        TypeError: no string and no messages.
        ValueError: more than one place.
    """
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if not messages or not all(isinstance(m, Mapping) and "content" in m for m in messages):
        raise TypeError(f"expected messages to be a string or messages, got {messages!r:.80}")
    made = [dict(message) for message in messages]
    count = sum(message["content"].count(SLOT) for message in made)
    if count > 1:
        raise ValueError(f"expected {SLOT} once in the messages, got it {count} times")
    if count == 0:
        made[-1]["content"] += SLOT
    return made


def ask_and_target(
    conversation: Sequence[Mapping[str, str]],
) -> tuple[list[dict[str, str]], str]:
    """Messages and target of a conversation whose last message is the answer that is sought.

    Raises:
        ValueError: fewer than two messages, or the last is not the assistant's.
    """
    if len(conversation) < 2 or conversation[-1].get("role") not in ("assistant", "model"):
        raise ValueError(
            "expected a conversation that ends with the assistant's answer, "
            f"got {conversation!r:.80}"
        )
    *asked, answer = (dict(message) for message in conversation)
    return asked, answer["content"]


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]) -> str:
    """Messages by the tokenizer's chat template, open for an answer; joined where it has none."""
    if not tokenizer.chat_template:
        return "".join(message["content"] for message in messages)
    return Text(tokenizer, False).render(list(messages))


def split(
    tokenizer: PreTrainedTokenizerBase,
    messages: str | Sequence[Mapping[str, str]],
    target: str,
) -> Parts:
    """The parts of a conversation whose string is `{optim_str}`, each tokenized by itself.

    Raises:
        TypeError, ValueError: messages that do not fit, or a target without tokens.
    """
    text = Text(tokenizer, False)
    before, after = render(tokenizer, with_slot(messages)).split(SLOT)
    parts = Parts(text.encode([before])[0], *text.bare([after, target]))
    if not parts.target:
        raise ValueError(f"expected a target of at least one token, got {target!r}")
    return parts
