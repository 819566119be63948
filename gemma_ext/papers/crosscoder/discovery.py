"""What one crosscoder says about two models: tags, ratios, and which chat-only latents are real."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from gemma_ext.nn.sparse_autoencoder import SparseAutoencoder
from gemma_ext.ops import sae
from gemma_ext.papers.crosscoder.causal import factors
from gemma_ext.papers.crosscoder.norms import CHAT, TAGS, difference, tags
from gemma_ext.papers.crosscoder.scaling import Betas, LatentScaling


@dataclass(frozen=True)
class Discovery:
    """All latents of a crosscoder on held-out activations.

    Attributes:
        delta: [F] relative norm difference, in the models' units.
        tags: [F] places in `TAGS`; "other" where dead.
        betas: of Latent Scaling; its units are the crosscoder's.
        explained: [M] fraction of variance explained in each model.
        active: mean L0 with the inference threshold.
        tokens: number of tokens.
    """

    delta: Tensor
    tags: Tensor
    betas: Betas
    explained: Tensor
    active: float
    tokens: int

    @property
    def alive(self) -> Tensor:
        """[F] bool: active at least once."""
        return self.betas.fired > 0

    def chat_only(self) -> Tensor:
        """[F] bool: by the norms."""
        return (self.tags == TAGS.index("chat only")) & self.alive

    def flagged(self) -> Tensor:
        """[F] bool: chat only by the norms, and not by the ratios."""
        return self.chat_only() & ~self.betas.specific()

    def shared_bound(self, share: float = 0.05) -> float:
        """The nu_reconstruction that `share` of the shared latents are below."""
        nu = self.betas.nu_reconstruction[(self.tags == TAGS.index("shared")) & self.alive]
        return float(nu.quantile(share)) if nu.numel() else float("nan")

    def record(self) -> dict[str, float]:
        """The numbers that stand in tables."""
        chat = self.chat_only()
        overlap = self.betas.nu_reconstruction[chat] >= self.shared_bound()
        counts = {name: int(((self.tags == n) & self.alive).sum()) for n, name in enumerate(TAGS)}
        return {
            **counts,
            "alive": int(self.alive.sum()),
            "dead": int((~self.alive).sum()),
            "flagged": int(self.flagged().sum()),
            "overlap": float(overlap.double().mean()) if overlap.numel() else 0.0,
            "explained": float(self.explained.mean()),
            "active": self.active,
        }


@torch.no_grad()
def discover(
    crosscoder: SparseAutoencoder, batches: Iterable[Tensor], directions: Tensor | None = None
) -> Discovery:
    """Latent Scaling of all latents, in one pass.

    Args:
        crosscoder: in evaluation mode, so that codes are those of the inference threshold.
        batches: [N, 2, D] held-out activations.
        directions: as of `LatentScaling`.

    Raises:
        ValueError: not two sources, training mode, or no tokens.
    """
    if crosscoder.sources != 2 or crosscoder.training:
        state = "training" if crosscoder.training else "evaluation"
        raise ValueError(
            f"crosscoder: expected two sources in evaluation mode, "
            f"got {crosscoder.sources} in {state} mode"
        )
    decoder = crosscoder.decoder.detach().view(crosscoder.features, 2, -1)
    scaling = LatentScaling(decoder, directions)
    tokens = entries = 0
    sums = squares = torch.zeros(())
    error = torch.zeros(2, dtype=torch.float64, device=decoder.device)
    for x in batches:
        z, _ = crosscoder.standardised(x)
        codes = crosscoder.latents(z).codes
        z, rebuilt = crosscoder.split(z), crosscoder.decode(codes)
        scaling.add(codes, z, rebuilt)
        tokens += len(x)
        entries += int((codes.values[codes.mask] != 0).sum())
        error += (z - rebuilt).double().square().sum((0, 2))
        sums = sums + z.double().sum(0)
        squares = squares + z.double().square().sum(0)
    if tokens == 0:
        raise ValueError("batches: expected at least one token, got none")
    variance = (squares - sums.square() / tokens).sum(-1)
    betas = scaling.betas()
    delta = difference((decoder / factors(crosscoder)).norm(dim=-1))
    found = torch.where(betas.fired > 0, tags(delta), TAGS.index("other"))
    return Discovery(delta, found, betas, 1 - error / variance, entries / tokens, tokens)


def random_directions(decoder: Tensor, seed: int = 0) -> Tensor:
    """[F, D] Gaussian directions as long as the chat decoders of [F, M, D]: the paper's control."""
    chat = decoder[:, CHAT]
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(chat.shape, generator=generator).to(chat)
    return torch.nn.functional.normalize(drawn, dim=1) * chat.norm(dim=1, keepdim=True)


