"""Probe sampling (arXiv 2403.01251): a draft model chooses what the model scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gemma_ext.extras import require
from gemma_ext.lm.text import Text
from gemma_ext.papers.continuous_at.evaluation.config import ProbeSamplingConfig
from gemma_ext.papers.continuous_at.evaluation.scorer import Opened, Scores, TargetScorer
from gemma_ext.papers.continuous_at.evaluation.template import split

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Probe:
    """Scores few of many candidates by a model, as many as its draft is to be trusted.

    Of B candidates a random B / sampling_factor are scored by both; with rho the Spearman
    correlation of their losses, the (1 - rho) / 2 * B / r candidates that the draft likes best are
    scored by the model too.
    """

    def __init__(
        self,
        config: ProbeSamplingConfig,
        tokenizer: PreTrainedTokenizerBase,
        messages: str | Sequence[Mapping[str, str]],
        target: str,
        scorer: TargetScorer,
    ) -> None:
        require("probe sampling", "sae", "scipy")
        self.config, self.tokenizer, self.scorer = config, tokenizer, scorer
        self._text = Text(config.draft_tokenizer, False)
        self._draft = TargetScorer(
            config.draft_model,
            split(config.draft_tokenizer, messages, target),
            batch_size=scorer.batch_size,
            mellowmax=scorer.mellowmax,
        )

    def score(self, candidates: Tensor, opened: Opened, generator: torch.Generator) -> Scores:
        """Of candidates [B, n]; infinite where the model was not asked."""
        from scipy.stats import spearmanr

        count = len(candidates)
        texts = self.tokenizer.batch_decode(candidates)
        drafted = self._draft.score_lists(self._text.bare(texts)).losses
        probes = torch.randperm(count, generator=generator)
        probes = probes[: max(1, count // self.config.sampling_factor)]
        losses = torch.full((count,), torch.inf)
        matched = torch.zeros(count, dtype=torch.bool)

        def ask(places: Tensor) -> None:
            scores = self.scorer.score(candidates[places], opened)
            losses[places], matched[places] = scores.losses, scores.matched

        ask(probes)
        agreement = spearmanr(losses[probes], drafted[probes]).statistic if len(probes) > 1 else 0.0
        distrust = 0.5 if math.isnan(agreement) else (1 - agreement) / 2
        ask(drafted.topk(max(1, int(distrust * count / self.config.r)), largest=False).indices)
        return Scores(losses, matched)
