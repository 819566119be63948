"""DELLA (arXiv 2406.11617): elements of a task vector dropped at random, small ones more often.

In each row of c elements (a tensor of one dimension is one row), r = 0 .. c-1 from the smallest
magnitude up:

    p = density - epsilon + 2 epsilon r / (c - 1),   mask ~ Bernoulli(p)

`rescale_norm: density` divides each survivor by its own p (the authors' code, window_size = 2
epsilon), "l1" makes the L1 norm of each tensor what it was (mergekit's). `spread: value` takes p
linear in the magnitude between the row's smallest and largest (the authors' `della_norank`).
"""

from __future__ import annotations

from gemma_ext.ops.souping import RowMask
from gemma_ext.souping.method import Parameter, TensorInfo, Values
from gemma_ext.souping.methods.keys import one_of
from gemma_ext.souping.methods.task_vectors import BY_DENSITY, State, TaskVectors, shared_keys

EPSILON = Parameter("epsilon", 0.15, per_model=True)
SPREAD = Parameter("spread", "rank", kind=str)


class Della(TaskVectors):
    """Survivors of the draws, with an election of signs."""

    name = "della"
    grain = "row"
    elects = True
    parameters = (*shared_keys(normal=True, rescale=True, norm=BY_DENSITY), EPSILON, SPREAD)

    def begin(self, tensor: TensorInfo, values: Values) -> State:
        one_of("spread", values.merge["spread"], ("rank", "value"))
        for density, epsilon in zip(values.of("density"), values.of("epsilon"), strict=True):
            if 0 < density < 1 and not (density - epsilon > 0 and density + epsilon < 1):
                raise ValueError(
                    f"expected density - epsilon > 0 and density + epsilon < 1, "
                    f"got density {density} and epsilon {epsilon} for {tensor.name}"
                )
        return super().begin(tensor, values)

    def sparsify(self, state: State) -> RowMask | None:
        densities, values = state.values.of("density"), state.values
        if min(densities) >= 1:
            return None
        drawn = any(0 < d < 1 for d in densities)
        return RowMask(
            keep=[_ALL if d > 0 else 0 for d in densities],
            density=[d if 0 < d < 1 else None for d in densities] if drawn else None,
            epsilon=values.of("epsilon"),
            spread=values.merge["spread"],
            rescale=drawn and values.merge["rescale"] and state.norm is None,
        )


class DellaLinear(Della):
    """Survivors of the draws, added up."""

    name = "della_linear"
    elects = False
    parameters = (*shared_keys(normal=False, rescale=True, norm=BY_DENSITY), EPSILON, SPREAD)


_ALL = (1 << 31) - 1
