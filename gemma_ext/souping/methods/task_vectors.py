"""What merges of task vectors have in common, and the plainest of them.

delta_m = theta_m - theta_0, mask_m chosen by a subclass, w_m weights:

    task arithmetic   out = theta_0 + lambda sum_m w_m delta_m        (arXiv 2212.04089)
    all others        out = theta_0 + lambda combine_{m in A} w_m mask_m delta_m / divide_m

combine is a sum, over sum w_m with `normalize`; A is all models, or with an election those whose
sign won (then sum w_m is over A). What was dropped is made up for with `rescale`: by `density`,
dividing by the probability of being kept, or by a norm ("l1", "l2", "linf"), making that of the
whole masked tensor what it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from gemma_ext.ops.souping import Cut, Magnitudes, Mask, Norms, Part, RowMask, Rule, merge_, soup_
from gemma_ext.souping.method import Method, Parameter, TensorInfo, Values
from gemma_ext.souping.methods.keys import (
    DENSITY,
    INT8_MASK,
    LAMBDA,
    NORMS,
    WEIGHT,
    normalize,
    one_of,
)

_TINY = 1e-7  # norms below it are not made equal; mergekit's bound
BY_DENSITY = "density"


@dataclass
class State:
    """One tensor between the calls for it."""

    tensor: TensorInfo
    values: Values
    rule: Rule
    weights: list[float]
    scale: float
    norm: str | None
    """Which norm is kept, or None."""
    trims: bool = False
    """Whether anything is left out."""
    magnitudes: Magnitudes | None = None
    cuts: tuple[Cut, ...] = ()
    mask: Mask | RowMask | None = None
    norms: Norms | None = None
    divide: Any = 1.0


class TaskVectors(Method):
    """Trim, elect, combine.

    A subclass says which elements count by `sparsify`, after at most two surveys of magnitudes
    whose counts are `wanted`.

    Attributes:
        elects: whether signs are elected.
        cuts: how many thresholds of magnitude it wants per model.
    """

    base = "needed"
    elects: ClassVar[bool] = False
    cuts: ClassVar[int] = 0

    @property
    def surveys(self) -> int:
        return (2 if self.cuts else 0) + ("rescale" in {p.key for p in self.parameters})

    def rule(self, values: Values) -> Rule:
        if not self.elects:
            return Rule()
        normal = values.merge["normalize"]
        return Rule(election="sum", combine="weighted_mean" if normal else "sum")

    def wanted(self, state: State) -> list[list[int]] | None:
        """Elements above each cut, [M, cuts]; None: no cut is needed."""
        return None

    def sparsify(self, state: State) -> Mask | RowMask | None:
        """The elements that count, with cuts nobody has used."""
        return None

    def by_density(self, state: State) -> Any:
        """Divisors of what was kept at random, where the mask does not divide itself."""
        return 1.0

    def begin(self, tensor: TensorInfo, values: Values) -> State:
        weights, scale = values.of("weight"), values.merge["lambda"]
        if values.merge["normalize"] and not self.elects:
            total = sum(weights)
            scale = scale / total if abs(total) >= 1e-8 else scale
        state = State(tensor, values, self.rule(values), weights, scale, self._norm(values))
        if self.cuts:
            state.trims = self.wanted(state) is not None
            state.magnitudes = Magnitudes(len(weights), cuts=self.cuts) if state.trims else None
        else:
            state.mask = self.sparsify(state)
            state.trims = state.mask is not None
        if values.merge.get("rescale") and state.norm is None:
            state.divide = self.by_density(state)
        if state.norm is not None:
            state.norms = Norms(len(weights))
        return state

    def _norm(self, values: Values) -> str | None:
        if not values.merge.get("rescale"):
            return None
        defaults = {p.key: p.default for p in self.parameters}
        known = NORMS if defaults["rescale_norm"] in NORMS else (BY_DENSITY, *NORMS)
        norm = one_of("rescale_norm", values.merge["rescale_norm"], known)
        return None if norm == BY_DENSITY else norm

    def skips(self, step: int, state: State) -> bool:
        return not state.trims or (state.norm is None and not self._finds_cuts(step))

    def _finds_cuts(self, step: int) -> bool:
        return self.cuts > 0 and step < 2

    def survey(self, step: int, part: Part, state: State) -> None:
        if self.skips(step, state):
            return
        if self._finds_cuts(step):
            state.magnitudes.survey([part])
        else:
            state.norms.add([part], mask=state.mask, seed=state.values.seed)

    def settle(self, step: int, state: State) -> None:
        if self.skips(step, state):
            return
        if self._finds_cuts(step):
            state.magnitudes.settle(self.wanted(state))
            if step == 1:
                state.cuts = tuple(state.magnitudes.cut(i) for i in range(self.cuts))
                state.magnitudes = None
                state.mask = self.sparsify(state)
        else:
            state.divide = _norm_ratios(state.norms, state.norm)
            state.mask = self.sparsify(state)

    def merge(self, part: Part, state: State) -> None:
        merge_(
            [part],
            state.rule,
            state.weights,
            mask=state.mask,
            divide=state.divide,
            scale=state.scale,
            seed=state.values.seed,
        )


def _norm_ratios(norms: Norms, norm: str) -> list[float]:
    """What masked deltas [M] are divided by to have the norm of the whole ones."""
    whole, kept = norms.value[0, :, :, NORMS.index(norm)].unbind(1)
    if norm == "l2":
        whole, kept = whole.sqrt(), kept.sqrt()
    pairs = zip(whole.tolist(), kept.tolist(), strict=True)
    return [k / w if k >= _TINY else 1.0 for w, k in pairs]


def shared_keys(*, normal: bool, rescale: bool | None = None, norm: str = "l1") -> tuple:
    """The parameters that mergekit gives all of these methods."""
    keys = (WEIGHT, DENSITY, normalize(normal), LAMBDA, INT8_MASK)
    if rescale is None:
        return keys
    return (
        *keys,
        Parameter("rescale", rescale, kind=bool),
        Parameter("rescale_norm", norm, kind=str),
    )


class TaskArithmetic(TaskVectors):
    """The sum of all task vectors."""

    name = "task_arithmetic"
    parameters = (WEIGHT, normalize(False), LAMBDA, INT8_MASK)

    def merge(self, part: Part, state: State) -> None:
        self.merge_all([part], [state])

    def merge_all(self, parts: Sequence[Part], states: Sequence[State]) -> None:
        soup_(parts, [s.weights for s in states], scale=[s.scale for s in states])
