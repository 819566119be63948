"""Greedy coordinate gradient (arXiv 2307.15043), a drop-in for nanoGCG.

from gemma_ext.papers.continuous_at.evaluation import gcg as nanogcg
result = nanogcg.run(model, tokenizer, "Tell me how.", "Sure, here is how", nanogcg.GCGConfig())

With the same seed, model and tokenizer the candidates and losses are nanoGCG's, with these
exceptions. Draws come from the CPU's stream wherever the model is; nanoGCG's on a card come from
the card's. The gradient is that of the input the model has (nanoGCG embeds by the bare rows, which
is wrong where the embedding scales them, as Gemma's does). Special tokens are never drawn. No
global random state, no chat template and no mode of the model is changed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_ext.files import write_json
from gemma_ext.lm.identity import identity as identity_of
from gemma_ext.papers.continuous_at.evaluation.candidates import banned_ids
from gemma_ext.papers.continuous_at.evaluation.config import (
    GCGConfig,
    GCGResult,
    ProbeSamplingConfig,
)
from gemma_ext.papers.continuous_at.evaluation.search import Search
from gemma_ext.progress import progress_bar

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["GCG", "GCGConfig", "GCGResult", "ProbeSamplingConfig", "run"]

_HOW = ("batch_size", "use_prefix_cache", "verbosity", "num_steps", "probe_sampling_config")


def run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    messages: str | Sequence[Mapping[str, str]],
    target: str,
    config: GCGConfig | None = None,
    resume: str | Path | None = None,
) -> GCGResult:
    """Searches a string that makes the model likely to answer with `target`.

    Args:
        model: causal, of `transformers`, on its device.
        messages: text of a user or a conversation; the string stands at `{optim_str}`, or at the
            end of the last message.
        target: begin of the answer.
        resume: file that every finished step is written to; a search that finds it there goes on
            from it. It may be run again with more `num_steps`.

    Raises:
        TypeError, ValueError: arguments that do not fit, or a file of another search.
        RuntimeError: no candidate is left that has the ids of its text.
    """
    return GCG(model, tokenizer, config).run(messages, target, resume)


class GCG:
    """Searches for one model; what depends on the tokenizer alone is computed once."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: GCGConfig | None = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.config = config or GCGConfig()
        vocabulary = model.get_input_embeddings().weight.shape[0]
        self.banned = banned_ids(tokenizer, vocabulary, self.config.allow_non_ascii)
        allowed = vocabulary - len(self.banned)
        if self.config.topk > allowed:
            raise ValueError(
                f"expected topk to be at most the {allowed} tokens that may be drawn, "
                f"got {self.config.topk}"
            )

    @cached_property
    def _model_identity(self) -> str:
        return identity_of(self.model)

    def run(
        self,
        messages: str | Sequence[Mapping[str, str]],
        target: str,
        resume: str | Path | None = None,
    ) -> GCGResult:
        """As the function of the module."""
        config = self.config
        target = " " + target if config.add_space_before_target else target
        search = Search(self.model, self.tokenizer, config, self.banned, messages, target)
        path = None if resume is None else Path(resume)
        identity = {**_identity(config), "messages": messages, "target": target}
        if path is not None:
            identity["model"] = self._model_identity
            if path.exists():
                search.load(json.loads(path.read_text(encoding="utf-8")), identity, path)
        show = config.verbosity in ("INFO", "DEBUG")
        with progress_bar("GCG", config.num_steps, show) as advance:
            advance(len(search.losses))
            while len(search.losses) < config.num_steps and not search.stopped:
                search.step()
                if path is not None:
                    write_json(path, {"identity": identity, **search.state()})
                advance(1, f"loss {min(search.losses):.3f}")
        return search.result()


def _identity(config: GCGConfig) -> dict[str, Any]:
    """What of a configuration the steps depend on."""
    probe = config.probe_sampling_config
    made = {name: value for name, value in vars(config).items() if name not in _HOW}
    return {**made, "probe": None if probe is None else [probe.r, probe.sampling_factor]}
