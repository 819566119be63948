"""What a dictionary keeps of the activations, and of the model that goes on with its output."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from gemma_ext.integrations.transformers import patch, unpatch
from gemma_ext.lm.huggingface import evaluating
from gemma_ext.nn.sparse_autoencoder import SparseAutoencoder
from gemma_ext.sae.sites import Site, find_site, replacing
from gemma_ext.sae.stream import Activations


@dataclass(frozen=True)
class Evaluation:
    """Means over the tokens that were looked at.

    Attributes:
        tokens: N.
        fvu: Σ ‖x - x̂‖² over Σ ‖x - mean‖²; 1 - fvu is the explained variance.
        cosine: mean cosine of x and x̂.
        norm_ratio: mean of ‖x̂‖ / ‖x‖.
        bias: relative reconstruction bias Σ ‖x̂‖² / Σ <x, x̂>; below 1 where x̂ is too short.
        l0, l1: active latents and sum of values per token.
        dead: share of the latents that never fired.
        density: share of the tokens that every latent fires on, [F].
        ce, ce_sae, ce_zero: cross-entropy of the model, with x̂ and with 0 in place of x.
        ce_recovered: (ce_zero - ce_sae) / (ce_zero - ce).
    """

    tokens: int
    fvu: float
    cosine: float
    norm_ratio: float
    bias: float
    l0: float
    l1: float
    dead: float
    density: Tensor
    ce: float
    ce_sae: float
    ce_zero: float
    ce_recovered: float

    def numbers(self) -> dict[str, float]:
        """All but the densities."""
        return {name: value for name, value in asdict(self).items() if name != "density"}


@torch.no_grad()
def evaluate(
    sae: SparseAutoencoder,
    model: nn.Module | Sequence[nn.Module],
    site: str | int,
    tokens: Tensor,
    *,
    source: int = 0,
    rows: int = 8,
    skip: int = 1,
    progress: Callable[[int], None] = lambda count: None,
) -> Evaluation:
    """Evaluates a dictionary on one of its sources.

    Args:
        model: of transformers; for a crosscoder one for each source.
        site: where its activations are.
        source: whose activations are rebuilt, and whose model goes on with them.
        tokens: [rows, T] ids.
        rows: rows at once.
        skip: first positions of a row that are left out, and left as they are in the model.
        progress: called with the number of rows done.

    Raises:
        ValueError: a transcoder, whose output has no one place to go to; another number of models
            than sources; no such source.
    """
    models = [model] if isinstance(model, nn.Module) else list(model)
    if sae.transcodes:
        raise ValueError("sae: expected an autoencoder or a crosscoder, got a transcoder")
    if len(models) != sae.sources:
        raise ValueError(
            f"model: expected one for each of {sae.sources} sources, got {len(models)}"
        )
    if not 0 <= source < len(models):
        raise ValueError(f"source: expected one below {len(models)}, got {source}")
    stream = Activations(models, [site] * len(models), tokens, batch=1, buffer=1, skip=skip)
    model, place = models[source], find_site(models[source], site)
    sums = _Sums(sae, source)
    losses = torch.zeros(3, dtype=torch.float64)
    device = model.get_input_embeddings().weight.device
    with evaluating(model), evaluating(sae), cut_cross_entropy(model):
        for ids in tokens.split(rows):
            ids = ids.to(device, torch.int64)
            x = stream.activations(ids).to(sae.encoder.device)
            rebuilt = sums.add(x[:, skip:])
            losses += len(ids) * torch.tensor(_losses(model, place, ids, rebuilt)).double()
            progress(len(ids))
    ce, ce_sae, ce_zero = (losses / len(tokens)).tolist()
    recovered = (ce_zero - ce_sae) / (ce_zero - ce) if ce_zero != ce else float("nan")
    return Evaluation(**sums.means(), ce=ce, ce_sae=ce_sae, ce_zero=ce_zero, ce_recovered=recovered)


def _losses(model: nn.Module, place: Site, ids: Tensor, rebuilt: Tensor) -> list[float]:
    """Of the model as it is, with `rebuilt` in the last positions, and with zeros there."""
    found = [float(model(input_ids=ids, labels=ids).loss)]
    for put in (rebuilt, torch.zeros_like(rebuilt)):

        def change(x: Tensor, put: Tensor = put) -> Tensor:
            return torch.cat([x[:, : -put.shape[1]], put.to(x)], 1)

        with replacing(place, change):
            found.append(float(model(input_ids=ids, labels=ids).loss))
    return found


class _Sums:
    """Running sums in float64."""

    def __init__(self, sae: SparseAutoencoder, source: int) -> None:
        self.sae, self.source, self.tokens = sae, source, 0
        self.sums = torch.zeros(7, dtype=torch.float64)
        self.mean = torch.zeros(sae.width, dtype=torch.float64)
        self.spread = 0.0
        self.fired = torch.zeros(sae.features, dtype=torch.int64)

    def add(self, x: Tensor) -> Tensor:
        """Counts x [..., D] or [..., M, D] in; the reconstruction [..., D] of the source."""
        sae = self.sae
        z, back = sae.standardised(x)
        codes = sae.latents(z).codes
        found = back(sae.decode(codes, z))
        if sae.sources > 1:
            x, found = x[..., self.source, :], found[..., self.source, :]
        x, rebuilt = (y.reshape(-1, sae.width).double().cpu() for y in (x, found))
        dots, norms, own = (x * rebuilt).sum(-1), x.norm(dim=-1), rebuilt.norm(dim=-1)
        active = codes.values != 0
        parts = (
            (x - rebuilt).square().sum(),
            (dots / (norms * own).clamp(min=1e-12)).sum(),
            (own / norms.clamp(min=1e-12)).sum(),
            own.square().sum(),
            dots.sum(),
            active.sum(),
            codes.values.double().sum(),
        )
        self.sums += torch.stack([torch.as_tensor(p, dtype=torch.float64).cpu() for p in parts])
        where = codes.indices[active].long()
        self.fired += torch.bincount(where, minlength=sae.features).cpu()
        count, mean = len(x), x.mean(0)  # spread by Chan's update, stable under a large mean
        moved = mean - self.mean
        total = self.tokens + count
        self.spread += float((x - mean).square().sum()) + float(
            moved.square().sum() * self.tokens * count / total
        )
        self.mean += moved * count / total
        self.tokens = total
        return found

    def means(self) -> dict[str, object]:
        error, cosine, ratio, own, dots, l0, l1 = self.sums.tolist()
        n = self.tokens
        return {
            "tokens": n,
            "fvu": error / self.spread if self.spread else float("nan"),
            "cosine": cosine / n,
            "norm_ratio": ratio / n,
            "bias": own / dots if dots else float("nan"),
            "l0": l0 / n,
            "l1": l1 / n,
            "dead": float((self.fired == 0).double().mean()),
            "density": self.fired.double() / n,
        }


@contextmanager
def cut_cross_entropy(model: nn.Module) -> Iterator[None]:
    """The model's losses without its logits, where its architecture is known; then as before."""
    if hasattr(model, "_gemma_ext_patch"):
        yield
        return
    try:
        patch(model, train_only=False)
    except (TypeError, ValueError):
        yield
        return
    try:
        yield
    finally:
        unpatch(model)
