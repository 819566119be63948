"""What latents fire on: their strongest contexts, densities, and the tokens they write for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gemma_ext.lm.huggingface import evaluating
from gemma_ext.nn.sparse_autoencoder import SparseAutoencoder
from gemma_ext.ops.sae import Codes
from gemma_ext.sae.stream import Activations


@dataclass(frozen=True)
class Context:
    """A stretch of tokens around the place where a latent is strongest in its row.

    Attributes:
        ids: tokens; values: of the latent at each of them; peak: which of them is the strongest.
        row: of the tokens that were looked at.
    """

    ids: list[int]
    values: list[float]
    peak: int
    row: int


@dataclass(frozen=True)
class Latent:
    """One latent.

    Attributes:
        number: its index; density: share of the tokens that it fires on.
        contexts: strongest first, one of a row.
        promoted, suppressed: (token id, logit per unit of the latent in a stream of norm sqrt(D)),
            strongest first; empty where its decoder does not write to the stream.
    """

    number: int
    density: float
    contexts: list[Context]
    promoted: list[tuple[int, float]]
    suppressed: list[tuple[int, float]]


@torch.no_grad()
def inspect_latents(
    sae: SparseAutoencoder,
    stream: Activations,
    *,
    latents: Sequence[int] | None = None,
    count: int = 20,
    contexts: int = 10,
    window: int = 12,
    progress: Callable[[int], None] = lambda rows: None,
) -> tuple[list[Latent], Tensor]:
    """Looks at latents over all rows of a stream's tokens.

    Args:
        latents: their numbers; None takes `count` live ones, evenly from the densest to the rarest.
        contexts: of every latent.
        window: tokens on either side of the strongest.
        progress: called with the number of rows done.

    Returns:
        the latents, and the densities of all [F].

    Raises:
        ValueError: a number that is not below F.
    """
    for number in latents or ():
        if not 0 <= number < sae.features:
            raise ValueError(f"latents: expected numbers below {sae.features}, got {number}")
    best = _Best(sae.features, contexts)
    with evaluating(sae):
        for first in range(0, len(stream.tokens), stream.rows):
            codes = _codes(sae, stream, first)
            best.add(codes, first, stream.per_row)
            progress(len(stream.tokens[first : first + stream.rows]))
        densities = best.fired.double() / max(1, best.tokens)
        chosen = _spread(densities, count) if latents is None else list(latents)
        places = {number: best.places(number) for number in chosen}
        values = _values(sae, stream, places)
    head = _head(stream.models[0]) if _writes_to_stream(stream, sae) else None
    found = [
        Latent(
            number,
            float(densities[number]),
            [
                _context(stream, row, position, values[number][row], window)
                for row, position in places[number]
            ],
            *_tokens(head, sae, number),
        )
        for number in chosen
    ]
    return found, densities


class _Best:
    """The strongest activation of every latent in the best rows, in [F, contexts] tables."""

    def __init__(self, features: int, contexts: int) -> None:
        self.features, self.size = features, contexts
        self.fired = torch.zeros(features, dtype=torch.int64)
        self.tokens = 0
        self.latent = torch.empty(0, dtype=torch.int64)
        self.value = torch.empty(0)
        self.place = torch.empty(0, dtype=torch.int64)  # token's number over all rows

    def add(self, codes: Codes, first_row: int, per_row: int) -> None:
        active = codes.values > 0
        latent = codes.indices[active].long().cpu()
        value = codes.values[active].float().cpu()
        place = codes.rows()[active].cpu() + first_row * per_row
        self.fired += torch.bincount(latent, minlength=self.features)
        self.tokens += codes.tokens
        strongest = _first_of(
            latent * (place.max() + 1 if len(place) else 1) + place // per_row, value
        )
        self.latent = torch.cat([self.latent, latent[strongest]])
        self.value = torch.cat([self.value, value[strongest]])
        self.place = torch.cat([self.place, place[strongest]])
        order = _by_group(self.latent, self.value)
        latent = self.latent[order]
        starts = torch.searchsorted(latent, latent)
        kept = order[torch.arange(len(order)) - starts < self.size]
        self.latent, self.value, self.place = (
            t[kept] for t in (self.latent, self.value, self.place)
        )
        self.per_row = per_row

    def places(self, number: int) -> list[tuple[int, int]]:
        """(row, activation of the row) of a latent, strongest first."""
        return [divmod(p, self.per_row) for p in self.place[self.latent == number].tolist()]


def _by_group(group: Tensor, value: Tensor) -> Tensor:
    """Order by group, within a group by falling value; stable."""
    order = value.argsort(descending=True, stable=True)
    return order[group[order].argsort(stable=True)]


def _first_of(group: Tensor, value: Tensor) -> Tensor:
    """Index of the largest value of every group."""
    order = _by_group(group, value)
    sorted_group = group[order]
    first = torch.ones(len(order), dtype=torch.bool)
    first[1:] = sorted_group[1:] != sorted_group[:-1]
    return order[first]


def _codes(sae: SparseAutoencoder, stream: Activations, first: int) -> Codes:
    x = stream.activations(stream.tokens[first : first + stream.rows])
    return sae.encode(x[:, stream.skip :].flatten(0, 1).to(sae.encoder.device))


def _values(
    sae: SparseAutoencoder, stream: Activations, places: dict[int, list[tuple[int, int]]]
) -> dict[int, dict[int, Tensor]]:
    """Values of latents over the rows that are shown, from one more pass over those rows."""
    rows = sorted({row for found in places.values() for row, _ in found})
    values: dict[int, dict[int, Tensor]] = {number: {} for number in places}
    wanted = {number: {row for row, _ in found} for number, found in places.items()}
    for row in rows:
        x = stream.activations(stream.tokens[row : row + 1])
        codes = sae.encode(x[0, stream.skip :].to(sae.encoder.device))
        indices, tokens, strengths = (
            t.flatten().cpu() for t in (codes.indices, codes.rows(), codes.values)
        )
        for number, of in wanted.items():
            if row in of:
                here = indices == number
                line = torch.zeros(stream.tokens.shape[1])
                line[tokens[here] + stream.skip] = strengths[here].float()
                values[number][row] = line
    return values


def _context(stream: Activations, row: int, position: int, values: Tensor, window: int) -> Context:
    at = position + stream.skip
    start = max(0, at - window)
    ids = stream.tokens[row, start : at + window + 1].tolist()
    return Context(ids, values[start : at + window + 1].tolist(), at - start, row)


def _spread(densities: Tensor, count: int) -> list[int]:
    live = (densities > 0).nonzero().squeeze(1)
    ranked = live[densities[live].argsort(descending=True, stable=True)]
    steps = torch.linspace(0, len(ranked) - 1, min(count, len(ranked))).round().long()
    return ranked[steps].tolist()


def _writes_to_stream(stream: Activations, sae: SparseAutoencoder) -> bool:
    model = stream.models[0]
    return sae.output_width == model.config.get_text_config().hidden_size and sae.sources == 1


def _head(model: nn.Module) -> Tensor | None:
    """The head's rows with the gain of the last norm in them, [V, D] in float32."""
    head = model.get_output_embeddings()
    if head is None:
        return None
    names = ("norm", "final_layernorm", "ln_f", "final_layer_norm")
    norm = next((n for n in (getattr(model.base_model, k, None) for k in names) if n), None)
    weight = head.weight.float()
    if norm is None:
        return weight
    if isinstance(norm, nn.LayerNorm):
        return weight * norm.weight.float()
    ones = torch.ones(weight.shape[1], device=weight.device, dtype=norm.weight.dtype)
    return weight * norm(ones).float()  # their root mean square is 1, so this is the gain


def _tokens(
    head: Tensor | None, sae: SparseAutoencoder, number: int, best: int = 8
) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
    """Tokens that a latent's direction favours and disfavours, in a stream of norm sqrt(D)."""
    if head is None:
        return [], []
    logits = head @ sae.decoder[number].to(head.device).float()
    both = []
    for sign in (1, -1):
        top = (sign * logits).topk(min(best, len(logits)))
        both.append([(int(i), sign * float(v)) for v, i in zip(*top, strict=True)])
    return both[0], both[1]
