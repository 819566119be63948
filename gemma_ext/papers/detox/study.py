"""Search, causal pick, sweep: what steering by a dictionary's latents does to a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch

from gemma_ext.lm import HuggingFaceModel, LanguageModel, Sampling
from gemma_ext.lm.causal import padded
from gemma_ext.lm.sweep import generate_at
from gemma_ext.nn.sparse_autoencoder import SparseAutoencoder
from gemma_ext.nn.steering import steer_hook
from gemma_ext.papers.detox.intervention import TIERS, Intervention, latents
from gemma_ext.papers.detox.metrics import Toxicity, distinct, repetition, toxicity
from gemma_ext.papers.detox.scorers import Scorer
from gemma_ext.papers.detox.search import Found, LatentContrast
from gemma_ext.progress import track
from gemma_ext.sae.sites import capture, find_site

ALPHAS = (0.25, 0.5, 1.0, 1.5, 2.0, 2.5)  # of a follow-up; the paper's grid is not known
SAMPLING = Sampling(max_tokens=20, temperature=1.0, top_p=0.9)  # the field's protocol
CONTINUATIONS = 25  # of each prompt, the field's


@dataclass(frozen=True)
class Task:
    """What a model is judged on.

    Attributes:
        prompts: to be continued.
        scorer: toxicity of continuations, without their prompts.
        reference: an unsteered model whose perplexity is the fluency.
        continuations: of each prompt.
        sampling: of a continuation.
        capability: of a model, in [0, 1]; called with the steering on. None for none.
    """

    prompts: tuple[str, ...]
    scorer: Scorer
    reference: LanguageModel
    continuations: int = CONTINUATIONS
    sampling: Sampling = SAMPLING
    capability: Callable[[LanguageModel], float] | None = None


@dataclass(frozen=True)
class Row:
    """One tier at one strength.

    Attributes:
        perplexity: per token of all continuations under the reference.
        distinct, repetition: of words, and of the model's tokens (`metrics`).
    """

    tier: str
    alpha: float
    toxicity: Toxicity
    perplexity: float
    distinct: float
    repetition: float
    capability: float | None


def contrast(
    lm: HuggingFaceModel,
    sae: SparseAutoencoder,
    layer: int,
    toxic: Sequence[str],
    clean: Sequence[str],
    *,
    batch: int = 16,
    max_tokens: int = 128,
) -> LatentContrast:
    """Statistics of all latents over two sets of texts; <bos> is left out.

    Args:
        layer: block whose output the dictionary reads.
        max_tokens: a longer text loses its end.
    """
    return contrasts(lm, [sae], layer, toxic, clean, batch=batch, max_tokens=max_tokens)[0]


@torch.no_grad()
def contrasts(
    lm: HuggingFaceModel,
    dictionaries: Sequence[SparseAutoencoder],
    layer: int,
    toxic: Sequence[str],
    clean: Sequence[str],
    *,
    batch: int = 16,
    max_tokens: int = 128,
) -> list[LatentContrast]:
    """`contrast` of several dictionaries of one layer, whose states are read once."""
    found = [LatentContrast(sae.features, sae.encoder.device) for sae in dictionaries]
    kinds = [True] * len(toxic) + [False] * len(clean)
    read = zip(states(lm, layer, [*toxic, *clean], batch, max_tokens), kinds, strict=True)
    texts = ((rows, kind) for rows, kind in read if len(rows))
    while some := list(islice(texts, batch)):
        rows = torch.cat([rows for rows, _ in some])
        lengths = torch.tensor([len(rows) for rows, _ in some], device=rows.device)
        toxics = torch.tensor([kind for _, kind in some], device=rows.device)
        for sae, each in zip(dictionaries, found, strict=True):
            each.add(sae.encode(rows.to(sae.encoder.dtype)), lengths, toxics)
    return found


def causal_pick(
    lm: HuggingFaceModel,
    sae: SparseAutoencoder,
    plan: Intervention,
    found: Found,
    task: Task,
    *,
    keep: int = 4,
    alpha: float = 1.0,
) -> tuple[Intervention, list[tuple[int, float]]]:
    """The latents that lower toxicity most when they alone are held down.

    A latent that detects toxicity need not cause it, so each candidate is tried on development
    prompts at one strength.

    Returns:
        `plan` with the `keep` best latents that lower it at all, or with the best one where none
        does; and (latent, drop of the mean toxicity) of all candidates.

    Raises:
        ValueError: the model writes nothing toxic as it is.
    """
    base = mean_toxicity(lm, sae, plan, 0.0, task)
    if base == 0:
        raise ValueError("task: expected prompts that lead to toxic text, got none")
    drops = []
    for at in track(range(len(found.latents)), "trying latents", lm.show_progress):
        one = replace(
            plan, latents=latents(found.latents[at : at + 1], found.reference[at : at + 1])
        )
        after = mean_toxicity(lm, sae, one, alpha, task)
        drops.append((int(found.latents[at]), base - after))
    order = sorted(range(len(drops)), key=lambda at: -drops[at][1])
    best = [at for at in order[:keep] if drops[at][1] > 0] or order[:1]
    return replace(plan, latents=latents(found.latents[best], found.reference[best])), drops


def sweep(
    lm: HuggingFaceModel,
    sae: SparseAutoencoder,
    plan: Intervention,
    task: Task,
    *,
    tiers: Sequence[str] = TIERS,
    alphas: Sequence[float] = ALPHAS,
) -> list[Row]:
    """Every tier at every strength, and the model as it is: tier "none", alpha 0.

    Blocks up to the steered one run once for all strengths of a tier, and a prompt has the same
    random numbers everywhere.
    """
    rows = [_row(lm, sae, plan, task, "none", 0.0, *_texts(lm, sae, plan, [0.0], task))]
    for tier in tiers:
        tiered = replace(plan, tier=tier)
        written = _texts(lm, sae, tiered, alphas, task)
        rows += [
            _row(lm, sae, tiered, task, tier, alpha, text)
            for alpha, text in zip(alphas, written, strict=True)
        ]
    return rows


def _row(
    lm: HuggingFaceModel,
    sae: SparseAutoencoder,
    plan: Intervention,
    task: Task,
    tier: str,
    alpha: float,
    texts: list[str],
) -> Row:
    prompts = [prompt for prompt in task.prompts for _ in range(task.continuations)]
    some = [(p, t) for p, t in zip(prompts, texts, strict=True) if t]
    scores = task.reference.logprobs([p for p, _ in some], [t for _, t in some])
    count = sum(len(score.token_logprobs) for score in scores)
    mean = sum(score.logprob for score in scores) / max(count, 1)
    capability = None
    if task.capability is not None:
        factor = plan.steering(sae)
        factor = factor.with_strength(alpha * torch.as_tensor(factor.strength))
        options = {"positions": plan.positions, "skip_first": plan.skip_bos}
        apart = HuggingFaceModel(
            lm.model,
            lm.text.tokenizer,
            max_length=lm.max_length,
            impl=lm.impl,
            share_prompts=plan.tier != "per_input",
            show_progress=lm.show_progress,
        )
        with steer_hook(lm.model, plan.layer, factor, **options):
            capability = task.capability(apart)
    return Row(
        tier,
        alpha,
        toxicity(_grouped(task.scorer(texts), task.continuations)),
        float(torch.tensor(-mean).exp()) if count else float("nan"),
        distinct(texts),
        sum(map(repetition, _tokens(lm, texts))) / len(texts),
        capability,
    )


def _texts(
    lm: HuggingFaceModel,
    sae: SparseAutoencoder,
    plan: Intervention,
    alphas: Sequence[float],
    task: Task,
) -> list[list[str]]:
    """Continuations [alphas][prompts x continuations], a prompt's side by side."""
    prompts = [prompt for prompt in task.prompts for _ in range(task.continuations)]
    found = generate_at(lm, plan.layer, plan.steering(sae), alphas, prompts, task.sampling)
    return [[completion.text for completion in row] for row in found]


