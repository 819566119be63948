"""Merging tensors that are in memory, on any device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gemma_ext.ops.souping.parts import Part
from gemma_ext.souping.engine.files.scales import pair_scales
from gemma_ext.souping.engine.files.sources import widen
from gemma_ext.souping.engine.plan import check_models, count_layers, default_dtype, layer_of
from gemma_ext.souping.method import Method, TensorInfo, Values

Tensors = Mapping[str, Tensor]


def merge_tensors(
    method: Method,
    models: Sequence[Tensors],
    base: Tensors | None,
    values: Callable[[TensorInfo], Values],
    out: MutableMapping[str, Tensor] | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> MutableMapping[str, Tensor]:
    """Merges models tensor by tensor of the same name, as `merge_files` does with files.

    Args:
        method: how.
        models: M mappings of the same names to tensors of the same shapes.
        base: that deltas are taken from.
        values: parameters of the method for a tensor.
        out: tensors that the results are written into; each may be the base's or a source's own.
            None makes new ones.
        dtype: of new floating-point tensors; by default the base's, or the first model's.

    Returns:
        `out`, or a new dict. Integer tensors are the base's (the first model's without a base).

    Raises:
        ValueError: M or the base does not fit the method; names or shapes differ.
    """
    check_models(method, len(models), base is not None)
    for tensors in (*models, *([base] if base else [])):
        scales, _ = pair_scales({name: tensor.dtype for name, tensor in tensors.items()})
        if scales:
            name, scale = next(iter(scales.items()))
            raise ValueError(f"expected fp8 {name!r} with its {scale!r} applied, got both")
    used = base if method.base != "unused" else None
    reference = models[0] if used is None else used
    _check(models, reference, out)
    if out is None:
        out = {name: _like(tensor, dtype) for name, tensor in reference.items()}
    parts: dict[str, Part] = {}
    written: set[tuple[Any, ...]] = set()
    for name, tensor in reference.items():
        place = (out[name].data_ptr(), out[name].stride(), out[name].shape)
        if place in written:
            continue  # tied: merged already, perhaps over its own sources
        if not tensor.is_floating_point():
            out[name].copy_(tensor)
        elif tensor.numel():
            written.add(place)
            sources = [widen(model[name].detach()) for model in models]
            origin = None if used is None else widen(tensor.detach())
            parts[name] = Part(sources, origin, out[name].detach(), name)
    infos = _infos(parts, count_layers(reference))
    if method.model_wide:
        _merge_together(method, parts, {n: method.begin(i, values(i)) for n, i in infos.items()})
    else:
        _merge_each(method, parts, lambda name: method.begin(infos[name], values(infos[name])))
    return out


def _infos(parts: Mapping[str, Part], layers: int) -> dict[str, TensorInfo]:
    return {
        name: TensorInfo(name, tuple(part.out.shape), layer_of(name), layers)
        for name, part in parts.items()
    }


def _merge_each(method: Method, parts: Mapping[str, Part], begin: Callable[[str], Any]) -> None:
    """What no survey looks at all at once, the others one by one, as their states are large."""
    together: dict[str, Any] = {}
    for name, part in parts.items():
        state = begin(name)
        if all(method.skips(step, state) for step in range(method.surveys)):
            together[name] = state
            continue
        for step in range(method.surveys):
            _survey(method, step, part, state)
        method.merge(part, state)
    method.merge_all([parts[name] for name in together], list(together.values()))


def _merge_together(method: Method, parts: Mapping[str, Part], states: dict[str, Any]) -> None:
    for step in range(method.surveys):
        for name, part in parts.items():
            _survey(method, step, part, states[name])
        method.settle_model(step, states)
    for name, part in parts.items():
        method.merge(part, states.pop(name))


def _survey(method: Method, step: int, part: Part, state: Any) -> None:
    if method.skips(step, state):
        return
    method.survey(step, Part(part.sources, part.base, None, part.name), state)
    method.settle(step, state)


def _like(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    if not tensor.is_floating_point():
        return torch.empty_like(tensor)
    return torch.empty(
        tensor.shape, dtype=dtype or default_dtype(tensor.dtype), device=tensor.device
    )


def _check(models: Sequence[Tensors], reference: Tensors, out: Tensors | None) -> None:
    everyone = [*((f"models[{i}]", model) for i, model in enumerate(models))]
    if out is not None:
        everyone.append(("out", out))
    for who, tensors in everyone:
        for name in reference:
            if name not in tensors:
                raise ValueError(f"{who}: expected tensor {name!r}, got none")
            if tensors[name].shape != reference[name].shape:
                raise ValueError(
                    f"{who}: expected {name!r} to be {list(reference[name].shape)}, "
                    f"got {list(tensors[name].shape)}"
                )
        if extra := set(tensors) - set(reference):
            raise ValueError(f"{who}: expected the base's tensors alone, got {sorted(extra)[0]!r}")
