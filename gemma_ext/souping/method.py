"""The one shape of a merge method: it looks at parts of a tensor some times, then writes them.

    state = method.begin(tensor, values)
    for step in range(method.surveys):
        for part in parts of the tensor, in order: method.survey(step, part, state)
        method.settle(step, state)
    for part in parts of the tensor, in order: method.merge(part, state)

An engine decides where the parts come from: `souping.engine.memory` gives whole resident tensors,
`souping.engine.stream` chunks of files. A method never knows, and never sees more than one part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from gemma_ext.ops.souping.parts import Part


class Required:
    """Default of a parameter that a recipe has to give."""


@dataclass(frozen=True)
class Parameter:
    """A parameter of a method, under its key in mergekit's YAML.

    Attributes:
        key: its name.
        default: the value where a recipe gives none; `Required` if it has to.
        per_model: one value per model (weight, density), else one for the merge (lambda).
        kind: float, bool, int or str.
    """

    key: str
    default: Any = Required
    per_model: bool = False
    kind: type = float


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of the output.

    Attributes:
        name: in the output checkpoint.
        shape: of the whole tensor.
        layer, layers: which of how many decoder layers it belongs to; None outside of them.
    """

    name: str
    shape: tuple[int, ...]
    layer: int | None = None
    layers: int = 0

    @property
    def numel(self) -> int:
        product = 1
        for size in self.shape:
            product *= size
        return product


@dataclass(frozen=True)
class Values:
    """Parameters as they stand for one tensor, gradients and filters already evaluated.

    Attributes:
        models: of each of the M sources (the base is none), key to value.
        merge: of the merge as a whole.
        seed: of everything random.
    """

    models: Sequence[Mapping[str, Any]]
    merge: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    def of(self, key: str) -> list[Any]:
        """The M values of a per-model parameter."""
        return [model[key] for model in self.models]


class Method:
    """A way to merge M models; one object serves a whole merge.

    Attributes:
        name: in recipes.
        parameters: what it takes; the engine refuses others and fills in defaults.
        base: "needed", "optional" or "unused".
        models: least and most number of sources, None without a bound.
        grain: the smallest piece that `survey` and `merge` take: any "element", whole "row"s of
            the last dimension, or the whole "tensor".
        surveys: reading passes before `merge`.
        model_wide: surveys see every tensor of the model before the first merge; then `begin` is
            called for every tensor first, and `settle_model` between the steps.
    """

    name: ClassVar[str]
    parameters: ClassVar[tuple[Parameter, ...]] = ()
    base: ClassVar[str] = "unused"
    models: ClassVar[tuple[int, int | None]] = (1, None)
    grain: ClassVar[str] = "element"
    surveys: int = 0
    model_wide: bool = False

    def begin(self, tensor: TensorInfo, values: Values) -> Any:
        """State of one tensor, handed back to every later call for it."""
        return values

    def skips(self, step: int, state: Any) -> bool:
        """Whether this step has nothing to learn from this tensor, so that no part need be read."""
        return False

    def survey(self, step: int, part: Part, state: Any) -> None:
        """Takes in one part; `part.out` is None."""

    def settle(self, step: int, state: Any) -> None:
        """All parts of the tensor were seen in this step."""

    def settle_model(self, step: int, states: Mapping[str, Any]) -> None:
        """All tensors were seen in this step, by name; only where `model_wide`."""

    def merge(self, part: Part, state: Any) -> None:
        """Writes `part.out`."""
        raise NotImplementedError

    def merge_all(self, parts: Sequence[Part], states: Sequence[Any]) -> None:
        """As `merge` of one after another; a method may do it in one call of an op. Who changes the
        `merge` of such a method changes this as well."""
        for part, state in zip(parts, states, strict=True):
            self.merge(part, state)
