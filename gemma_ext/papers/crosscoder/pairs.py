"""Activations of two models on the same tokens, and the chat model run on from patched ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def block(model: Any, layer: int) -> nn.Module:
    """A block of a causal language model of transformers; 0 is the first.

    Raises:
        ValueError: the model does not have it.
    """
    blocks = model.get_decoder().layers
    if not 0 <= layer < len(blocks):
        raise ValueError(f"layer: expected 0 to {len(blocks) - 1}, got {layer}")
    return blocks[layer]


@torch.no_grad()
def states(model: Any, ids: Tensor, layer: int) -> Tensor:
    """Residual stream [B, T, D] behind a block, for ids [B, T]; later blocks do not run."""
    found: list[Tensor] = []

    def hook(module: Any, arguments: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)
        raise _Enough

    handle = block(model, layer).register_forward_hook(hook)
    try:
        model.get_decoder()(input_ids=ids, use_cache=False)
    except _Enough:
        pass
    finally:
        handle.remove()
    return found[0]


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
        advance: told of every window.
    """
    parts = []
    for ids in windows.split(batch):
        pair = [states(model, ids, layer)[:, 1:].float() for model in (base, chat)]
        parts.append(torch.stack(pair, 2))
        advance(len(ids))
    return torch.cat(parts)


@contextmanager
def patched(model: Any, layer: int, replacement: Tensor) -> Iterator[None]:
    """Within it the block gives `replacement` [B, T - 1, D] behind the first position."""

    def hook(module: Any, arguments: Any, output: Any) -> Any:
        own = output[0] if isinstance(output, tuple) else output
        new = torch.cat([own[:, :1], replacement.to(own.dtype)], 1)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = block(model, layer).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


class _Enough(Exception):  # noqa: N818 (ends a forward, is no error)
    pass
