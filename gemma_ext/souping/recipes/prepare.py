"""A recipe with its models opened: targets for an engine, and the tokenizer beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from gemma_ext.souping import methods
from gemma_ext.souping.engine.files.sources import Source
from gemma_ext.souping.engine.plan import Target, default_dtype
from gemma_ext.souping.method import Method
from gemma_ext.souping.methods.linear import Passthrough
from gemma_ext.souping.recipes.chat import choose_template
from gemma_ext.souping.recipes.evaluate import check_recipe
from gemma_ext.souping.recipes.mapped import Sources
from gemma_ext.souping.recipes.models import Model, open_model
from gemma_ext.souping.recipes.recipe import Recipe
from gemma_ext.souping.recipes.resolve import Resolved, resolve
from gemma_ext.souping.recipes.tokenizer import build_tokenizer, load_tokenizers
from gemma_ext.souping.recipes.vocabulary import Rows, map_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prepared:
    """What an engine writes and what belongs beside it.

    Attributes:
        recipe, method: of the merge.
        models: of the recipe.
        lead: index of the model whose configuration and tokenizer the output starts from.
        resolved: the output's tensors by name, as the recipe has them.
        targets: the same for the engine.
        tokenizer: where the recipe asks for one of its own; None to copy the lead's files.
        vocabulary, lead_vocabulary: token to id, of the output and the lead, beside `tokenizer`.
        template: chat template that is set.
    """

    recipe: Recipe
    method: Method
    models: Sequence[Model]
    lead: int
    resolved: Sequence[Resolved]
    targets: Sequence[Target]
    tokenizer: PreTrainedTokenizerBase | None
    vocabulary: Mapping[str, int] | None
    lead_vocabulary: Mapping[str, int] | None
    template: str | None


def find_method(recipe: Recipe) -> type[Method]:
    """The method of a recipe that `check_recipe` has found right.

    Raises:
        RecipeError: an unknown method, or as `check_recipe`.
    """
    try:
        method = methods.get(recipe.method)
    except ValueError as error:
        raise recipe.keys["merge_method"].error(str(error)) from None
    check_recipe(recipe, method)
    return method


def prepare(
    recipe: Recipe,
    *,
    seed: int = 0,
    names: Mapping[str, Path] | None = None,
    cache_dir: str | None = None,
    lora_dtype: torch.dtype | None = None,
    allow_crimes: bool = False,
    trust_remote_code: bool = False,
) -> Prepared:
    """Opens the models, headers alone, and works out every tensor of the output.

    Args:
        seed: of everything random.
        names, cache_dir, lora_dtype: as `open_model`.
        allow_crimes: merge different architectures, keep the base's tensors where shapes differ.
        trust_remote_code: of tokenizers.

    Raises:
        RecipeError: the recipe, or a model that it names, is not as it has to be.
        OSError, ImportError: a file cannot be read, a package is missing.
    """
    method = find_method(recipe)
    options = {"names": names, "cache_dir": cache_dir, "lora_dtype": lora_dtype}
    models = []
    for reference in recipe.models():
        try:
            models.append(open_model(reference, **options))
        except (ValueError, FileNotFoundError) as error:
            raise recipe.entry_of(reference).error(str(error)) from None
    if not allow_crimes:
        _check_architectures(recipe, models)
    resolved = resolve(
        recipe,
        method,
        [model.layout for model in models],
        seed=seed,
        skip=allow_crimes,
    )
    lead = _lead(recipe)
    tokenizer, vocabulary, vocabularies, maps = None, None, None, None
    if recipe.tokenizer:
        folders = [model.tokenizer_folder for model in models]
        try:
            tokenizers = load_tokenizers(folders, trust_remote_code=trust_remote_code)
        except ValueError as error:
            raise recipe.tokenizer.entry.error(str(error)) from None
        tokenizer = build_tokenizer(
            recipe.tokenizer,
            recipe.models(),
            tokenizers,
            base=lead,
            trust_remote_code=trust_remote_code,
        )
        vocabulary = tokenizer.get_vocab()
        tables = {each: each.get_vocab() for each in dict.fromkeys(tokenizers)}
        vocabularies = [tables[each] for each in tokenizers]
        maps = map_rows(
            vocabulary,
            recipe.models(),
            vocabularies,
            [model.layout.rows for model in models],
            base=lead if recipe.base else None,
            rules=recipe.tokenizer.tokens,
            pad=recipe.tokenizer.pad,
        )
    return Prepared(
        recipe=recipe,
        method=method(),
        models=models,
        lead=lead,
        resolved=resolved,
        targets=_targets(recipe, resolved, models, maps),
        tokenizer=tokenizer,
        vocabulary=vocabulary,
        lead_vocabulary=vocabularies and vocabularies[lead],
        template=_template(recipe, models, lead, trust_remote_code),
    )


def _lead(recipe: Recipe) -> int:
    first = recipe.modules[0].slices[0]
    return recipe.models().index(recipe.base or first.base or first.sources[0].model)


def _template(
    recipe: Recipe, models: Sequence[Model], lead: int, trust_remote_code: bool
) -> str | None:
    if recipe.chat_template != "auto":
        return choose_template(recipe.chat_template, [])
    ordered = [models[lead], *(model for model in models if model is not models[lead])]
    folders = [model.tokenizer_folder for model in ordered]
    loaded = load_tokenizers(folders, trust_remote_code=trust_remote_code)
    return choose_template("auto", [tokenizer.chat_template for tokenizer in loaded])


def _check_architectures(recipe: Recipe, models: Sequence[Model]) -> None:
    kinds = {
        config["model_type"]: model
        for model in models
        if (config := model.config) and "model_type" in config
    }
    if len(kinds) > 1:
        (one, first), (other, second), *_ = kinds.items()
        raise recipe.entry_of(second.reference).error(
            f"{second.reference} is a {other} and {first.reference} a {one}: expected one kind of "
            "model, or --allow-crimes"
        )


def _targets(
    recipe: Recipe,
    resolved: Sequence[Resolved],
    models: Sequence[Model],
    maps: Sequence[Rows] | None,
) -> list[Target]:
    wanted = recipe.out_dtype or recipe.dtype
    sources = Sources(models, maps)
    dtype = wanted and getattr(torch, wanted)
    return [_target(recipe, one, models, sources, dtype) for one in resolved]


def _target(
    recipe: Recipe,
    one: Resolved,
    models: Sequence[Model],
    sources: Sources,
    wanted: torch.dtype | None,
) -> Target:
    origin = one.base or one.sources[0]
    stored = models[origin.model].stored(origin.name)
    if not stored.dtype.is_floating_point:
        return Target(one.info, stored.dtype, [Source(stored)])
    dtype = wanted or default_dtype(stored.dtype)
    found = [sources.of(each) for each in one.sources]
    base = one.base and sources.of(one.base)
    shape = (sources.count(one), *one.info.shape[1:]) if one.info.shape else ()
    info = replace(one.info, shape=shape)
    if base and any(source.shape[1:] != shape[1:] for source in [*found, base]):
        return Target(info, dtype, [base])
    if recipe.method == Passthrough.name and one.values.models[0]["scale"] in (None, 1.0):
        source = found[0]
        if source.is_plain and (source.stored.dtype, source.shape) == (dtype, shape):
            return Target(info, dtype, found)  # bytes are copied, not merged
    return Target(info, dtype, found, base, one.values)
