"""Hidden states of a causal language model of transformers, without the first token of a window."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def hidden_states(
    model: Any,
    windows: Tensor,
    layers: Sequence[int],
    batch: int = 16,
    advance: Callable[[int], None] = lambda count: None,
) -> dict[int, Tensor]:
    """Residual stream behind each of `layers`, [W (T - 1), D] in the dtype of the model.

    The first position is left out: it attends to itself alone, and its huge norm would be the
    moment.

    Args:
        windows: [W, T] token ids.
        layers: 0 is the first block.
        advance: told of every window.

    Raises:
        ValueError: a layer that the model does not have.
    """
    body = model.get_decoder()
    blocks = body.layers
    if odd := [layer for layer in layers if not 0 <= layer < len(blocks)]:
        raise ValueError(f"layers: expected 0 to {len(blocks) - 1}, got {odd[0]}")
    found: dict[int, list[Tensor]] = {layer: [] for layer in layers}

    def keep(layer: int) -> Callable[..., None]:
        def hook(module: Any, arguments: Any, output: Any) -> None:
            states = output[0] if isinstance(output, tuple) else output
            found[layer].append(states[:, 1:].flatten(0, 1).detach())

        return hook

    handles = [blocks[layer].register_forward_hook(keep(layer)) for layer in found]
    try:
        for part in windows.split(batch):
            body(input_ids=part, use_cache=False)
            advance(len(part))
    finally:
        for handle in handles:
            handle.remove()
    return {layer: torch.cat(parts) for layer, parts in found.items()}