def leaning(found: Discovery, count: int) -> Tensor:
    """The `count` live latents that lean most to chat by their norms, most first [J]."""
    delta = found.delta.nan_to_num(-1.0)
    order = torch.where(found.alive, delta, -2.0).argsort(descending=True, stable=True)
    return order[: min(count, int(found.alive.sum()))]


def halves(found: Discovery, count: int) -> dict[str, Tensor]:
    """Masks [F]: better and worse half of the `count` leaning latents, by norms and by ratios.

    Latents whose ratios are not plausible are in no half by ratios.
    """
    chosen = leaning(found, count)
    by_ratio = chosen[found.betas.plausible()[chosen]]
    by_ratio = by_ratio[found.betas.rank_sum(by_ratio).argsort()]
    made = {}
    for name, order in (("norms", chosen), ("ratios", by_ratio)):
        for side, part in zip(("top", "bottom"), order.tensor_split(2), strict=True):
            mask = torch.zeros(found.delta.numel(), dtype=torch.bool, device=order.device)
            mask[part] = True
            made[f"{side} half by {name}"] = mask
    return made


@torch.no_grad()
def mass_by_role(
    crosscoder: SparseAutoencoder, batches: Iterable[Tensor], roles: Iterable[Tensor], count: int
) -> Tensor:
    """Share of a latent's activation on tokens of each role, [F, count]; 0 of dead latents.

    Args:
        batches: [N, 2, D]; roles: [N] int64 in [0, count) of the same tokens.
    """
    total = torch.zeros(crosscoder.features, count, device=crosscoder.decoder.device)
    for x, role in zip(batches, roles, strict=True):
        rows = torch.nn.functional.one_hot(role, count).to(x)
        total += sae.scatter(crosscoder.encode(x), rows)[0]
    return total / total.sum(1, keepdim=True).clamp(min=1e-30)


@torch.no_grad()
def recall_of_role(
    crosscoder: SparseAutoencoder, batches: Iterable[Tensor], roles: Iterable[Tensor], role: int
) -> Tensor:
    """Share of the tokens of a role on which a latent is active, [F]; 0 without such tokens."""
    hits = torch.zeros(crosscoder.features, device=crosscoder.decoder.device)
    count = 0
    for x, part in zip(batches, roles, strict=True):
        here = x[part == role]
        codes = crosscoder.encode(here)
        active = codes.indices[codes.mask & (codes.values > 0)].long()
        hits += torch.bincount(active, minlength=crosscoder.features)
        count += len(here)
    return hits / max(1, count)


def contrast_delta(x: Tensor, here: Tensor, there: Tensor, tokens: Tensor) -> float:
    """Delta of a perfect detector: of the mean states on some tokens less those on others.

    What a fine-tune has planted is the chat model's own, as far as norms can say, where this is
    near one; near a half the base tells these tokens apart as well. Means are of the same token id,
    and ids weigh as often as they are `here`.

    Args:
        x: [N, 2, D]; here, there: [N] bool; tokens: [N] ids.

    Raises:
        ValueError: no id is on both sides.
    """
    both = set(tokens[here].tolist()) & set(tokens[there].tolist())
    if not both:
        raise ValueError("tokens: expected an id that is here and there, got none")
    total = x.new_zeros(x.shape[1:], dtype=torch.float64)
    for token in sorted(both):
        sides = [x[side & (tokens == token)].double() for side in (here, there)]
        total += len(sides[0]) * (sides[0].mean(0) - sides[1].mean(0))
    return float(difference(total.norm(dim=-1)[None]))
