"""Keys and values that stand before tokens which are still to be run."""

from __future__ import annotations

from inspect import signature
from typing import Any, NamedTuple

from torch import Tensor, nn

from gemma_ext.nn._models import unwrap

Keys = list[tuple[Tensor, Tensor]]
"""Keys and values of each layer, [1, heads, tokens, head width]."""


class Start(NamedTuple):
    """Ids to run first, and keys of what came before them."""

    before: Tensor
    keys: Keys | None
    length: int

    def cache(self, count: int) -> Any:
        """A cache of `count` equal rows; None where nothing is shared."""
        if self.keys is None:
            return None
        from transformers import DynamicCache

        # without the config: a sliding layer would forget what a shorter prefix needs
        cache = DynamicCache()
        for layer, pair in enumerate(self.keys):
            cache.update(*(x[:, :, : self.length].expand(count, -1, -1, -1) for x in pair), layer)
        return cache


def taken(cache: Any, length: int) -> Keys:
    return [
        (layer.keys[:, :, :length].detach(), layer.values[:, :, :length].detach())
        for layer in cache.layers
    ]


def cache_name(model: nn.Module) -> str | None:
    """The argument that takes keys and values, or None if a cache of the model holds others."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    inner = unwrap(model)
    if inner._is_stateful:
        return None
    layers = DynamicCache(config=inner.config).layers
    if not all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
        return None
    taken = signature(inner.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in taken), None)
