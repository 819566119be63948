"""From a recipe to what an engine runs: for each tensor of the output its inputs and its values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from gemma_ext.souping.method import Method, TensorInfo, Values
from gemma_ext.souping.recipes.evaluate import find_values
from gemma_ext.souping.recipes.layout import Layout, read_layout, split_modules, stands_first
from gemma_ext.souping.recipes.marks import Entry
from gemma_ext.souping.recipes.recipe import Module, Recipe, Slice, Source

_COMPUTED = "rotary_emb.inv_freq"  # old checkpoints store what the model computes by itself


@dataclass(frozen=True)
class Input:
    """A tensor of a model; `model` counts `Recipe.models()`."""

    model: int
    name: str


@dataclass(frozen=True)
class Resolved:
    """A tensor of the output.

    Attributes:
        info: its name, shape and layer.
        sources: what is merged into it.
        base: what deltas are taken from, or None.
        values: the method's parameters for it.
    """

    info: TensorInfo
    sources: tuple[Input, ...]
    base: Input | None
    values: Values


@dataclass(frozen=True, eq=False)
class _Stream:
    """A model within a slice: its layers from `start` on. A slice may hold a model twice."""

    model: int
    start: int
    source: Source | None


@dataclass(frozen=True)
class _Cut:
    """A slice with its models found.

    Attributes:
        module, part: of the recipe.
        layouts: of every model, as far as the module goes.
        length: number of layers.
    """

    module: Module
    part: Slice
    layouts: Sequence[Layout]
    sources: Sequence[_Stream]
    base: _Stream | None
    length: int

    @property
    def used(self) -> list[_Stream]:
        return [*self.sources, *([self.base] if self.base else [])]

    def where(self, stream: _Stream) -> Entry:
        """The place of an error about a model."""
        return stream.source.entry if stream.source else self.part.entry


def resolve(
    recipe: Recipe,
    method: type[Method],
    layouts: Sequence[Layout],
    *,
    seed: int = 0,
    skip: bool = False,
) -> list[Resolved]:
    """Every tensor of the output, by name.

    A tensor with a row per token may have another number of rows in each model; here it gets the
    smallest.

    Args:
        recipe: one that `check_recipe` accepts.
        layouts: of each of `recipe.models()`.
        seed: of everything random.
        skip: tensors that differ in shape are left to the engine, which keeps the base's.

    Raises:
        RecipeError: layers that a model does not have, a tensor missing in a model, shapes that
            differ, a value that no level of the recipe gives.
    """
    resolver = _Resolver(recipe, method, layouts, seed, skip)
    return sorted(resolver.targets(), key=lambda target: target.info.name)


class _Resolver:
    def __init__(
        self,
        recipe: Recipe,
        method: type[Method],
        layouts: Sequence[Layout],
        seed: int,
        skip: bool,
    ) -> None:
        self.recipe, self.method, self.seed, self.skip = recipe, method, seed, skip
        self.models = recipe.models()
        self.layouts = layouts

    def targets(self) -> Iterator[Resolved]:
        for module in self.recipe.modules:
            layouts = self._layouts_of(module)
            cuts = [self._cut(module, part, layouts) for part in module.slices]
            stacked = sum(cut.length for cut in cuts)
            start = 0
            for cut in cuts:
                yield from self._elsewhere(cut, cut is cuts[0], cut is cuts[-1])
                yield from self._layers(cut, start, stacked)
                start += cut.length

    def _layouts_of(self, module: Module) -> Sequence[Layout]:
        if module.name is None:
            return self.layouts
        modules = [each.name for each in self.recipe.modules]
        found = []
        for layout in self.layouts:
            try:
                names = split_modules(list(layout.shapes), modules)[module.name]
            except ValueError as error:
                raise module.entry.error(str(error)) from None
            found.append(read_layout({name: layout.shapes[name] for name in names}))
        return found

    def _cut(self, module: Module, part: Slice, layouts: Sequence[Layout]) -> _Cut:
        streams, length = [], None
        for source in part.sources:
            model = self.models.index(source.model)
            depth = layouts[model].layers
            first, end = source.layers or (0, depth)
            if end > depth:
                raise source.entry.error(
                    f"layer_range: {source.model} has {depth} layers, got [{first}, {end}]"
                )
            if length not in (None, end - first):
                raise source.entry.error(
                    f"{source.model} has {end - first} layers and {part.sources[0].model} has "
                    f"{length}: expected as many, or slices"
                )
            length = end - first
            streams.append(_Stream(model, first, source))
        cut = _Cut(module, part, layouts, streams, None, length)
        base = part.base or self.recipe.base
        if base is None:
            return cut
        model = self.models.index(base)
        listed = next((stream for stream in streams if stream.model == model), None)
        if self.method.base != "unused":
            others = [stream for stream in streams if stream.model != model]
            return replace(cut, sources=others, base=listed or self._beside(cut, model))
        if listed is None and not module.sliced:
            return replace(cut, sources=[*streams, self._beside(cut, model)])
        return cut

    def _beside(self, cut: _Cut, model: int) -> _Stream:
        """A base that is none of the sources: the same layers as theirs."""
        starts = sorted({stream.start for stream in cut.sources})
        depth = cut.layouts[model].layers
        if len(starts) > 1:
            raise cut.part.entry.error(
                f"expected the base {self.models[model]} among the sources, because their layers "
                f"differ: they start at {starts}"
            )
        if starts[0] + cut.length > depth or (depth != cut.length and not cut.module.sliced):
            raise cut.part.entry.error(
                f"the base {self.models[model]} has {depth} layers, the sources have {cut.length}"
            )
        return _Stream(model, starts[0], None)

    def _layers(self, cut: _Cut, start: int, stacked: int) -> Iterator[Resolved]:
        stack = cut.layouts[cut.used[0].model].main
        for step in range(cut.length):
            depth = _depth(step, cut.length)
            layers = {
                stream: (layout.main, stream.start + step, layout)
                for stream in cut.used
                for layout in [cut.layouts[stream.model]]
            }
            rests = dict.fromkeys(
                rest
                for main, layer, layout in layers.values()
                for rest in layout.stacks[main][layer]
            )
            for rest in rests:
                inputs = {s: f"{main}.{layer}.{rest}" for s, (main, layer, _) in layers.items()}
                info = TensorInfo(f"{stack}.{start + step}.{rest}", (), start + step, stacked)
                yield from self._target(cut, inputs, info, depth)

    def _elsewhere(self, cut: _Cut, first: bool, last: bool) -> Iterator[Resolved]:
        """What is in no layer of the main stack: before it, from the first slice, or after it."""
        places: dict[str, tuple[int, int] | None] = {}
        for stream in cut.used:
            places = {**cut.layouts[stream.model].elsewhere(), **places}
        # where any model has a head of its own the output needs one
        places = {**dict.fromkeys(h for layout in cut.layouts for h in layout.heads), **places}
        for name, place in places.items():
            if first if place or stands_first(name) else last:
                depth = _depth(*place) if place else 0.0
                yield from self._target(
                    cut, dict.fromkeys(cut.used, name), TensorInfo(name, ()), depth
                )

    def _target(
        self, cut: _Cut, names: Mapping[_Stream, str], info: TensorInfo, depth: float
    ) -> Iterator[Resolved]:
        found = {stream: self.layouts[stream.model].find(name) for stream, name in names.items()}
        missing = [stream for stream, name in found.items() if name is None]
        if missing:
            if info.name.endswith(_COMPUTED):
                return
            has = next(stream for stream, name in found.items() if name is not None)
            lacks = missing[0]
            raise cut.where(lacks).error(
                f"{self.models[lacks.model]} has no tensor {names[lacks]}, which "
                f"{self.models[has.model]} has"
            )
        inputs = {stream: Input(stream.model, name) for stream, name in found.items()}
        values = find_values(
            self.recipe,
            self.method,
            cut.module,
            cut.part,
            [(self.models[stream.model], stream.source) for stream in cut.sources],
            info.name,
            depth,
            self.seed,
        )
        yield Resolved(
            replace(info, shape=self._shape(cut, inputs)),
            tuple(inputs[stream] for stream in cut.sources),
            inputs[cut.base] if cut.base else None,
            values,
        )

    def _shape(self, cut: _Cut, inputs: Mapping[_Stream, Input]) -> tuple[int, ...]:
        shapes = {s: self.layouts[i.model].shapes[i.name] for s, i in inputs.items()}
        by_token = all(self.layouts[i.model].is_vocabulary(i.name) for i in inputs.values())
        (lead, shape), *others = shapes.items()
        for stream, other in others:
            if by_token and other[1:] == shape[1:]:
                shape = (min(shape[0], other[0]), *shape[1:])
            elif other != shape and not self.skip:
                raise cut.where(stream).error(
                    f"{inputs[stream].name} has shape {list(other)} in "
                    f"{self.models[stream.model]} and {list(shape)} in {self.models[lead.model]}"
                )
        return shape


def _depth(layer: int, layers: int) -> float:
    return layer / (layers - 1) if layers > 1 else 1.0
