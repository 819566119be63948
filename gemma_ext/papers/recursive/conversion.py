"""A vanilla model becomes a recursive one, in memory or tensor by tensor."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gemma_ext.nn.recursive import Plan, add_prefixes, decoder_layers, linear_names
from gemma_ext.nn.recursive.files import assemble, fill_lora
from gemma_ext.nn.recursive.parts import lora_key
from gemma_ext.papers.recursive.factors import of_depths, refined
from gemma_ext.papers.recursive.recipe import Recipe

Read = Callable[[int, str], Tensor]
"""The tensor of a source layer, by the layer's index and the tensor's name in it."""


def convert(model: Any, recipe: Recipe) -> Any:
    """The recursive form of a causal language model of `transformers`; the model stays as it is.

    Raises:
        ValueError: a model that is recursive already, or a recipe that does not fit it.
        TypeError: no decoder layers, or layers without linears.

    Example:
        >>> made = convert(model, Recipe(loops=2, init="average", rank=64))
        >>> gemma_ext.nn.recursive.save(made, "out/model")
    """
    if getattr(model.config, "recursive", None) is not None:
        raise ValueError("model: expected one that is not recursive yet, got one that is")
    name, layers = decoder_layers(model)
    plan = recipe.plan(len(layers), linear_sizes(layers[0]))
    states = [layer.state_dict() for layer in layers]
    state = {key: t for key, t in model.state_dict().items() if not key.startswith(f"{name}.")}
    stored = {key: t.detach().clone() for key, t in state.items()}
    lora: dict[str, Tensor] = {}
    for s in range(plan.stored_layers):
        pieces = stored_layer(
            s, plan, recipe, list(states[0]), name, lambda layer, key: states[layer][key]
        )
        for key, tensor in pieces:
            (lora if ".lora_" in key else stored)[key] = tensor
    made = assemble(model.config, plan, stored)
    made.generation_config = copy.deepcopy(model.generation_config)
    fill_lora(made, lora)
    add_prefixes(made, recipe.prefix, recipe.seed)
    return made.to(model.device).train(model.training)


def linear_sizes(layer: Any) -> dict[str, tuple[int, int]]:
    """[out, in] of each linear of a layer."""
    return {name: tuple(layer.get_submodule(name).weight.shape) for name in linear_names(layer)}


def stored_layer(
    stored: int,
    plan: Plan,
    recipe: Recipe,
    names: Sequence[str],
    layers: str,
    read: Read,
    dtype: torch.dtype | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a stored layer and the matrices of its depths, one linear after another.

    Args:
        stored: its index.
        names: of the tensors of a layer.
        layers: name of the list of layers in the model.
        read: gives the source's tensors.
        dtype: of the result; the source's by default. Means and residuals are taken in float32 at
            least, residuals against the stored weight as it was rounded.

    Yields:
        (name in `model.safetensors` or in the adapter's file, tensor).
    """
    depths = plan.depths_of(stored)
    for name in names:
        linear = name.removesuffix(".weight")
        rank = plan.ranks.get(linear, 0) if name.endswith(".weight") else 0
        relaxed = [depth for depth in depths if rank and plan.rank_of(depth, linear)]
        mean = _mean(_sources(plan.source_indices[stored], name, recipe), name, read)
        like = read(depths[0], name).dtype if dtype is None else dtype
        value = mean.to(like)
        if relaxed:
            weights = [_wide(read(depth, name)) for depth in relaxed]
            options = {
                "method": recipe.svd,
                "init": recipe.lora_init,
                "seed": recipe.seed + zlib.crc32(f"{stored}.{name}".encode()),
            }
            factors = of_depths(weights, _wide(value), rank, **options)
            for _ in range(recipe.refine):
                rest = (_wide(read(depth, name)) for depth in depths if depth not in relaxed)
                value = refined(weights, _wide(value), factors, rest).to(like)
                factors = of_depths(weights, _wide(value), rank, **options)
            for depth, (a, b) in zip(relaxed, factors, strict=True):
                yield lora_key(layers, depth, linear, "A"), a.to(like)
                yield lora_key(layers, depth, linear, "B"), b.to(like)
        yield f"{layers}.{stored}.{name}", value


def _sources(group: Sequence[int], name: str, recipe: Recipe) -> Sequence[int]:
    is_norm = "norm" in name.rsplit(".", 2)[-2]
    return group[:1] if is_norm and recipe.norms == "first" else group


def _mean(group: Sequence[int], name: str, read: Read) -> Tensor:
    total = _wide(read(group[0], name)).clone()
    for layer in group[1:]:
        total += _wide(read(layer, name))
    return total / len(group) if len(group) > 1 else total


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
