"""Hidden states of a causal language model of transformers, without the first token of a window."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gemma_ext.sae.sites import capture, find_site


@torch.no_grad()
def hidden_states(
    model: Any,
    windows: Tensor,
    layers: Sequence[int],
    batch: int = 16,
    advance: Callable[[int], None] = lambda count: None,
) -> dict[int, Tensor]:
    """Residual stream behind each of `layers`, [W (T - 1), D] in the dtype of the model.

    Blocks behind the last of them do not run.

    The first position is left out: it attends to itself alone, and its huge norm would be the
    moment.

    Args:
        windows: [W, T] token ids.
        layers: at least one; 0 is the first block.
        advance: told of every window.

    Raises:
        ValueError: a layer that the model does not have.
    """
    sites = {layer: find_site(model, layer) for layer in layers}
    found: dict[int, list[Tensor]] = {layer: [] for layer in sites}
    for part in windows.split(batch):
        states = capture(model, part, list(sites.values()))
        for layer, state in zip(sites, states, strict=True):
            found[layer].append(state[:, 1:].flatten(0, 1))
        advance(len(part))
    return {layer: torch.cat(parts) for layer, parts in found.items()}
