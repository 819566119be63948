"""From a recipe to what an engine runs: for each tensor of the output its inputs and its values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from gemma_ext.souping.evaluate import find_values
from gemma_ext.souping.layout import Layout, read_layout, split_modules, stands_first
from gemma_ext.souping.method import Method, TensorInfo, Values
from gemma_ext.souping.recipe import Module, Recipe, Slice, Source

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


class _Cut(NamedTuple):
    """A slice with its models found."""

    sources: list[_Stream]
    base: _Stream | None
    length: int


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
            for position, (part, cut) in enumerate(zip(module.slices, cuts, strict=True)):
                ends = (position == 0, position == len(cuts) - 1)
                yield from self._elsewhere(module, part, cut, layouts, *ends)
                yield from self._layers(module, part, cut, layouts, start, stacked)
                start += cut.length

    def _layouts_of(self, module: Module) -> list[Layout]:
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

    def _cut(self, module: Module, part: Slice, layouts: list[Layout]) -> _Cut:
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
        base = part.base or self.recipe.base
        if base is None:
            return _Cut(streams, None, length)
        model = self.models.index(base)
        listed = next((stream for stream in streams if stream.model == model), None)
        if self.method.base != "unused":
            own = listed or self._beside(module, part, layouts, streams, model, length)
            return _Cut([stream for stream in streams if stream.model != model], own, length)
        if listed is None and not module.sliced:
            streams.append(self._beside(module, part, layouts, streams, model, length))
        return _Cut(streams, None, length)

    def _beside(
        self,
        module: Module,
        part: Slice,
        layouts: list[Layout],
        streams: list[_Stream],
        model: int,
        length: int,
    ) -> _Stream:
        """A base that is none of the sources: the same layers as theirs."""
        starts = sorted({stream.start for stream in streams})
        depth = layouts[model].layers
        if len(starts) > 1:
            raise part.entry.error(
                f"expected the base {self.models[model]} among the sources, because their layers "
                f"differ: they start at {starts}"
            )
        if starts[0] + length > depth or (depth != length and not module.sliced):
            raise part.entry.error(
                f"the base {self.models[model]} has {depth} layers, the sources have {length}"
            )
        return _Stream(model, starts[0], None)

    def _layers(
        self,
        module: Module,
        part: Slice,
        cut: _Cut,
        layouts: list[Layout],
        start: int,
        stacked: int,
    ) -> Iterator[Resolved]:
        used = [*cut.sources, *([cut.base] if cut.base else [])]
        lead = layouts[used[0].model]
        for step in range(cut.length):
            names = {
                stream: layouts[stream.model].stacks[layouts[stream.model].main] for stream in used
            }
            rests = dict.fromkeys(
                rest for stream, layers in names.items() for rest in layers[stream.start + step]
            )
            for rest in rests:
                inputs = {
                    stream: f"{layouts[stream.model].main}.{stream.start + step}.{rest}"
                    for stream in used
                }
                info = TensorInfo(f"{lead.main}.{start + step}.{rest}", (), start + step, stacked)
                depth = step / (cut.length - 1) if cut.length > 1 else 1.0
                yield from self._target(module, part, cut, inputs, info, depth)

    def _elsewhere(
        self,
        module: Module,
        part: Slice,
        cut: _Cut,
        layouts: list[Layout],
        first: bool,
        last: bool,
    ) -> Iterator[Resolved]:
        used = [*cut.sources, *([cut.base] if cut.base else [])]
        names: dict[str, tuple[int, int] | None] = {}
        for stream in used:
            names = {**layouts[stream.model].elsewhere(), **names}
        for name, place in names.items():
            if not (first if place or stands_first(name) else last):
                continue
            depth = 0.0
            if place:
                depth = place[0] / (place[1] - 1) if place[1] > 1 else 1.0
            inputs = dict.fromkeys(used, name)
            yield from self._target(module, part, cut, inputs, TensorInfo(name, ()), depth)

    def _target(
        self,
        module: Module,
        part: Slice,
        cut: _Cut,
        inputs: Mapping[_Stream, str],
        info: TensorInfo,
        depth: float,
    ) -> Iterator[Resolved]:
        found = {stream: self.layouts[stream.model].find(name) for stream, name in inputs.items()}
        missing = [stream for stream, name in found.items() if name is None]
        if missing:
            if info.name.endswith(_COMPUTED):
                return
            where = missing[0].source.entry if missing[0].source else part.entry
            has = next(stream for stream, name in found.items() if name is not None)
            raise where.error(
                f"{self.models[missing[0].model]} has no tensor {inputs[missing[0]]}, which "
                f"{self.models[has.model]} has"
            )
        shape = self._shape(part, {s: Input(s.model, name) for s, name in found.items()})
        info = replace(info, shape=shape)
        values = find_values(
            self.recipe,
            self.method,
            module,
            part,
            [(self.models[s.model], s.source) for s in cut.sources],
            info.name,
            depth,
            self.seed,
        )
        yield Resolved(
            info,
            tuple(Input(s.model, found[s]) for s in cut.sources),
            Input(cut.base.model, found[cut.base]) if cut.base else None,
            values,
        )

    def _shape(self, part: Slice, inputs: Mapping[_Stream, Input]) -> tuple[int, ...]:
        shapes = {s: self.layouts[i.model].shapes[i.name] for s, i in inputs.items()}
        first, *others = shapes.items()
        shape = first[1]
        for stream, other in others:
            if other == shape:
                continue
            if (
                other[1:] == shape[1:]
                and shape
                and all(self.layouts[i.model].is_vocabulary(i.name) for i in inputs.values())
            ):
                shape = (min(shape[0], other[0]), *shape[1:])
            elif not self.skip:
                where = stream.source.entry if stream.source else part.entry
                raise where.error(
                    f"{inputs[stream].name} has shape {list(other)} in "
                    f"{self.models[stream.model]} and {list(shape)} in "
                    f"{self.models[first[0].model]}"
                )
        return shape
