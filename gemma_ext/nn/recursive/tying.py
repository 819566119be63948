"""Making a model recursive: its layers share Parameters, its linears get matrices per depth."""

from __future__ import annotations

from typing import Any

from torch import nn

from gemma_ext.nn.recursive.linear import DepthLinear
from gemma_ext.nn.recursive.plan import Plan


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The name and the list of a causal language model's L layers.

    Raises:
        TypeError: there is no such list.
    """
    count = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name, module
    raise TypeError(
        f"model: expected a list of {count} decoder layers, got {type(model).__name__} without one"
    )


def linear_names(layer: nn.Module) -> list[str]:
    """Names of all linears of a layer, as "self_attn.q_proj", relaxed or not.

    Raises:
        TypeError: none, as in models built of `Conv1D`.
    """
    found = [
        name for name, part in layer.named_modules() if isinstance(part, nn.Linear | DepthLinear)
    ]
    if not found:
        raise TypeError(f"model: expected layers with nn.Linear, got {type(layer).__name__}")
    return found


def make_recursive(model: Any, plan: Plan) -> Any:
    """Ties the layers of a model as planned and adds the matrices of each depth, in place.

    A stored layer has the Parameters of the first depth that runs it. `model.config.recursive`
    gets the plan, with ranks cut to the size of each linear and without a prefix.

    Args:
        model: causal language model of `transformers` with `plan.layers` layers.
        plan: what is shared.

    Returns:
        the model.

    Raises:
        ValueError: another number of layers, a rank of a linear that is not there, a model that is
            recursive already, or layers that do not have the same parameters.
        TypeError: no decoder layers.
    """
    if getattr(model.config, "recursive", None) is not None:
        raise ValueError("model: expected one that is not recursive yet, got one that is")
    _, layers = decoder_layers(model)
    if len(layers) != plan.layers:
        raise ValueError(f"plan: expected {len(layers)} layers, got {plan.layers}")
    sizes = {name: layers[0].get_submodule(name).weight.shape for name in linear_names(layers[0])}
    unknown = sorted(set(plan.ranks) - set(sizes))
    if unknown:
        raise ValueError(f"ranks: expected linears among {', '.join(sizes)}, got {unknown[0]!r}")
    ranks = {name: min(rank, *sizes[name]) for name, rank in plan.ranks.items() if rank}
    for depth, layer in enumerate(layers):
        _share(layer, layers[plan.depths_of(plan.stored_of_depth[depth])[0]])
    for depth, layer in enumerate(layers):
        for name in ranks:
            if rank := min(plan.rank_of(depth, name), ranks[name]):
                linear = layer.get_submodule(name)
                layer.set_submodule(name, DepthLinear(linear.weight, linear.bias, rank))
    model.config.recursive = plan.to_dict() | {"ranks": ranks, "prefix": 0}
    return model


def _share(layer: nn.Module, first: nn.Module) -> None:
    """Gives a layer the Parameters of another."""
    mine = {name: part.shape for name, part in layer.named_parameters()}
    theirs = {name: part.shape for name, part in first.named_parameters()}
    if mine != theirs:
        name = next(n for n in {**mine, **theirs} if mine.get(n) != theirs.get(n))
        raise ValueError(
            f"model: expected tied layers of the same parameters, got {name} of "
            f"{theirs.get(name)} and {mine.get(name)}"
        )
    for path, module in layer.named_modules():
        other = first.get_submodule(path)
        module._parameters.update(other._parameters)
