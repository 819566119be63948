"""The model behind the server, as far as text is concerned."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from gemma_ext.serve.http.errors import ApiError
from gemma_ext.serve.text import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class Served:
    """Name, tokenizer and ends of the model that is served.

    Attributes:
        name: what clients call the model.
        tokenizer: of `transformers`; used by one thread at a time where it encodes.
        stop_ids: tokens that end a text of this model.
        chat_template: used in place of the tokenizer's.
        facts: more about the model for `/v1/models`.
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
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")

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
            self._refuse_long(prompt, most, "prompt")
        encoded = await self.apart(lambda: [self.ids(prompt, special) for prompt in prompts])
        if not all(encoded):
            raise ApiError(400, "prompt: expected at least one token, got none", param="prompt")
        return encoded

    async def encode_chat(self, messages: list[dict[str, str]], most: int) -> list[int]:
        """Ids of a conversation that the model is to continue; `most` as of `encode`.

        Raises:
            ApiError: 400, there is no chat template or it refuses the messages.
        """
        self._refuse_long("".join(message["content"] for message in messages), most, "messages")
        if not (self.chat_template or self.tokenizer.chat_template):
            raise ApiError(400, "messages: this model has no chat template", param="messages")

        def render() -> list[int]:
            text = self.tokenizer.apply_chat_template(
                messages,
                chat_template=self.chat_template,
                tokenize=False,
                add_generation_prompt=True,
            )
            return self.ids(text, special=False)  # the template writes them

        try:
            ids = await self.apart(render)
        except TemplateError as error:
            raise ApiError(400, f"messages: {error}", param="messages") from None
        if not ids:
            raise ApiError(400, "messages: expected at least one token", param="messages")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def _refuse_long(self, prompt: str | list[int], most: int, name: str) -> None:
        """Of a text, by the letters of its longest possible tokens: encoding it takes seconds."""
        least = len(prompt)
        if isinstance(prompt, str):
            least = -(-least // self._longest)
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

    async def apart(self, work: Callable[[], Any]) -> Any:
        """What `work` returns, from the thread that alone encodes."""
        # a long text takes longer than an event loop may be held up, and one thread keeps the
        # padding state of a tokenizer from being borrowed twice
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)