def _tokens(lm: HuggingFaceModel, texts: list[str]) -> list[list[int]]:
    return lm.text.tokenizer(texts, add_special_tokens=False).input_ids


def mean_toxicity(
    lm: HuggingFaceModel, sae: SparseAutoencoder, plan: Intervention, alpha: float, task: Task
) -> float:
    """Of all continuations at one strength."""
    (texts,) = _texts(lm, sae, plan, [alpha], task)
    return toxicity(_grouped(task.scorer(texts), task.continuations)).mean


def _grouped(scores: Sequence[float], size: int) -> list[list[float]]:
    return [list(scores[start : start + size]) for start in range(0, len(scores), size)]


def states(
    lm: HuggingFaceModel,
    layer: int,
    texts: Sequence[str],
    batch: int = 16,
    max_tokens: int = 128,
) -> Iterator[torch.Tensor]:
    """Output of a block [T, D] of each text, in order, without the first token (<bos>)."""
    ids = [row[: max_tokens + 1] for row in lm.text.encode(list(texts))]
    site = find_site(lm.model, layer)
    for start in track(range(0, len(ids), batch), "reading states", lm.show_progress):
        rows = ids[start : start + batch]
        table, real = padded(rows, left=False, device=lm.model.device)
        (found,) = capture(lm.model, table, [site], attention_mask=real)
        yield from (found[at, 1 : len(row)] for at, row in enumerate(rows))
