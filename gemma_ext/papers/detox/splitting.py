"""Feature splitting: the wider the dictionary, the less of a concept one latent holds.

For each width, how many of the toxic sequences the best latent fires on at all, how many the best
R do together, and what holding down one latent or R of them does to toxicity.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gemma_ext.lm import HuggingFaceModel
from gemma_ext.nn.sparse_autoencoder import SparseAutoencoder
from gemma_ext.papers.detox.intervention import Intervention, Latent, latents
from gemma_ext.papers.detox.search import Found
from gemma_ext.papers.detox.study import Task, contrasts, mean_toxicity, states


@dataclass(frozen=True)
class Split:
    """One width.

    Attributes:
        features: F.
        one, several: share of the toxic sequences that the best latent, or any of the best R, fires
            on.
        clean: share of the clean sequences that any of the best R fires on.
        toxicity_one, toxicity_several: mean toxicity with one or R latents held down, per token.
        before: of the model as it is.
    """

    features: int
    one: float
    several: float
    clean: float
    before: float
    toxicity_one: float
    toxicity_several: float


def splitting(
    lm: HuggingFaceModel,
    dictionaries: Mapping[int, SparseAutoencoder],
    plan: Intervention,
    toxic: Sequence[str],
    clean: Sequence[str],
    task: Task,
    *,
    count: int = 8,
    alpha: float = 1.0,
) -> list[Split]:
    """The same search and the same steering with dictionaries of several widths.

    Args:
        dictionaries: by F, of the same activation.
        count: R.
        alpha: strength, in units of each latent's largest activation.
    """
    listed = sorted(dictionaries.items())
    every = [sae for _, sae in listed]
    found = [each.best(count) for each in contrasts(lm, every, plan.layer, toxic, clean)]
    chosen = [each.latents for each in found]
    fires = _fires(lm, every, plan.layer, [*toxic, *clean], chosen)
    # the plan's own latents are of one width
    plan = replace(plan, latents=_held(found[0], 1), tier="per_token")
    before = mean_toxicity(lm, every[0], plan, 0.0, task)
    rows = []
    for (features, sae), best, hit in zip(listed, found, fires, strict=True):
        levels = []
        for some in (1, count):
            tried = replace(plan, latents=_held(best, some))
            levels.append(mean_toxicity(lm, sae, tried, alpha, task))
        of_toxic, of_clean = hit[: len(toxic)], hit[len(toxic) :]
        rows.append(
            Split(
                features,
                float(of_toxic[:, 0].double().mean()),
                float(of_toxic.any(1).double().mean()),
                float(of_clean.any(1).double().mean()),
                before,
                *levels,
            )
        )
    return rows


def _held(best: Found, count: int) -> tuple[Latent, ...]:
    """The best of them, each held down by its largest activation."""
    return latents(best.latents[:count], best.reference[:count])


@torch.no_grad()
def _fires(
    lm: HuggingFaceModel,
    dictionaries: Sequence[SparseAutoencoder],
    layer: int,
    texts: Sequence[str],
    chosen: Sequence[Tensor],
) -> list[Tensor]:
    """bool [texts, R] of each dictionary: whether a latent fires on any token but <bos>."""
    fires = [torch.zeros(len(texts), len(some), dtype=torch.bool) for some in chosen]
    for at, rows in enumerate(states(lm, layer, texts)):
        if not len(rows):
            continue
        for sae, some, hit in zip(dictionaries, chosen, fires, strict=True):
            codes = sae.encode(rows.to(sae.encoder.dtype))
            active = codes.indices[codes.mask & (codes.values > 0)].long()
            hit[at] = torch.isin(some, active).cpu()
    return fires
