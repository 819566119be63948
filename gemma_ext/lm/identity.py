"""A name for everything that the answers of a model depend on: weights, configuration, text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

_NOT_PART = ("_name_or_path", "transformers_version")
_ADAPTER = ("disable_adapters", "active_adapters", "scaling", "merged")


def identity(model: nn.Module, **facts: Any) -> str:
    """Digest of a model as it is now and of `facts`; reads all weights, about a second a gigabyte.

    Where a model was read from is no part of it; which adapters are switched on is.
    """
    config = {k: v for k, v in model.config.to_dict().items() if k not in _NOT_PART}
    generation = getattr(model, "generation_config", None)
    parts = {
        "class": type(model).__name__,
        "config": config,
        "generation": generation.to_dict() if generation else None,
        "adapters": list(_adapters(model)),
        "weights": _weights(model),
        **facts,
    }
    parts["generation"] = {
        k: v for k, v in (parts["generation"] or {}).items() if k not in _NOT_PART
    }
    return hashlib.blake2b(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _weights(model: nn.Module) -> list[list[str]]:
    state = sorted(model.state_dict().items())
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        digests = pool.map(_digest, (tensor for _, tensor in state))
        return [[name, digest] for (name, _), digest in zip(state, digests, strict=True)]


def _digest(tensor: Tensor) -> str:
    digest = hashlib.blake2b(f"{tensor.dtype} {list(tensor.shape)}".encode(), digest_size=20)
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.numel():
        digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()


def _adapters(model: nn.Module) -> Iterator[tuple[str, dict[str, str]]]:
    """The switches of every layer that has adapters of peft."""
    for name, module in model.named_modules():
        if hasattr(module, "active_adapters") and hasattr(module, "scaling"):
            yield name, {key: str(getattr(module, key, None)) for key in _ADAPTER}
