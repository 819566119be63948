"""The model behind the server, as far as text is concerned."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from gemma_ext.serve.http.errors import ApiError
from gemma_ext.serve.text import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LARGE = 2**16  # letters or bytes; what has more holds up only what has more
_MESSAGE = 32  # letters that a message costs beyond its own


@dataclass
class Served:
    """Name, tokenizer and ends of the model that is served.

    Attributes:
        name: what clients call the model.
        tokenizer: of `transformers`.
        stop_ids: tokens that end a text of this model.
        chat_template: used in place of the tokenizer's.
        facts: more about the model for `/v1/models`.

    Raises:
        ValueError: a `chat_template` that fails, or says nothing.
    """

    name: str
    tokenizer: PreTrainedTokenizerBase
    stop_ids: tuple[int, ...] = ()
    chat_template: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.created = int(time.time())
        self.vocabulary = Vocabulary(self.tokenizer)
        self._longest = max(map(len, self.tokenizer.get_vocab()), default=1)  # letters of a token
        # leaves the tokenizer without padding and truncation: two threads may use but not set them
        self.ids("", special=False)
        self._small = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")
        self._large = ThreadPoolExecutor(1, thread_name_prefix="tokenizer-large")
        if self.chat_template is not None:
            self._check_template()

    def check_name(self, name: str) -> None:
        """Raises a 404 for another model."""
        if name != self.name:
            message = f"model: expected {self.name!r}, got {name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    async def encode(
        self, prompts: Sequence[str | list[int]], special: bool, most: int
    ) -> list[list[int]]:
        """Ids of prompts.

        Args:
            special: put the tokens around a text that the tokenizer puts there.
            most: tokens of a prompt; longer ones may be refused before they are encoded.

        Raises:
            ApiError: 400, a text without any token, or one of more than `most`.
        """
        for prompt in prompts:
            if isinstance(prompt, str):
                self._refuse_long(len(prompt), most, "prompt")
            else:
                self._refuse(len(prompt), most, "prompt")
        # one by one: other clients come between them
        encoded = [
            await self.apart(partial(self.ids, prompt, special), len(prompt)) for prompt in prompts
        ]
        if not all(encoded):
            raise ApiError(400, "prompt: expected at least one token, got none", param="prompt")
        return encoded

    async def encode_chat(self, messages: list[dict[str, str]], most: int) -> list[int]:
        """Ids of a conversation that the model is to continue; `most` as of `encode`.

        Raises:
            ApiError: 400, there is no chat template or it refuses the messages.
        """
        letters = sum(len(message["content"]) for message in messages)
        self._refuse_long(letters, most, "messages")
        if not (self.chat_template or self.tokenizer.chat_template):
            raise ApiError(400, "messages: this model has no chat template", param="messages")

        def render() -> list[int]:
            text = self._rendered(messages)
            self._refuse_long(len(text), most, "messages")
            return self.ids(text, special=False)  # the template writes them

        try:
            ids = await self.apart(render, letters + _MESSAGE * len(messages))
        except TemplateError as error:
            raise ApiError(400, f"messages: {error}", param="messages") from None
        if not ids:
            raise ApiError(400, "messages: expected at least one token", param="messages")
        return ids

    def _rendered(self, messages: list[dict[str, str]]) -> str:
        return self.tokenizer.apply_chat_template(
            messages,
            chat_template=self.chat_template,
            tokenize=False,
            add_generation_prompt=True,
        )

    def _check_template(self) -> None:
        """Of a message; a template that refuses it in words of its own is in order."""
        wanted = "chat_template: expected a Jinja template of a conversation, got one"
        try:
            text = self._rendered([{"role": "user", "content": "Hello"}])
        except Exception as error:
            if type(error) is TemplateError:  # what `raise_exception` raises
                return
            told = " ".join(str(error).split())
            raise ValueError(f"{wanted} that fails: {type(error).__name__}: {told}") from None
        if not text.strip():
            raise ValueError(f"{wanted} that says nothing")

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def _refuse_long(self, letters: int, most: int, name: str) -> None:
        """By the longest possible tokens of a text, before seconds go into encoding it."""
        self._refuse(-(-letters // self._longest), most, name)

    def _refuse(self, least: int, most: int, name: str) -> None:
        if least > most:
            raise ApiError(
                400,
                f"{name}: the context has {most} tokens, the prompt at least {least}",
                param=name,
                code="context_length_exceeded",
            )

    def ids(self, prompt: str | list[int], special: bool) -> list[int]:
        """Of a prompt; to be called through `apart`."""
        if not isinstance(prompt, str):
            return prompt
        return self.tokenizer(prompt, add_special_tokens=special, verbose=False)["input_ids"]

    async def apart(self, work: Callable[[], Any], size: int) -> Any:
        """What `work` returns, from another thread than the event loop's.

        Args:
            size: of what it works on, about as many letters; what is large waits for itself alone.
        """
        thread = self._large if size > LARGE else self._small
        return await asyncio.get_running_loop().run_in_executor(thread, work)
