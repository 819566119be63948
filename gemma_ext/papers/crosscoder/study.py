"""The studies of a page, a plain record each: planted worlds, a model and its fine-tune, causes.

Figures over seeds are means with a 95 % interval (Student's t).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gemma_ext import report
from gemma_ext.nn.sparse_autoencoder import SparseAutoencoder
from gemma_ext.papers.crosscoder.causal import Replies, causal_test
from gemma_ext.papers.crosscoder.discovery import (
    Discovery,
    discover,
    halves,
    leaning,
    mass_by_role,
    random_directions,
    recall_of_role,
)
from gemma_ext.papers.crosscoder.norms import TAGS
from gemma_ext.papers.crosscoder.planted import matched, two_models
from gemma_ext.papers.crosscoder.training import Recipe, train

Record = dict[str, Any]
Advance = Callable[[int], None]
_ROWS = 4096  # tokens at a time
HOME = 0.9  # share of its activation that a latent of the planted behaviour has in its roles
LEANING = 32  # latents looked at by the order of their norms, whatever their tag


def planted(
    recipe: Recipe,
    seed: int,
    *,
    width: int = 48,
    shared: int = 16,
    exclusive: int = 4,
    weak: int = 4,
    rate: float = 0.08,
    tokens: int = 40_000,
    advance: Advance = lambda count: None,
) -> Record:
    """A crosscoder on two synthetic models: which concepts it finds, and what it calls them.

    Returns:
        found of all concepts; of the weak ones, which the base has too, those called chat only by
        the norms, and those of them that nu_error flags; of the chat model's own, those called
        chat only, and those confirmed.
    """
    generator = torch.Generator().manual_seed(seed)
    world = two_models(width, shared, exclusive, rate, generator, weak=weak)
    x, _ = world.draw(tokens, generator)
    held_out, _ = world.draw(tokens // 2, generator)
    made = train(x, recipe, advance=advance).crosscoder
    found = discover(made, held_out.split(_ROWS))
    place = matched(_raw_decoder(made), world)
    ends = (shared, shared + exclusive, shared + 2 * exclusive, len(place))
    _, _, own, hidden = (_latents(place, *ends_) for ends_ in zip((0, *ends), ends, strict=False))
    chat, flagged = found.chat_only(), found.flagged()
    return {
        "concepts": len(place),
        "found": int((place >= 0).sum()),
        "weak": weak,
        "weak called chat only": int(chat[hidden].sum()),
        "of these flagged": int(flagged[hidden].sum()),
        "exclusive": exclusive,
        "exclusive called chat only": int(chat[own].sum()),
        "of these confirmed": int((chat & ~flagged)[own].sum()),
        "active": found.active,
        "explained": float(found.explained.mean()),
    }


def model_diff(
    x: Tensor,
    held_out: Tensor,
    roles: Tensor,
    home: Sequence[int],
    cue: int,
    recipe: Recipe,
    advance: Advance = lambda count: None,
) -> tuple[SparseAutoencoder, Discovery, Record]:
    """A crosscoder of two models, and whether its chat-only latents are the planted behaviour.

    Args:
        x: [N, 2, D] to train on; held_out: [M, 2, D].
        roles: [M] int64, what a held-out token is in its text.
        home: roles of the behaviour.
        cue: of tokens in which the chat model alone knows that the behaviour is due.

    Returns:
        crosscoder, discovery, and its record with: chat-only latents confirmed by both ratios, how
        many of them and of the flagged ones are at home in the behaviour, the chat-only latents
        that random directions in place of decoders would confirm, and the shares at home of the
        latents that lean most to chat, least, and of all. And of the latent that detects the cue
        best, by the harmonic mean of both: the share of its activation on cues, the share of cues
        that it fires on, Delta and its rank among the live latents (1 leans most to chat), and the
        ratios.

    Raises:
        ValueError: no held-out token is a cue, or no latent is alive on held-out tokens.
    """
    if not (roles == cue).any():
        raise ValueError(f"roles: expected held-out tokens of the cue {cue}, got none")
    made = train(x, recipe, advance=advance).crosscoder
    parts, of_parts = held_out.split(_ROWS), roles.split(_ROWS)
    found = discover(made, parts)
    if not found.alive.any():
        raise ValueError("recipe: expected latents that fire on held-out tokens, got none")
    mass = mass_by_role(made, parts, of_parts, max(int(roles.max()), *home) + 1)
    at_home = mass[:, list(home)].sum(1) >= HOME
    chat, flagged = found.chat_only(), found.flagged()
    confirmed = chat & ~flagged
    order = leaning(found, made.features)
    decoder = made.decoder.detach().view(made.features, 2, -1)
    control = discover(made, parts, random_directions(decoder, recipe.seed))
    share, recall = mass[:, cue], recall_of_role(made, parts, of_parts, cue)
    both = share * recall / (share + recall).clamp(min=1e-9)
    rank = int(both[order].argmax())
    detector = int(order[rank])
    return (
        made,
        found,
        {
            **found.record(),
            "confirmed": int(confirmed.sum()),
            "confirmed at home": int((confirmed & at_home).sum()),
            "flagged at home": int((flagged & at_home).sum()),
            "random control": int((chat & control.betas.specific()).sum()),
            "most leaning at home": _share(at_home[order[:LEANING]]),
            "least leaning at home": _share(at_home[order[-LEANING:]]),
            "all at home": _share(at_home[order]),
            "correlation": _correlation(found),
            "detector share": float(share[detector]),
            "detector recall": float(recall[detector]),
            "detector delta": float(found.delta[detector]),
            "detector rank": rank + 1,
            "detector nu error": float(found.betas.nu_error[detector]),
            "detector nu reconstruction": float(found.betas.nu_reconstruction[detector]),
        },
    )


def null_diff(
    x: Tensor, held_out: Tensor, recipe: Recipe, advance: Advance = lambda count: None
) -> Record:
    """A model against itself: every live latent is shared, with both ratios one.

    Args:
        x, held_out: [N, D] activations of the one model.
    """
    twice = torch.stack([x, x], 1)
    made = train(twice, recipe, advance=advance).crosscoder
    found = discover(made, torch.stack([held_out, held_out], 1).split(_ROWS))
    alive = found.alive
    nu = [found.betas.nu_error, found.betas.nu_reconstruction]
    return {
        "alive": int(alive.sum()),
        "shared": int(((found.tags == TAGS.index("shared")) & alive).sum()),
        "largest |Delta - 1/2|": float((found.delta[alive] - 0.5).abs().max()),
        "largest |nu - 1|": float(max((n[alive] - 1).abs().max() for n in nu)),
    }


def causes(
    base: Any,
    chat: Any,
    layer: int,
    crosscoder: SparseAutoencoder,
    found: Discovery,
    replies: Replies,
    count: int = 64,
    advance: Advance = lambda count: None,
) -> Record:
    """KL of every arm of the causal test: {arm: {"all": nats, "first": nats}}."""
    sets = {**halves(found, count), "confirmed chat only": found.chat_only() & ~found.flagged()}
    arms = causal_test(base, chat, layer, crosscoder, replies, sets, advance=advance)
    return {name: {"all": arm.mean, "first": arm.first} for name, arm in arms.items()}


def interval(values: Sequence[float]) -> str:
    """Mean over seeds with the half width of its 95 % interval; see `report.interval`."""
    mean, half = report.interval(values)
    return f"{mean:.3g}" if half is None else f"{mean:.3g} ± {half:.2g}"


def _raw_decoder(made: SparseAutoencoder) -> Tensor:
    return made.decoder.detach().view(made.features, 2, -1) / made.input_factor[:, None]


def _share(chosen: Tensor) -> float:
    return float(chosen.double().mean()) if chosen.numel() else 0.0


def _latents(place: Tensor, start: int, end: int) -> Tensor:
    """Latents of the concepts in a range that were found."""
    part = place[start:end]
    return part[part >= 0]


def _correlation(found: Discovery) -> float:
    """Of Delta and 1 - nu_reconstruction, over live latents with plausible ratios."""
    chosen = found.alive & found.betas.plausible()
    if int(chosen.sum()) < 3:
        return float("nan")
    pair = torch.stack([found.delta[chosen], 1 - found.betas.nu_reconstruction[chosen]])
    return float(torch.corrcoef(pair)[0, 1])
