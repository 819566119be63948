"""Methods that turn: a survey for the Gram matrix, a sum with what `directions` makes of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gemma_ext.ops.souping import Gram, Part, gram_rows, soup_
from gemma_ext.souping.method import Method, Parameter, TensorInfo, Values
from gemma_ext.souping.methods import directions
from gemma_ext.souping.methods.keys import WEIGHT, shares


@dataclass
class State:
    """One tensor between the calls for it."""

    tensor: TensorInfo
    values: Values
    gram: Gram
    coefficients: Any = None


class _Flat(Method):
    """Coefficients of whole tensors."""

    surveys = 1

    def begin(self, tensor: TensorInfo, values: Values) -> State:
        return State(tensor, values, Gram(len(values.models)))

    def survey(self, step: int, part: Part, state: State) -> None:
        state.gram.add([part])

    def settle(self, step: int, state: State) -> None:
        state.coefficients = self.combine(state.gram.value[0], state.values)

    def combine(self, gram: Tensor, values: Values) -> Tensor:
        raise NotImplementedError

    def merge(self, part: Part, state: State) -> None:
        soup_([part], state.coefficients)


class Slerp(_Flat):
    """From the base (t = 0) to the one other model (t = 1) along the arc between them.

    As in mergekit a straight line where the cosine is above 0.9995, which fine-tunes of one base
    nearly always are.
    """

    name = "slerp"
    parameters = (Parameter("t"),)
    base = "needed"
    models = (1, 1)

    def begin(self, tensor: TensorInfo, values: Values) -> State:
        return State(tensor, values, Gram(2))

    def survey(self, step: int, part: Part, state: State) -> None:
        state.gram.add([_ends(part)])

    def combine(self, gram: Tensor, values: Values) -> Tensor:
        return directions.slerp(gram, values.merge["t"], straight_above=directions.STRAIGHT_ABOVE)

    def merge(self, part: Part, state: State) -> None:
        soup_([_ends(part)], state.coefficients)


def _ends(part: Part) -> Part:
    return Part([part.base, *part.sources], None, part.out, part.name, part.offset)


class NuSlerp(Method):
    """Along the arc between two models, or with a base between their task vectors.

    t = w_2 / (w_1 + w_2), 0.5 where the weights cancel. With `nuslerp_flatten` off every row of
    the last dimension turns on its own, with `nuslerp_row_wise` as well every column, as the names
    have it in mergekit.
    """

    name = "nuslerp"
    base = "optional"
    models = (2, 2)
    grain = "row"
    surveys = 1
    parameters = (
        WEIGHT,
        Parameter("nuslerp_flatten", True, kind=bool),
        Parameter("nuslerp_row_wise", False, kind=bool),
    )

    def begin(self, tensor: TensorInfo, values: Values) -> State:
        return State(tensor, values, Gram(2))

    def _flat(self, state: State) -> bool:
        return state.values.merge["nuslerp_flatten"]

    def _columns(self, state: State) -> bool:
        return state.values.merge["nuslerp_row_wise"] and len(state.tensor.shape) > 1

    def skips(self, step: int, state: State) -> bool:
        return not self._flat(state) and not self._columns(state)

    def survey(self, step: int, part: Part, state: State) -> None:
        if self._flat(state):
            state.gram.add([part])
        elif self._columns(state):
            x = _deltas(part)
            seen = 0.0 if state.coefficients is None else state.coefficients
            state.coefficients = seen + torch.einsum("irc,jrc->cij", x, x)

    def settle(self, step: int, state: State) -> None:
        if self._flat(state):
            state.coefficients = self._arc(state.gram.value[0], state)
        elif self._columns(state):
            state.coefficients = self._arc(state.coefficients, state)

    def _arc(self, gram: Tensor, state: State) -> Tensor:
        first, second = state.values.of("weight")
        total = first + second
        return directions.slerp(gram, 0.5 if abs(total) < 1e-6 else second / total)

    def merge(self, part: Part, state: State) -> None:
        if self._flat(state):
            soup_([part], state.coefficients)
        elif self._columns(state):
            merged = torch.einsum("irc,ci->rc", _deltas(part), state.coefficients)
            base = 0.0 if part.base is None else part.base.double().reshape(merged.shape)
            part.out.copy_((base + merged).reshape(part.out.shape))
        else:
            soup_([part], self._arc(gram_rows([part]), state), rows=True)


def _deltas(part: Part) -> Tensor:
    """float64 [M, rows, columns]."""
    x = torch.stack([source.double() for source in part.sources])
    x = x if part.base is None else x - part.base.double()
    return x.reshape(len(x), -1, x.shape[-1])


class MultiSlerp(_Flat):
    """The barycentre of directions around their mean, of task vectors if there is a base."""

    name = "multislerp"
    base = "optional"
    parameters = (
        WEIGHT,
        Parameter("normalize_weights", True, kind=bool),
        Parameter("eps", 1e-8),
    )

    def combine(self, gram: Tensor, values: Values) -> Tensor:
        weights = values.of("weight")
        if values.merge["normalize_weights"]:
            weights = shares(weights, "multislerp")
        weights = torch.tensor(weights, dtype=torch.float64)
        return directions.multislerp(gram, weights, values.merge["eps"])


class Karcher(_Flat):
    """The Karcher mean of the models' directions."""

    name = "karcher"
    parameters = (Parameter("max_iter", 10, kind=int), Parameter("tol", 1e-5))

    def combine(self, gram: Tensor, values: Values) -> Tensor:
        return directions.karcher(gram, max_iter=values.merge["max_iter"], tol=values.merge["tol"])


class ModelStock(Method):
    """The mean of the models, drawn towards the base as far as their angles say.

    With `filter_wise` every row of the last dimension by its own angles.
    """

    name = "model_stock"
    base = "needed"
    models = (2, None)
    grain = "row"
    surveys = 1
    parameters = (Parameter("filter_wise", False, kind=bool),)

    def begin(self, tensor: TensorInfo, values: Values) -> State:
        return State(tensor, values, Gram(len(values.models)))

    def skips(self, step: int, state: State) -> bool:
        return state.values.merge["filter_wise"]

    def survey(self, step: int, part: Part, state: State) -> None:
        if not self.skips(step, state):
            state.gram.add([part])

    def settle(self, step: int, state: State) -> None:
        if not self.skips(step, state):
            state.coefficients = float(directions.model_stock(state.gram.value[0]))

    def merge(self, part: Part, state: State) -> None:
        share = 1.0 / len(part.sources)
        if state.values.merge["filter_wise"]:
            soup_([part], share, scale=directions.model_stock(gram_rows([part])), rows=True)
        else:
            soup_([part], share, scale=state.coefficients)
