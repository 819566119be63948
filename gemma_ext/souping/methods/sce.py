"""SCE (FuseChat 3.0, arXiv 2408.07990): weights from what varies between the models.

Select: the int(select_topk * (positions of non-zero variance)) positions of a tensor where the
population variance of delta_m over the M models is largest.
Calculate: w_m = mean of delta_m^2 there, over their sum; 1 / M where that is exactly 0.
Erase: A = who has the sign of sum_m delta_m.

    out = theta_0 + sum_{m in A} w_m delta_m / sum_{m in A} w_m

Only the weights look at the selection, as in the authors' code; with `mask_deltas` the deltas are
0 outside of it too, which is what mergekit's method of this name does.
"""

from __future__ import annotations

from dataclasses import dataclass

from gemma_ext.ops.souping import Cut, Magnitudes, Mask, Norms, Part, Rule, merge_
from gemma_ext.souping.method import Method, Parameter, TensorInfo, Values
from gemma_ext.souping.methods.keys import INT8_MASK

_SQUARES = 1  # of `Norms`: the squared L2 norm


@dataclass
class State:
    """One tensor between the calls for it."""

    values: Values
    selects: bool
    norms: Norms
    variance: Magnitudes | None
    cut: Cut | None = None
    mask: Mask | None = None
    weights: list[float] | None = None

    def start(self) -> None:
        """A mask whose ties nobody has counted down."""
        self.mask = None if self.cut is None else Mask(keep=self.cut.fresh())


class Sce(Method):
    """Select, calculate, erase."""

    name = "sce"
    base = "needed"
    surveys = 3
    parameters = (
        Parameter("select_topk", 1.0),
        Parameter("mask_deltas", False, kind=bool),
        INT8_MASK,
    )

    def begin(self, tensor: TensorInfo, values: Values) -> State:
        models = len(values.models)
        selects = values.merge["select_topk"] < 1
        variance = Magnitudes(models, quantity="variance") if selects else None
        return State(values, selects, Norms(models), variance)

    def skips(self, step: int, state: State) -> bool:
        return step < 2 and not state.selects

    def survey(self, step: int, part: Part, state: State) -> None:
        if step == 2:
            state.norms.add([part], mask=state.mask)
        elif state.selects:
            state.variance.survey([part])

    def settle(self, step: int, state: State) -> None:
        if step == 2:
            squares = state.norms.value[0, :, 1, _SQUARES].tolist()
            total = sum(squares)
            state.weights = [s / total if total > 0 else 1.0 / len(squares) for s in squares]
            state.start()
        elif state.selects:
            varying = int(state.variance.counts - state.variance.zeros)
            share = max(0.0, state.values.merge["select_topk"])
            state.variance.settle(int(share * varying))
            if step == 1:
                state.cut, state.variance = state.variance.cut(), None
                state.start()

    def merge(self, part: Part, state: State) -> None:
        rule = Rule(election="sum", weighted=False, combine="weighted_mean")
        mask = state.mask if state.values.merge["mask_deltas"] else None
        merge_([part], rule, state.weights, mask=mask, seed=state.values.seed)
