"""The model inside its wrappers, and its head."""

from __future__ import annotations

from torch import nn


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside torch.compile, (Distributed)DataParallel and PEFT wrappers."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif isinstance(getattr(model, "module", None), nn.Module):
            model = model.module
        else:
            return model


def output_head(model: nn.Module) -> nn.Module:
    """The module of `model` that projects into the vocabulary."""
    head = model.get_output_embeddings()
    if head is None:
        raise TypeError(f"expected {type(model).__name__} to have output embeddings, got None")
    return head
