"""Reinforced agent merging (arXiv 2601.13572) and MagMax (arXiv 2407.06322): who moves an element.

Model m is active where |delta_m| > epsilon, A the active ones of an element.

ram          out = theta_0 + mean_{m in A} delta_m
ramplus_tl   the same, and where m is alone its delta times
             1 + r clip(shared_m / unique_m, 0, alpha), counts of elements where it is active with
             others and alone, per tensor
magmax       out = theta_0 + lambda (the delta of largest magnitude)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gemma_ext.ops.souping import Cut, Mask, Part, Rule, merge_, overlaps
from gemma_ext.souping.method import Method, Parameter, TensorInfo, Values
from gemma_ext.souping.methods.keys import LAMBDA

EPSILON = Parameter("epsilon", 1e-5)
_MEAN = Rule(combine="mean")


def _active(values: Values) -> Mask:
    return Mask(keep=Cut.above(values.merge["epsilon"], len(values.models)))


class Ram(Method):
    """Mean over the models that moved."""

    name = "ram"
    base = "needed"
    parameters = (EPSILON,)

    def merge(self, part: Part, state: Values) -> None:
        merge_([part], _MEAN, mask=_active(state))


@dataclass
class State:
    """One tensor between the calls for it."""

    values: Values
    counts: torch.Tensor
    """int64 [M, 2], alone and with others."""


class RamPlus(Method):
    """Mean over the models that moved; who moved alone counts more the more it shares elsewhere."""

    name = "ramplus_tl"
    base = "needed"
    surveys = 1
    parameters = (EPSILON, Parameter("r", 0.1), Parameter("alpha", 0.2))

    def begin(self, tensor: TensorInfo, values: Values) -> State:
        return State(values, torch.zeros(len(values.models), 2, dtype=torch.int64))

    def survey(self, step: int, part: Part, state: State) -> None:
        state.counts += overlaps([part], _active(state.values))[0].to(state.counts)

    def merge(self, part: Part, state: State) -> None:
        merge, (alone, shared) = state.values.merge, state.counts.double().unbind(1)
        # a model that never stands alone has nothing to scale
        ratio = (shared / alone.clamp(min=1)).clamp(0, merge["alpha"])
        factors = 1 + merge["r"] * ratio
        merge_([part], _MEAN, mask=_active(state.values), alone=factors)


class MagMax(Method):
    """The delta of largest magnitude, the first of equals."""

    name = "magmax"
    base = "needed"
    parameters = (LAMBDA,)

    def merge(self, part: Part, state: Values) -> None:
        merge_([part], Rule(combine="max"), scale=state.merge["lambda"])
