"""Genetic search over whole jailbreak prompts, as AutoDAN (arXiv 2310.04451) does it.

The fitness of a prompt is the loss of the target behind it, by the same scorer as GCG's. Parents
are drawn by their fitness, cross at sentence boundaries, and a function rewrites some of the
children, such as a language model asked to say the same in other words. The words' momentum of the
paper's hierarchical variant is not here.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from gemma_ext.lm.protocol import LanguageModel, Sampling
from gemma_ext.lm.text import Text
from gemma_ext.papers.continuous_at.evaluation.scorer import TargetScorer
from gemma_ext.papers.continuous_at.evaluation.template import split
from gemma_ext.progress import progress_bar

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Mutate = Callable[[Sequence[str]], list[str]]
"""Texts in other words."""

REPHRASE = "Say the following in other words, in the same language and about as long. Write only \
the new text.\n\n{text}"
_SENTENCE = re.compile(r"(?<=[.!?\n])\s+")


@dataclass(frozen=True)
class GeneticConfig:
    """Settings of the search; defaults are those of AutoDAN's code.

    Attributes:
        steps: generations.
        population: prompts of each.
        elites: share that goes on unchanged.
        crossover: probability that two parents cross.
        breaks: places at which they change over, at most.
        mutation: probability that a child is rewritten.
        seed: of all draws.

    Raises:
        ValueError: a value that does not fit.
    """

    steps: int = 100
    population: int = 64
    elites: float = 0.05
    crossover: float = 0.5
    breaks: int = 5
    mutation: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("steps", 0), ("population", 2), ("breaks", 1)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"expected {name} to be at least {least}, got {getattr(self, name)}"
                )
        for name in ("elites", "crossover", "mutation"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"expected {name} in [0, 1], got {getattr(self, name)}")


@dataclass(frozen=True)
class GeneticResult:
    """What was found.

    Attributes:
        best_loss, best_string: lowest loss of a prompt, and the prompt.
        losses: lowest of each generation, the first ones included.
    """

    best_loss: float
    best_string: str
    losses: list[float]


class Rephrase:
    """A language model that says texts in other words."""

    def __init__(
        self,
        lm: LanguageModel,
        sampling: Sampling = Sampling(temperature=1.0),  # noqa: B008
        chat: bool = True,
    ) -> None:
        self.lm, self.sampling, self.chat = lm, sampling, chat

    def __call__(self, texts: Sequence[str]) -> list[str]:
        """A text that comes back empty stays as it was."""
        asked = [REPHRASE.replace("{text}", text) for text in texts]
        prompts = [[{"role": "user", "content": text}] if self.chat else text for text in asked]
        written = self.lm.generate(prompts, self.sampling)
        return [one.text.strip() or text for one, text in zip(written, texts, strict=True)]


def search(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    messages: str | Sequence[Mapping[str, str]],
    target: str,
    first: Sequence[str],
    mutate: Mutate,
    config: GeneticConfig | None = None,
    show_progress: bool = True,
) -> GeneticResult:
    """Searches a text at `{optim_str}` that makes the model likely to answer with `target`.

    Args:
        first: prompts to begin with, at least two that differ; they are repeated, rewritten, to
            fill the population.
        mutate: texts in other words.

    Raises:
        ValueError: fewer than two prompts.
    """
    config = config or GeneticConfig()
    first = list(dict.fromkeys(text for text in first if text.strip()))
    if len(first) < 2:
        raise ValueError(f"first: expected at least two prompts, got {len(first)}")
    scorer = TargetScorer(model, split(tokenizer, messages, target))
    text = Text(tokenizer, False)
    known: dict[str, float] = {}

    def losses_of(texts: Sequence[str]) -> list[float]:
        fresh = [one for one in dict.fromkeys(texts) if one not in known]
        found = scorer.score_lists(text.bare(fresh)).losses.tolist()
        known.update(zip(fresh, found, strict=True))
        return [known[one] for one in texts]

    draw = random.Random(config.seed)
    more = [first[i % len(first)] for i in range(config.population - len(first))]
    population = [*first, *(mutate(more) if more else [])][: config.population]
    history = []
    with progress_bar("genetic search", config.steps, show_progress) as advance:
        losses = losses_of(population)
        history.append(min(losses))
        for _ in range(config.steps):
            population = _next(population, losses, config, mutate, draw)
            losses = losses_of(population)
            history.append(min(losses))
            advance(1, f"loss {min(known.values()):.3f}")
    best = min(known, key=known.__getitem__)
    return GeneticResult(known[best], best, history)


def _next(
    population: Sequence[str],
    losses: Sequence[float],
    config: GeneticConfig,
    mutate: Mutate,
    draw: random.Random,
) -> list[str]:
    """Elites, and children of parents drawn with probability softmax(-loss)."""
    order = sorted(range(len(population)), key=losses.__getitem__)
    elites = [population[place] for place in order[: max(1, round(config.elites * len(order)))]]
    weights = torch.tensor(losses).neg().softmax(0).tolist()
    children: list[str] = []
    while len(children) < config.population - len(elites):
        one, other = draw.choices(population, weights, k=2)
        if draw.random() < config.crossover:
            one, other = cross(one, other, config.breaks, draw)
        children += [one, other]
    children = children[: config.population - len(elites)]
    chosen = [place for place in range(len(children)) if draw.random() < config.mutation]
    if chosen:
        for place, text in zip(chosen, mutate([children[p] for p in chosen]), strict=True):
            children[place] = text
    return elites + children


def cross(one: str, other: str, breaks: int, draw: random.Random) -> tuple[str, str]:
    """Two texts with sentences exchanged between up to `breaks` drawn places."""
    a, b = _SENTENCE.split(one), _SENTENCE.split(other)
    shorter = min(len(a), len(b))
    if shorter < 2:
        return one, other
    cuts = sorted(draw.sample(range(1, shorter), min(breaks, shorter - 1)))
    first, second, last = [], [], 0
    for cut in (*cuts, max(len(a), len(b))):
        parts = a[last:cut], b[last:cut]
        if draw.random() < 0.5:
            parts = parts[::-1]
        first += parts[0]
        second += parts[1]
        last = cut
    return " ".join(first), " ".join(second)
