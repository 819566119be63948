"""Parameters of a method that are the same for every tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from gemma_ext.souping.method import Method, Required, TensorInfo, Values


def constant(
    method: Method | type[Method], models: int, *, seed: int = 0, **parameters: Any
) -> Callable[[TensorInfo], Values]:
    """What the engines ask for the values of a tensor.

    Args:
        method: whose keys and defaults hold.
        models: M.
        seed: of everything random.
        parameters: by key; one value for all models or M of them where it is per model. `lambda_`
            stands for `lambda`.

    Raises:
        ValueError: an unknown key, another number of values than M, or none of a required one.

    Example:
        >>> merge_tensors(Ties(), models, base, constant(Ties, 2, weight=[0.5, 1.0], density=0.2))
    """
    if "lambda_" in parameters:
        parameters["lambda"] = parameters.pop("lambda_")
    known = {parameter.key: parameter for parameter in method.parameters}
    unknown = sorted(set(parameters) - set(known))
    if unknown:
        raise ValueError(
            f"expected parameters of {method.name} among {', '.join(known) or 'none'}, "
            f"got {unknown[0]!r}"
        )
    of_models: list[dict[str, Any]] = [{} for _ in range(models)]
    of_merge = {}
    for key, parameter in known.items():
        value = parameters.get(key, parameter.default)
        if value is Required:
            raise ValueError(f"expected {key} for {method.name}, got none")
        if not parameter.per_model:
            of_merge[key] = value
            continue
        for model, one in zip(of_models, _each(key, value, models), strict=True):
            model[key] = one
    values = Values(of_models, of_merge, seed)
    return lambda tensor: values


def _each(key: str, value: Any, models: int) -> Sequence[Any]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        return [value] * models
    if len(value) != models:
        raise ValueError(f"expected {key} of {models} models, got {len(value)}")
    return value
