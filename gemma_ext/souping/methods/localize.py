"""Masks that say which element belongs to which task.

S = sum_m delta_m.

TALL masks (arXiv 2405.07813): model m uses an element where |delta_m| > lambda_m |S - delta_m|.

    tall_masks   out = theta_0 + S where model `task` uses the element, else theta_0: the model of
                 one task out of what all share
    consensus    out = theta_0 + lambda S where at least `votes` models use the element

Localize-and-Stitch (arXiv 2408.13656), M_m masks of the elements that a task needs:

    out = theta_0 + sum_m M_m delta_m / max(1, sum_j M_j)

    localize_and_stitch   M_m the int(density D) largest |delta_m| of the model (dataless), equals
                          at the threshold dropped unless `keep_equal`
    stitch                M_m given, for example trained: `souping.localize`
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from gemma_ext.ops.souping import Part, Rule, consensus_, fisher_, merge_
from gemma_ext.souping.method import Method, Parameter, TensorInfo, Values
from gemma_ext.souping.methods import model_trim
from gemma_ext.souping.methods.keys import LAMBDA
from gemma_ext.souping.methods.model_trim import KEEP_EQUAL, ModelTrim, TrimState
from gemma_ext.souping.statistics import Statistics, run_of

TALL_LAMBDA = Parameter("tall_lambda", 0.4, per_model=True)
"""The authors choose it per task among .2, .3, .4, .5 and .6 on validation data."""


class TallMasks(Method):
    """One task's model, as its mask finds it in the sum of all task vectors."""

    name = "tall_masks"
    base = "needed"
    parameters = (TALL_LAMBDA, Parameter("task", kind=int))

    def merge(self, part: Part, state: Values) -> None:
        consensus_([part], state.of("tall_lambda"), task=state.merge["task"])


class Consensus(Method):
    """The sum of the task vectors where enough tasks use it."""

    name = "consensus"
    base = "needed"
    parameters = (TALL_LAMBDA, Parameter("votes", 2, kind=int), LAMBDA)

    def merge(self, part: Part, state: Values) -> None:
        consensus_(
            [part],
            state.of("tall_lambda"),
            votes=state.merge["votes"],
            scale=state.merge["lambda"],
        )


class LocalizeAndStitch(ModelTrim):
    """Each model's largest deltas, averaged where models overlap (dataless)."""

    name = "localize_and_stitch"
    parameters = (Parameter("density", 0.1, per_model=True), KEEP_EQUAL)
    rank = staticmethod(model_trim.localize)

    def merge(self, part: Part, state: TrimState) -> None:
        merge_([part], Rule(combine="mean"), mask=state.mask)


class Stitch(Method):
    """Elements under masks that were found elsewhere, averaged where they overlap.

    Args:
        masks: of each model, weight name to a mask of the weight's shape, 0 or 1 in float32 or
            bfloat16. None to read the files that the recipe names under `masks`.
    """

    name = "stitch"
    base = "needed"
    parameters = (Parameter("masks", None, per_model=True, kind=str),)

    def __init__(self, masks: Sequence[Mapping[str, Tensor]] | None = None) -> None:
        self.statistics = Statistics("masks", masks)

    def begin(self, tensor: TensorInfo, values: Values) -> list[Tensor | None]:
        return self.statistics.of(tensor.name, values, tensor.shape)

    def merge(self, part: Part, state: list[Tensor | None]) -> None:
        if None in state:
            part.out.copy_(part.base)
        else:
            fisher_([part], [run_of(state, part)])
