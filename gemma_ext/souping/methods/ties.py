"""TIES merging (arXiv 2306.01708): trim each task vector, elect signs, merge who agrees.

Five trims go by this name; density d, n elements of a tensor, D of the model, v = |delta|:

| method         | among     | kept                                                             |
|----------------|-----------|------------------------------------------------------------------|
| `ties`         | a tensor  | exactly the int(d n) largest, lowest index first among equals    |
|                |           | (mergekit, peft, which leave equals to a sort)                   |
| `ties_ref`     | the model | v >= its (D - int(d D))-th smallest, equals kept (the authors,   |
|                |           | MergeBench, FusionBench)                                         |
| `ties_mergelm` | the model | v > its int((1 - d) D)-th smallest, equals dropped (MergeLM)     |
| `ties_row`     | a row     | int(d columns) largest of each row (codes of DELLA, Breadcrumbs) |
| `ties_ls`      | the model | v > its int(d D)-th largest (Localize-and-Stitch), or with       |
|                |           | `keep_equal` >= (MergeBench's)                                   |

With bf16 weights a fifth of all elements may share the threshold, so they keep different models.

The sign is that of sum_m w_m delta_m (`election: sum`) or of the sum of signs ("count"), over
trimmed deltas with or without weights (`election_weights`); where that is 0, `zero` says: positive,
none, or the majority or minority of all elected signs of the model. Who agrees is merged by
`merge_func`: weighted_mean, mean (over the number that agrees), sum, or max (the largest).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from gemma_ext.ops.souping import Mask, Part, RowMask, Rule, merge_, sign_balance
from gemma_ext.souping.method import Parameter, TensorInfo, Values
from gemma_ext.souping.methods import model_trim
from gemma_ext.souping.methods.keys import INT8_MASK, LAMBDA, one_of
from gemma_ext.souping.methods.model_trim import KEEP_EQUAL, ModelTrim, TrimState
from gemma_ext.souping.methods.task_vectors import State, TaskVectors, shared_keys

_ELECTIONS = ("sum", "count")
_ZEROS = {"positive": 1, "none": 0, "majority": 0, "minority": 0}
_FUNCTIONS = ("weighted_mean", "mean", "sum", "max")


def _election(*, weights: bool, zero: str) -> tuple[Parameter, ...]:
    return (
        Parameter("election", "sum", kind=str),
        Parameter("election_weights", weights, kind=bool),
        Parameter("zero", zero, kind=str),
    )


def _rule(values: Values) -> Rule:
    merge = values.merge
    function = merge.get("merge_func")
    if function is None:
        function = "weighted_mean" if merge["normalize"] else "sum"
    return Rule(
        election=one_of("election", merge["election"], _ELECTIONS),
        weighted=merge["election_weights"],
        zero=_ZEROS[one_of("zero", merge["zero"], tuple(_ZEROS))],
        combine=one_of("merge_func", function, _FUNCTIONS),
    )


class Ties(TaskVectors):
    """Exactly int(density n) elements of each tensor, then mergekit's election and mean."""

    name = "ties"
    elects = True
    cuts = 1
    parameters = (
        *shared_keys(normal=True, rescale=False),
        *_election(weights=True, zero="positive"),
        Parameter("merge_func", None, kind=str),
    )

    def rule(self, values: Values) -> Rule:
        if values.merge["zero"] in ("majority", "minority"):
            raise ValueError(
                f"expected zero to be positive or none with {self.name}, which sees one tensor at "
                f"a time, got {values.merge['zero']!r}"
            )
        return _rule(values)

    def wanted(self, state: State) -> list[list[int]] | None:
        densities = state.values.of("density")
        if min(densities) >= 1:
            return None
        n = state.tensor.numel
        return [[min(n, int(max(d, 0.0) * n))] for d in densities]

    def sparsify(self, state: State) -> Mask | None:
        return Mask(keep=state.cuts[0].fresh()) if state.cuts else None


class TiesRow(Ties):
    """int(density columns) elements of every row."""

    name = "ties_row"
    grain = "row"
    cuts = 0

    def sparsify(self, state: State) -> RowMask | None:
        densities = state.values.of("density")
        width = state.tensor.shape[-1] if state.tensor.shape else 1
        return None if min(densities) >= 1 else RowMask(keep=[int(d * width) for d in densities])


class TiesRef(ModelTrim):
    """One threshold for the whole model, equals kept; the authors' election and mean.

    The weights stand in what is added up, not in the election.
    """

    name = "ties_ref"
    surveys = 3
    parameters = (
        Parameter("weight", 1.0, per_model=True),
        Parameter("density", 0.2, per_model=True),
        LAMBDA,
        INT8_MASK,
        *_election(weights=False, zero="majority"),
        Parameter("merge_func", "mean", kind=str),
    )
    rank = staticmethod(model_trim.authors)

    def __init__(self) -> None:
        super().__init__()
        self.balance = 0

    def begin(self, tensor: TensorInfo, values: Values) -> TrimState:
        _rule(values)  # refused before anything is read
        return super().begin(tensor, values)

    def skips(self, step: int, state: TrimState) -> bool:
        counts = state.values.merge["zero"] in ("majority", "minority")
        return not counts if step == 2 else super().skips(step, state)

    def survey(self, step: int, part: Part, state: TrimState) -> None:
        if step < 2:
            super().survey(step, part, state)
        elif not self.skips(step, state):
            rule = _rule(state.values)
            found = sign_balance([part], rule, state.values.of("weight"), mask=state.mask)
            self.balance += int(found)

    def settle_model(self, step: int, states: Mapping[str, Any]) -> None:
        if step < 2:
            super().settle_model(step, states)

    def merge(self, part: Part, state: TrimState) -> None:
        values, rule = state.values, _rule(state.values)
        sign = (self.balance > 0) - (self.balance < 0)
        elected = {"majority": sign, "minority": -sign}.get(values.merge["zero"], rule.zero)
        merge_(
            [part],
            replace(rule, zero=elected),
            values.of("weight"),
            mask=state.mask,
            scale=values.merge["lambda"],
        )


class TiesMergeLM(TiesRef):
    """One threshold for the whole model, equals dropped."""

    name = "ties_mergelm"
    rank = staticmethod(model_trim.mergelm)
    equals = "none"


class TiesLocalize(TiesRef):
    """One threshold for the whole model: the smallest of the int(density D) largest."""

    name = "ties_ls"
    rank = staticmethod(model_trim.localize)
    parameters = (*TiesRef.parameters, KEEP_EQUAL)
