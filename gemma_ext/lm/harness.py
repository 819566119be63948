"""The model `gemma_ext` of lm-eval: its `hf` model, scored without logits.

    python -m gemma_ext.lm run --model gemma_ext --model_args pretrained=... --tasks ...

takes every command of `lm_eval`, and importing this module makes the name known to
`lm_eval.simple_evaluate`. Loading, tokens, truncation and chat templates are those of lm-eval's
`hf` model, so that its numbers are the same; scores and completions are those of
`HuggingFaceModel`.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch

from gemma_ext.extras import require
from gemma_ext.lm.base import repetitions
from gemma_ext.lm.huggingface import HuggingFaceModel
from gemma_ext.lm.protocol import Sampling
from gemma_ext.lm.text import Job

require("the model of lm-eval", "lm", "lm_eval", "transformers", "accelerate")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.registry import register_model  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # noqa: E402

_SAMPLED = {"temperature", "top_k", "top_p", "do_sample", "until"}
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


@register_model("gemma_ext")
class GemmaExtLM(HFLM):
    """Scores and completes through `HuggingFaceModel`.

    Args:
        batch_tokens, cache, impl, show_progress: as in `HuggingFaceModel`; batches are made of
            tokens, so that `batch_size` says nothing.
        options: of lm-eval's `hf` model.

    Requests to generate with options that `Sampling` does not have (beams, penalties, a token that
    ends thinking) are left to lm-eval's own generation.
    """

    def __init__(
        self,
        pretrained: Any,
        *,
        batch_tokens: int = 4096,
        cache: str | None = None,
        impl: str = "auto",
        show_progress: bool = True,
        batch_size: int | str | None = 1,
        mixed_precision_dtype: str | torch.dtype | None = None,
        **options: Any,
    ) -> None:
        batch_size = 1 if isinstance(batch_size, str) and "auto" in batch_size else batch_size
        super().__init__(
            pretrained,
            batch_size=batch_size,
            mixed_precision_dtype=mixed_precision_dtype,
            **options,
        )
        self.lm = HuggingFaceModel(
            self.model,
            self.tokenizer,
            max_length=self.max_length,
            batch_tokens=int(batch_tokens),
            cache=cache,
            impl=impl,
            show_progress=show_progress and self.rank == 0,
        )

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        jobs = [Job(list(context), list(targets)) for _, context, targets in requests]
        with self._precision():
            scores = self.lm.score_jobs(jobs)
        answers = [(score.logprob, bool(score.greedy)) for score in scores]
        for (texts, *_), answer in zip(requests, answers, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        parts = [
            [
                Job(*make_disjoint_window(window))
                for window in get_rolling_token_windows(
                    self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, 1
                )
            ]
            for request in requests
        ]
        with self._precision():
            scores = iter(self.lm.score_jobs([job for jobs in parts for job in jobs], "reading"))
        totals = [sum(next(scores).logprob for _ in jobs) for jobs in parts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        groups: dict[Sampling | None, list[int]] = {}
        for place, request in enumerate(requests):
            groups.setdefault(self._sampling(request.args[1]), []).append(place)
        found: dict[int, str] = {}
        for sampling, places in groups.items():
            chosen = [requests[place] for place in places]
            if sampling is None:
                texts = super().generate_until(chosen, disable_tqdm)
            else:
                texts = self._generate(chosen, sampling)
            found.update(zip(places, texts, strict=True))
        return [found[place] for place in range(len(requests))]

    def _generate(self, requests: list[Instance], sampling: Sampling) -> list[str]:
        contexts = [self.tok_encode(request.args[0]) for request in requests]
        keys: list[Hashable] = [tuple(ids) for ids in contexts]
        with self._precision():
            made = self.lm.complete_ids(contexts, repetitions(keys, sampling), sampling)
        for request, completion in zip(requests, made, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, completion.text)
        return [completion.text for completion in made]

    def _sampling(self, options: dict[str, Any]) -> Sampling | None:
        """What a request asks for; None if it asks for more than `Sampling` has."""
        if self.think_end_token or set(options) - _SAMPLED - set(_LIMITS):
            return None
        until = options.get("until") or []
        drawn = options.get("do_sample") is not False
        if options.get("do_sample") and not options.get("temperature"):
            return None
        return Sampling(
            max_tokens=next((int(options[n]) for n in _LIMITS if n in options), self.max_gen_toks),
            temperature=float(options.get("temperature") or 0.0) if drawn else 0.0,
            top_k=int(options.get("top_k") or 0),
            top_p=float(options.get("top_p") or 1.0),
            stop=tuple(s for s in ([until] if isinstance(until, str) else until) if s),
        )

    def _precision(self) -> torch.autocast:
        dtype = self.mixed_precision_dtype
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)


def main() -> None:
    """The command line of lm-eval."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
