"""The models of a recipe: files opened, adapters read, configurations and tokenizers found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from gemma_ext.souping.engine.files.checkpoint import Checkpoint, Stored, open_checkpoint
from gemma_ext.souping.engine.files.scales import FP8
from gemma_ext.souping.engine.files.sources import Source
from gemma_ext.souping.recipes.adapted import Adapter, is_adapter, read_adapter
from gemma_ext.souping.recipes.configuration import Config, read_config
from gemma_ext.souping.recipes.layout import Layout, read_layout
from gemma_ext.souping.recipes.references import ModelReference, locate
from gemma_ext.souping.recipes.tokenizer import FILES


@dataclass(frozen=True)
class Model:
    """A model of a recipe.

    Attributes:
        reference: as in the recipe.
        folder: of its files.
        checkpoint: its tensors.
        adapter: added to them.
        config: its config.json.
        tokenizer_folder: the adapter's, where it has a tokenizer; else `folder`.
        layout: of the tensors.
    """

    reference: ModelReference
    folder: Path
    checkpoint: Checkpoint
    adapter: Adapter | None
    config: Config | None
    tokenizer_folder: Path
    layout: Layout

    def source(self, name: str) -> Source:
        """Where the engine finds a tensor, adapter and all."""
        return Source(self.stored(name), adapt=self.adapter and self.adapter.deltas.get(name))

    def stored(self, name: str) -> Stored:
        """The tensor before an adapter is added to it."""
        if self.adapter and name in self.adapter.replaced:
            return Stored.of(self.adapter.replaced[name])
        return self.checkpoint.tensors[name]


def open_model(
    reference: ModelReference,
    *,
    names: Mapping[str, Path] | None = None,
    cache_dir: str | None = None,
    lora_dtype: torch.dtype | None = None,
) -> Model:
    """Opens a model without reading its weights.

    Args:
        names: folders of earlier recipes of the same file.
        cache_dir: of huggingface_hub.
        lora_dtype: as `dtype` of `read_adapter`.

    Raises:
        ValueError, FileNotFoundError, ImportError: as `locate`, `open_checkpoint`, `read_adapter`.
    """
    if names and str(reference) in names:
        folder = names[str(reference)]
    else:
        folder = locate(reference.model, cache_dir)
    if is_adapter(folder) and not any(folder.glob("model*.safetensors")):
        raise ValueError(f"{folder}: expected a model, got an adapter; write MODEL+{reference}")
    checkpoint = open_checkpoint(folder)
    shapes = {name: stored.shape for name, stored in checkpoint.tensors.items()}
    adapter, tokenizer_folder = None, folder
    if reference.lora:
        lora = locate(reference.lora, cache_dir)
        adapter = read_adapter(lora, shapes, lora_dtype)
        shapes |= {name: tuple(tensor.shape) for name, tensor in adapter.replaced.items()}
        if any((lora / name).is_file() for name in FILES):
            tokenizer_folder = lora
    config = read_config(folder)
    if config is not None and config.pop("quantization_config", None):
        _check_scaled(checkpoint)
    layout = read_layout(shapes)
    return Model(reference, folder, checkpoint, adapter, config, tokenizer_folder, layout)


def _check_scaled(checkpoint: Checkpoint) -> None:
    for name, stored in checkpoint.tensors.items():
        if stored.dtype in FP8 and stored.scale is None:
            raise ValueError(
                f"{checkpoint.path}: expected the scales of fp8 {name!r} beside it, as config.json "
                "says it is quantised, got none"
            )
