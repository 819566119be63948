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
from gemma_ext.papers.detox.intervention import Intervention, latents
from gemma_ext.papers.detox.study import Task, contrast, states, sweep


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
    rows = []
    for features, sae in sorted(dictionaries.items()):
        found = contrast(lm, sae, plan.layer, toxic, clean).best(count)
        fires = [_fires(lm, sae, plan.layer, texts, found.latents) for texts in (toxic, clean)]
        levels = []
        for some in (1, count):
            chosen = latents(found.latents[:some], found.reference[:some])
            tried = replace(plan, latents=chosen, tier="per_token")
            levels.append(sweep(lm, sae, tried, task, tiers=["per_token"], alphas=[alpha]))
        rows.append(
            Split(
                features,
                float(fires[0][:, 0].double().mean()),
                float(fires[0].any(1).double().mean()),
                float(fires[1].any(1).double().mean()),
                levels[0][0].toxicity.mean,
                levels[0][1].toxicity.mean,
                levels[1][1].toxicity.mean,
            )
        )
    return rows


@torch.no_grad()
def _fires(
    lm: HuggingFaceModel, sae: SparseAutoencoder, layer: int, texts: Sequence[str], chosen: Tensor
) -> Tensor:
    """bool [texts, R]: whether a latent fires on any token but <bos>."""
    place = torch.full((sae.features,), -1, dtype=torch.long, device=chosen.device)
    place[chosen] = torch.arange(len(chosen), device=chosen.device)
    fires = torch.zeros(len(texts), len(chosen), dtype=torch.bool)
    for at, rows in enumerate(states(lm, layer, texts)):
        if len(rows):
            codes = sae.encode(rows.to(sae.encoder.dtype))
            seen = place[codes.indices[codes.mask & (codes.values > 0)].long()]
            fires[at, seen[seen >= 0].cpu()] = True
    return fires
