"""Fisher merging (arXiv 2111.09832): each element weighs what each model knows about it.

    out = sum_m c_m F_m theta_m / sum_m c_m F_m

elementwise, F_m the diagonal of model m's Fisher information (`souping.statistics`). With
`normalize` c_m is divided by the L2 norm of F_m over the whole model, so that a model is not the
louder for having larger gradients. F below `floor` counts as `floor`: of the first model alone with
`floor_first`, which is the target model of the authors' code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from gemma_ext.ops.souping import Part, fisher_, soup_
from gemma_ext.souping.method import Method, Parameter, TensorInfo, Values
from gemma_ext.souping.methods.keys import shares
from gemma_ext.souping.statistics import Statistics, run_of


class Fisher(Method):
    """Fisher-weighted mean of what has Fisher diagonals, the weighted mean of everything else.

    Args:
        fishers: of each model, weight name to diagonal of the weight's shape. None to read the
            files that the recipe names under `fishers`.
    """

    name = "fisher"
    base = "optional"
    parameters = (
        Parameter("weight", 1.0, per_model=True),
        Parameter("fishers", None, per_model=True, kind=str),
        Parameter("normalize", True, kind=bool),
        Parameter("floor", 1e-6),
        Parameter("floor_first", False, kind=bool),
    )

    def __init__(self, fishers: Sequence[Mapping[str, Tensor]] | None = None) -> None:
        self.statistics = Statistics("fishers", fishers)
        self.norms: list[float] | None = None

    def begin(
        self, tensor: TensorInfo, values: Values
    ) -> tuple[list[Tensor | None], list[float], Values]:
        weights = values.of("weight")
        fishers = self.statistics.of(tensor.name, values, tensor.shape)
        if values.merge["normalize"]:
            if self.norms is None:
                self.norms = [_norm(held) for held in self.statistics.all(values)]
            weights = [w / n if n else w for w, n in zip(weights, self.norms, strict=True)]
        return fishers, weights, values

    def merge(self, part: Part, state: tuple[list[Tensor | None], list[float], Values]) -> None:
        fishers, weights, values = state
        if None in fishers:
            bare = Part(part.sources, None, part.out, part.name, part.offset)
            soup_([bare], shares(values.of("weight"), part.name))
            return
        floors = [values.merge["floor"]] * len(fishers)
        if values.merge["floor_first"]:
            floors[1:] = [0.0] * (len(fishers) - 1)
        fisher_([part], [run_of(fishers, part)], weights, floor=floors)


def _norm(fishers: Mapping[str, Tensor]) -> float:
    return sum(float(f.double().square().sum()) for f in fishers.values()) ** 0.5
