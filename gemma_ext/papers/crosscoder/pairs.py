"""Activations of two models on the same tokens, and the chat model run on from patched ones."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from gemma_ext.sae.sites import capture, find_site, replacing


@torch.no_grad()
def paired_states(
    base: Any,
    chat: Any,
    windows: Tensor,
    layer: int,
    batch: int = 16,
    advance: Callable[[int], None] = lambda count: None,
) -> Tensor:
    """[W, T - 1, 2, D] float32: both models behind a block, base first.

    The first position is left out: it attends to itself alone, and its norm is out of all measure.

    Args:
        windows: [W, T] token ids, the same for both.
        layer: 0 is the first block; later ones do not run.
        advance: told of every window.

    Raises:
        ValueError: a model does not have the layer.
    """
    sites = [(model, find_site(model, layer)) for model in (base, chat)]
    parts = []
    for ids in windows.split(batch):
        pair = [capture(model, ids, [site])[0][:, 1:].float() for model, site in sites]
        parts.append(torch.stack(pair, 2))
        advance(len(ids))
    return torch.cat(parts)


def patched(model: Any, layer: int, replacement: Tensor) -> AbstractContextManager[None]:
    """Within it the block gives `replacement` [B, T - 1, D] behind the first position."""

    def change(own: Tensor) -> Tensor:
        return torch.cat([own[:, :1], replacement.to(own.dtype)], 1)

    return replacing(find_site(model, layer), change)
