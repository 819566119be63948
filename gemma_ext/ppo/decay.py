"""Weight decay of matrices alone: norms and biases are spared, as transformers' Trainer does."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

_SPARED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


def decay_groups(
    parameters: Iterable[nn.Parameter], modules: Iterable[nn.Module], decay: float
) -> list[dict[str, Any]]:
    """Groups of an optimiser: those that decay, then those that do not; no group is empty.

    Args:
        parameters: of `modules`, whose names tell which are norms and biases.
    """
    spared = {id(p) for module in modules for p in _spared(module)}
    groups: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for parameter in parameters:
        groups[id(parameter) in spared].append(parameter)
    shares = zip(groups, (decay, 0.0), strict=True)
    return [{"params": group, "weight_decay": share} for group, share in shares if group]


def _spared(module: nn.Module) -> Iterable[nn.Parameter]:
    for name, parameter in module.named_parameters():
        if _SPARED.search(name.lower()):
            yield parameter
    for layer in module.modules():
        if isinstance(layer, nn.LayerNorm):
            yield from layer.parameters()
