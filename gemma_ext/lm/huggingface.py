"""Any causal or encoder-decoder model of `transformers`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gemma_ext.extras import require
from gemma_ext.lm.base import Base, lengths
from gemma_ext.lm.causal import Causal
from gemma_ext.lm.encoder_decoder import EncoderDecoder
from gemma_ext.lm.generation import Generator
from gemma_ext.lm.head import Scored
from gemma_ext.lm.identity import identity
from gemma_ext.lm.protocol import Completion, Perplexity, Prompt, Sampling, Score
from gemma_ext.lm.store import Store, answer
from gemma_ext.lm.text import Job, Text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_WINDOW_NAMES = ("n_positions", "max_position_embeddings", "n_ctx")
_WINDOW = 2048  # where neither model nor tokenizer knows


class HuggingFaceModel(Base):
    """The language model protocol over a model of `transformers`.

    Scores are those of the model's own forward in evaluation mode; its [N, V] logits are never
    held (`gemma_ext.lm.head`). Sequences are run longest first in batches of similar length. The
    prompt of several continuations is run once and its keys and values are reused.

    The weights may change between calls; a cache knows a changed model from the unchanged one.

    Args:
        model: causal or encoder-decoder, on its device.
        tokenizer: of the model.
        max_length: inputs at a time; None takes the model's own limit. A longer prompt loses its
            start.
        batch_tokens: padded tokens that are run at once; memory grows with it and with nothing
            else.
        cache: sqlite file (`gemma_ext.lm.Store`) in which every finished batch is kept, so that an
            interrupted or repeated call goes on where it stopped.
        impl: as in `gemma_ext.linear_logprobs`.
        share_prompts: run the prompt of several continuations once; False for a model with a hook
            that remembers sequences from call to call.
        show_progress: draw bars on stderr.

    Raises:
        TypeError: a model without a head that can be scored by, an argument of the wrong type.
        ValueError: `max_length` or `batch_tokens` below 1.

    Example:
        >>> lm = HuggingFaceModel.load("google/gemma-2-2b")
        >>> lm.choices(["The sky is"], [" blue", " green"])[0].best()
        0
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int | None = None,
        batch_tokens: int = 4096,
        cache: str | Path | Store | None = None,
        impl: str = "auto",
        share_prompts: bool = True,
        show_progress: bool = True,
    ) -> None:
        for name, value in (("max_length", max_length), ("batch_tokens", batch_tokens)):
            if value is not None and value < 1:
                raise ValueError(f"expected {name} to be at least 1, got {value}")
        if not hasattr(model, "config"):
            raise TypeError(f"expected a model of transformers, got {type(model).__name__}")
        self.model, self.impl, self.show_progress = model, impl, show_progress
        self.text = Text(tokenizer, bool(model.config.is_encoder_decoder))
        self.max_length = max_length or _window(model, tokenizer)
        self.store = cache if isinstance(cache, Store) or cache is None else Store(cache)
        self._device = model.get_input_embeddings().weight.device
        sizes = (self.max_length, batch_tokens, self._device)
        scored = Scored(model, impl)
        self._scorer: Causal | EncoderDecoder = (
            EncoderDecoder(scored, *sizes)
            if self.text.encoder_decoder
            else Causal(scored, *sizes, share_prompts)
        )
        self._generator = Generator(model, self.text, *sizes)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str | None = None,
        **options: Any,
    ) -> HuggingFaceModel:
        """The model and tokenizer of a folder or of a name on the hub.

        Args:
            dtype: of the weights; "auto" is what they are stored in.
            device: None is the GPU if there is one.
            options: of the constructor.

        Raises:
            ImportError: transformers is missing.
            OSError: there is no such model.
        """
        require("a model of transformers", "lm", "transformers", "tokenizers", "safetensors")
        import transformers

        config = transformers.AutoConfig.from_pretrained(path)
        kind = "Seq2SeqLM" if config.is_encoder_decoder else "CausalLM"
        auto = getattr(transformers, f"AutoModelFor{kind}")
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model = auto.from_pretrained(path, dtype=dtype).to(device)
        return cls(model, transformers.AutoTokenizer.from_pretrained(path), **options)

    def score_jobs(self, jobs: Sequence[Job], title: str = "scoring") -> list[Score]:
        """Scores of token ids; what every other score here is made of."""

        def work(places: list[int]) -> Iterator[list[tuple[int, Score]]]:
            empty = [place for place in places if not jobs[place].targets]
            if empty:
                yield [(place, Score((), True)) for place in empty]
            yield from self._scorer.scores(jobs, [p for p in places if jobs[p].targets])

        with torch.no_grad(), evaluating(self.model):
            return answer(
                [("score", *job) for job in jobs],
                work,
                lambda logprobs, greedy: Score(tuple(logprobs), greedy),
                store=self.store,
                model=self._identity,
                title=title,
                show_progress=self.show_progress,
            )

    def complete_ids(
        self, contexts: Sequence[list[int]], repetitions: Sequence[int], sampling: Sampling
    ) -> list[Completion]:
        """Completions of token ids; `repetitions` gives equal contexts draws of their own."""

        def work(places: list[int]) -> Iterator[list[tuple[int, Completion]]]:
            return self._generator.completions(contexts, repetitions, places, sampling)

        with torch.no_grad(), evaluating(self.model):
            return answer(
                [
                    ("complete", ids, count, vars(sampling))
                    for ids, count in zip(contexts, repetitions, strict=True)
                ],
                work,
                Completion,
                store=self.store,
                model=self._identity,
                title="generating",
                show_progress=self.show_progress,
            )

    def _complete(
        self, prompts: list[Prompt], repetitions: list[int], sampling: Sampling
    ) -> list[Completion]:
        return self.complete_ids(self.text.encode(prompts), repetitions, sampling)

    def _score(self, pairs: list[tuple[Prompt, str]]) -> list[Score]:
        return self.score_jobs(self.text.jobs(pairs))

    def _perplexity(self, texts: list[str]) -> list[Perplexity]:
        parts = [self.text.windows(text, self.max_length) for text in texts]
        scores = iter(self.score_jobs([job for jobs in parts for job in jobs], "reading"))
        found = []
        for text, jobs in zip(texts, parts, strict=True):
            scored = [next(scores) for _ in jobs]
            tokens = sum(len(score.token_logprobs) for score in scored)
            logprob = sum(score.logprob for score in scored)
            found.append(Perplexity(logprob, tokens, *lengths(text)))
        return found

    def _identity(self) -> str:
        kind = self._device.type
        return identity(
            self.model,
            text=self.text.describe(),
            window=self.max_length,
            impl=self.impl,
            autocast=torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout; afterwards every module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _window(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Inputs that the model takes at a time."""
    config = model.config.get_text_config()
    known = (getattr(config, name, None) for name in _WINDOW_NAMES)
    named = next((value for value in known if value), None)
    if named:
        return named
    limit = tokenizer.model_max_length
    return limit if limit < 10**9 else _WINDOW  # transformers writes 1e30 for no limit
