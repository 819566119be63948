"""Recipes: mergekit's YAML, read completely or refused with file, line and key.

What is read is only checked against itself here; `resolve` holds it against a method and
against the models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemma_ext.souping.recipes.chat import TEMPLATES
from gemma_ext.souping.recipes.marks import Entry, RecipeError, read_yaml
from gemma_ext.souping.recipes.references import ModelReference, read_reference
from gemma_ext.souping.recipes.tokens import TokenizerRecipe, read_tokenizer
from gemma_ext.souping.recipes.values import Settings, read_settings

DTYPES = ("float32", "bfloat16", "float16")
_TOP = (
    *("merge_method", "models", "slices", "modules", "base_model", "dtype", "out_dtype"),
    *("parameters", "tokenizer_source", "tokenizer", "chat_template", "name"),
)


@dataclass(frozen=True)
class Source:
    """Layers of one model.

    Attributes:
        layers: first and one past the last; None for all.
        settings: `parameters` of this model alone.
    """

    model: ModelReference
    layers: tuple[int, int] | None
    settings: Settings
    entry: Entry


@dataclass(frozen=True)
class Slice:
    """Layers of the output that are merged from the same sources; all sources of one length."""

    sources: tuple[Source, ...]
    base: ModelReference | None
    settings: Settings
    entry: Entry


@dataclass(frozen=True)
class Module:
    """A part of the model that is put together by itself.

    Attributes:
        name: None where the recipe has no `modules`.
        slices: stacked on each other.
        sliced: false where `models` merge whole; then there is one slice.
    """

    name: str | None
    slices: tuple[Slice, ...]
    sliced: bool
    settings: Settings
    entry: Entry


@dataclass(frozen=True)
class Recipe:
    """One document.

    Attributes:
        method: name of the merge method.
        modules: what is put together; one without a name for most models.
        base: what deltas are taken from.
        dtype, out_dtype: of the output, the second before the first. Arithmetic is at least
            float32 whatever they are.
        settings: `parameters` at the top.
        chat_template: "auto", a name of TEMPLATES or Jinja.
        name: of this merge among several in one file.
        text: of the document, comments and all.
        entry: the document; `entry.value` is plain data.
    """

    method: str
    modules: tuple[Module, ...]
    base: ModelReference | None
    dtype: str | None
    out_dtype: str | None
    settings: Settings
    tokenizer: TokenizerRecipe | None
    chat_template: str | None
    name: str | None
    text: str
    entry: Entry
    keys: Mapping[str, Entry] = field(repr=False)

    def models(self) -> list[ModelReference]:
        """Every model once, in the order of the file, a base that is none of the sources last."""
        found = [s.model for module in self.modules for part in module.slices for s in part.sources]
        bases = [part.base for module in self.modules for part in module.slices]
        return list(dict.fromkeys([*found, *(base for base in [*bases, self.base] if base)]))

    def entry_of(self, model: ModelReference) -> Entry:
        """Where a model is named first."""
        for module in self.modules:
            for part in module.slices:
                for source in part.sources:
                    if source.model == model:
                        return source.entry
        own = [part.entry for m in self.modules for part in m.slices if part.base == model]
        return own[0] if own else self.keys["base_model"]


def read_recipes(path: Path | str) -> list[Recipe]:
    """The recipes of a file, in an order in which each finds those that it names.

    Raises:
        RecipeError: with file, line and key; no file.
        OSError: the file cannot be read.
    """
    if not Path(path).exists():
        raise RecipeError(f"{path}: expected a recipe, got no file")
    return parse_recipes(Path(path).read_text(encoding="utf-8"), str(path))


def parse_recipes(text: str, file: str = "recipe") -> list[Recipe]:
    """The recipes of a text; `file` is shown in errors."""
    entries = read_yaml(text, file)
    if not entries:
        raise RecipeError(f"{file}: expected a recipe, got nothing")
    recipes = [_read_document(entry, text) for entry in entries]
    return list(_in_order(recipes))


def parse_recipe(data: Mapping[str, Any] | str, file: str = "recipe") -> Recipe:
    """A single recipe from text or from plain data."""
    if not isinstance(data, str):
        import yaml

        data = yaml.safe_dump(dict(data), sort_keys=False)
    recipes = parse_recipes(data, file)
    if len(recipes) != 1:
        raise RecipeError(f"{file}: expected one recipe, got {len(recipes)}")
    return recipes[0]


def _read_document(entry: Entry, text: str) -> Recipe:
    keys = entry.mapping(_TOP)
    if "merge_method" not in keys:
        raise entry.error("expected merge_method among the keys")
    given = [name for name in ("models", "slices", "modules") if name in keys]
    if len(given) != 1:
        got = " and ".join(given) or "none"
        raise entry.error(f"expected exactly one of models, slices and modules, got {got}")
    template = keys.get("chat_template")
    start, end = entry.node.start_mark.index, entry.node.end_mark.index
    return Recipe(
        method=keys["merge_method"].text(),
        modules=tuple(_modules(keys, entry)),
        base=_reference(keys.get("base_model")),
        dtype=_dtype(keys.get("dtype")),
        out_dtype=_dtype(keys.get("out_dtype")),
        settings=read_settings(keys.get("parameters")),
        tokenizer=read_tokenizer(keys),
        chat_template=template and _template(template),
        name=keys["name"].text() if "name" in keys else None,
        text=text[start:end],
        entry=entry,
        keys=keys,
    )


def _modules(keys: Mapping[str, Entry], entry: Entry) -> Iterator[Module]:
    if "modules" not in keys:
        yield _module(None, keys, {}, entry)
        return
    for name, part in keys["modules"].mapping().items():
        inner = part.mapping(("models", "slices", "parameters"))
        if ("models" in inner) == ("slices" in inner):
            raise part.error("expected exactly one of models and slices")
        yield _module(name, inner, read_settings(inner.get("parameters")), part)


def _module(
    name: str | None, keys: Mapping[str, Entry], settings: Settings, entry: Entry
) -> Module:
    if "models" in keys:
        sources = [_source(item, ("model", "parameters")) for item in _some(keys["models"])]
        slices = [Slice(_distinct(sources), None, {}, keys["models"])]
    else:
        slices = [_slice(item) for item in _some(keys["slices"])]
    return Module(name, tuple(slices), "slices" in keys, settings, entry)


def _slice(entry: Entry) -> Slice:
    keys = entry.mapping(("sources", "base_model", "residual_weight", "parameters"))
    if "sources" not in keys:
        raise entry.error("expected sources among the keys")
    sources = [
        _source(item, ("model", "layer_range", "parameters")) for item in _some(keys["sources"])
    ]
    lengths = {s.layers[1] - s.layers[0] for s in sources if s.layers}
    if len(lengths) > 1:
        raise keys["sources"].error(
            f"expected layer ranges of one length, got {sorted(lengths)} layers"
        )
    settings = read_settings(keys.get("parameters"))
    return Slice(tuple(sources), _reference(keys.get("base_model")), settings, entry)


def _source(entry: Entry, allowed: tuple[str, ...]) -> Source:
    keys = entry.mapping(allowed)
    if "model" not in keys:
        raise entry.error("expected model among the keys")
    layers = None
    if "layer_range" in keys:
        ends = [item.integer() for item in keys["layer_range"].items()]
        if len(ends) != 2 or not 0 <= ends[0] < ends[1]:
            raise keys["layer_range"].error(
                f"expected [first, one past the last] with 0 <= first < last, got {ends}"
            )
        layers = (ends[0], ends[1])
    elif "layer_range" in allowed:
        raise entry.error("expected layer_range among the keys")
    settings = read_settings(keys.get("parameters"))
    return Source(read_reference(keys["model"]), layers, settings, entry)


def _distinct(sources: list[Source]) -> tuple[Source, ...]:
    seen: set[ModelReference] = set()
    for source in sources:
        if source.model in seen:
            raise source.entry.error(f"{source.model} is listed twice")
        seen.add(source.model)
    return tuple(sources)


def _template(entry: Entry) -> str:
    text = entry.text()
    if text in ("auto", *TEMPLATES) or "{" in text:
        return text
    raise entry.error(f"expected auto, one of {', '.join(TEMPLATES)}, or a Jinja text, got {text}")


def _dtype(entry: Entry | None) -> str | None:
    if entry is None:
        return None
    name = entry.text().removeprefix("torch.")
    if name not in DTYPES:
        raise entry.error(f"expected one of {', '.join(DTYPES)}, got {entry.text()}")
    return name


def _reference(entry: Entry | None) -> ModelReference | None:
    return None if entry is None else read_reference(entry)


def _some(entry: Entry) -> list[Entry]:
    items = entry.items()
    if not items:
        raise entry.error("expected at least one, got an empty list")
    return items


def _in_order(recipes: list[Recipe]) -> Iterator[Recipe]:
    """Those that others are made of first; every document but one has a name of its own."""
    by_name: dict[str, Recipe] = {}
    for recipe in recipes:
        if recipe.name is None and len(recipes) > 1 and recipe is not recipes[-1]:
            raise recipe.entry.error("expected a name: only the last of several recipes has none")
        if recipe.name in by_name:
            raise recipe.keys["name"].error(f"{recipe.name} is the name of an earlier recipe")
        if recipe.name is not None:
            by_name[recipe.name] = recipe
    done: dict[int, None] = {}

    def visit(recipe: Recipe, above: tuple[Recipe, ...]) -> Iterator[Recipe]:
        if recipe in above:
            raise recipe.entry.error(f"{recipe.name} is made of itself")
        if id(recipe) in done:
            return
        for model in recipe.models():
            if str(model) in by_name:
                yield from visit(by_name[str(model)], (*above, recipe))
        done[id(recipe)] = None
        yield recipe

    for recipe in recipes:
        yield from visit(recipe, ())
