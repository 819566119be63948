"""Parameters of a recipe held against those of its method, and their values for one tensor.

A value is looked for in the parameters of the model, then of the slice, the module and the recipe;
a list of filters none of which fits gives none. Last comes the method's default.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from gemma_ext.souping.method import Method, Parameter, Required, Values
from gemma_ext.souping.recipes.marks import Entry, suggest
from gemma_ext.souping.recipes.recipe import Module, Recipe, Slice, Source
from gemma_ext.souping.recipes.references import ModelReference
from gemma_ext.souping.recipes.values import Settings

# parameters of mergekit that change no result here, each with the reason
POINTLESS = {
    "int8_mask": "no mask is ever stored",
    "embed_slerp": "the method of the recipe merges embeddings too",
}


def check_recipe(recipe: Recipe, method: type[Method]) -> None:
    """Holds a recipe against its method, before any model is looked at.

    Raises:
        RecipeError: an unknown parameter, one in the wrong place or of the wrong kind, a missing
            base, too many or too few models.
    """
    parameters = {parameter.key: parameter for parameter in method.parameters}
    for settings, of_model in _levels(recipe):
        for key, setting in settings.items():
            if key in POINTLESS:
                continue
            parameter = parameters.get(key)
            if parameter is None:
                known = suggest(key, parameters) if parameters else "it has none"
                raise setting.entry.error(f"{method.name} has no parameter {key}; {known}")
            if of_model and not parameter.per_model:
                raise setting.entry.error(
                    f"{key} is of the whole merge: it belongs under the parameters of the recipe, "
                    "a module or a slice, not of a model"
                )
            for entry, value in setting.scalars():
                _convert(parameter, value, entry)
    for module in recipe.modules:
        for part in module.slices:
            _check_models(recipe, module, part, method)


def find_values(
    recipe: Recipe,
    method: type[Method],
    module: Module,
    part: Slice,
    sources: Sequence[tuple[ModelReference, Source | None]],
    name: str,
    depth: float,
    seed: int,
) -> Values:
    """The values for the tensor `name`, one mapping per source and one for the merge.

    Raises:
        RecipeError: a required parameter has no value for it.
    """
    shared = (part.settings, module.settings, recipe.settings)

    def find(parameter: Parameter, levels: Sequence[Settings], where: Entry, what: str) -> Any:
        for settings in levels:
            if parameter.key in settings:
                setting = settings[parameter.key]
                value = setting.at(name, depth)
                if value is not None:
                    return _convert(parameter, value, setting.entry)
        if parameter.default is Required:
            raise where.error(
                f"{method.name} needs {parameter.key} for {what}, and nothing gives one for "
                f"{name}: not the model, nor its slice, nor the recipe"
            )
        return parameter.default

    models = []
    for model, source in sources:
        levels = (source.settings, *shared) if source else shared
        where = source.entry if source else recipe.keys["base_model"]
        counts = "" if source else f", because {method.name} takes the base as one of the models"
        models.append(
            {
                parameter.key: find(parameter, levels, where, f"{model}{counts}")
                for parameter in method.parameters
                if parameter.per_model
            }
        )
    merge = {
        parameter.key: find(parameter, shared, part.entry, "the merge")
        for parameter in method.parameters
        if not parameter.per_model
    }
    return Values(models, merge, seed)


def pointless(recipe: Recipe) -> Iterator[tuple[Entry, str]]:
    """Parameters that are accepted and change nothing, with the reason."""
    for settings, _ in _levels(recipe):
        for key in settings.keys() & POINTLESS.keys():
            yield settings[key].entry, POINTLESS[key]


def _levels(recipe: Recipe) -> Iterator[tuple[Settings, bool]]:
    yield recipe.settings, False
    for module in recipe.modules:
        yield module.settings, False
        for part in module.slices:
            yield part.settings, False
            for source in part.sources:
                yield source.settings, True


def _check_models(recipe: Recipe, module: Module, part: Slice, method: type[Method]) -> None:
    base = part.base or recipe.base
    if method.base == "needed" and base is None:
        raise part.entry.error(f"{method.name} needs a base_model")
    models = {source.model for source in part.sources}
    if method.base != "unused":
        models -= {base}
    elif base is not None and not module.sliced:
        models |= {base}
    least, most = method.models
    if len(models) < least or (most is not None and len(models) > most):
        wanted = "1 model" if least == most == 1 else f"{least} models"
        if least != most:
            wanted = f"{least} to {most} models" if most else f"{least} or more models"
        beside = " beside the base" if method.base != "unused" and base is not None else ""
        raise part.entry.error(f"{method.name} merges {wanted}{beside}, got {len(models)}")


def _convert(parameter: Parameter, value: Any, entry: Entry) -> Any:
    kind = parameter.kind
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is bool and (isinstance(value, bool) or value in (0, 1)):
        return bool(value)
    if kind is int and number and value == int(value):
        return int(value)
    if kind is float and number:
        return float(value)
    if kind is str and isinstance(value, str):
        return value
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    raise entry.error(f"expected {names[kind]}, got {value!r}")
