"""The causal test: do the differences that latents carry turn the base model's state into chat's?

    h_S = h_base + sum_{j in S} f_j (d_j^chat - d_j^base)

at one layer, behind which the chat model runs on; KL(chat || patched) of its predictions.

| arm      | state                                            |
|----------|--------------------------------------------------|
| none     | h_base                                           |
| all      | x^chat + (h_base - x^base)                       |
| error    | h_base + (eps^chat - eps^base)                   |
| a set    | S of a mask [F]                                  |
| tokens   | h_chat at the given positions, h_base elsewhere  |

"all" holds the difference of the biases too, so that "all" and "error" together are h_chat.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gemma_ext.nn.sparse_autoencoder import SparseAutoencoder
from gemma_ext.ops import sae
from gemma_ext.papers.crosscoder.norms import BASE, CHAT
from gemma_ext.papers.crosscoder.pairs import paired_states, patched

_HELD = 2**23  # logits that are held at a time


def patched_state(
    crosscoder: SparseAutoencoder, pair: Tensor, latents: Tensor | None = None
) -> Tensor:
    """h_S [..., D] of paired states [..., 2, D], in the model's units.

    Args:
        latents: [F] bool, S; all where None.
    """
    codes = crosscoder.encode(pair)
    if latents is not None:
        codes = codes.with_values(codes.values * latents[codes.indices.long()])
    decoder = crosscoder.decoder.detach().view(crosscoder.features, 2, -1) / factors(crosscoder)
    change = sae.decode(codes, (decoder[:, CHAT] - decoder[:, BASE]).contiguous())
    return pair[..., BASE, :] + change


def split_states(crosscoder: SparseAutoencoder, pair: Tensor) -> tuple[Tensor, Tensor]:
    """(h_base + x^chat - x^base, h_base + eps^chat - eps^base), [..., D] each."""
    rebuilt = crosscoder(pair)
    known = rebuilt[..., CHAT, :] - rebuilt[..., BASE, :]
    return pair[..., BASE, :] + known, pair[..., CHAT, :] - known


def factors(crosscoder: SparseAutoencoder) -> Tensor | float:
    """[M, 1] what the activations of each model are multiplied with before the crosscoder."""
    if crosscoder.standardise_kind == "none":
        return 1.0
    if crosscoder.standardise_kind != "affine":
        raise ValueError(
            f"crosscoder: expected standardise none or affine, got {crosscoder.standardise_kind}"
        )
    return crosscoder.input_factor[:, None]


@dataclass
class Divergence:
    """KL(chat || patched) in nats, summed.

    Attributes:
        total, tokens: over all scored positions.
        first_total, first_tokens: over those that are among the first of a reply.
    """

    total: float = 0.0
    tokens: int = 0
    first_total: float = 0.0
    first_tokens: int = 0

    @property
    def mean(self) -> float:
        return self.total / max(1, self.tokens)

    @property
    def first(self) -> float:
        return self.first_total / max(1, self.first_tokens)


@dataclass(frozen=True)
class Replies:
    """Windows whose replies are scored.

    Attributes:
        windows: [W, T] token ids.
        scored: [W, T] bool, positions whose prediction (of the next token) counts.
        first: [W, T] bool, those among the first of a reply.
        template: [W, T] bool, tokens of the chat template; none where None.
    """

    windows: Tensor
    scored: Tensor
    first: Tensor
    template: Tensor | None = field(default=None)

    def __post_init__(self) -> None:
        for name in ("scored", "first", "template"):
            value = getattr(self, name)
            if value is not None and value.shape != self.windows.shape:
                raise ValueError(
                    f"{name}: expected {list(self.windows.shape)}, got {list(value.shape)}"
                )


@torch.no_grad()
def causal_test(
    base: Any,
    chat: Any,
    layer: int,
    crosscoder: SparseAutoencoder,
    replies: Replies,
    sets: Mapping[str, Tensor],
    batch: int = 8,
    advance: Callable[[int], None] = lambda count: None,
) -> dict[str, Divergence]:
    """Runs all arms.

    Args:
        sets: masks [F] of latents, an arm each.
        advance: told of every window.

    Returns:
        Arms by name: "none", "all", "error", "tokens" (with a template), and those of `sets`.
    """
    found: dict[str, Divergence] = {}
    for at in torch.arange(len(replies.windows)).split(batch):
        ids = replies.windows[at]
        pair = paired_states(base, chat, ids, layer, batch)
        states = {"none": pair[..., BASE, :]}
        states["all"], states["error"] = split_states(crosscoder, pair)
        if replies.template is not None:
            here = replies.template[at][:, 1:, None]
            states["tokens"] = torch.where(here, pair[..., CHAT, :], pair[..., BASE, :])
        for name, latents in sets.items():
            states[name] = patched_state(crosscoder, pair, latents)
        scored = replies.scored[at]
        first = replies.first[at][scored]
        true = _hidden(chat, ids)[scored]
        for name, state in states.items():
            with patched(chat, layer, state):
                hidden = _hidden(chat, ids)[scored]
            kl = torch.cat(list(_divergences(chat, true, hidden)))
            sums = found.setdefault(name, Divergence())
            sums.total += float(kl.sum())
            sums.tokens += kl.numel()
            sums.first_total += float(kl[first].sum())
            sums.first_tokens += int(first.sum())
        advance(len(at))
    return found


def _hidden(model: Any, ids: Tensor) -> Tensor:
    return model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state


def _divergences(model: Any, true: Tensor, other: Tensor) -> Iterable[Tensor]:
    """KL [n] of positions [n, D], without the logits of all of them at once."""
    rows = max(1, _HELD // model.get_output_embeddings().weight.shape[0])
    for p, q in zip(true.split(rows), other.split(rows), strict=True):
        p, q = _logprobs(model, p), _logprobs(model, q)
        yield (p.exp() * (p - q)).sum(-1)


def _logprobs(model: Any, hidden: Tensor) -> Tensor:
    logits = model.get_output_embeddings()(hidden).double()
    cap = getattr(model.config, "final_logit_softcapping", None)
    if cap:
        logits = cap * torch.tanh(logits / cap)
    return logits.log_softmax(-1)
