"""Weighted sums of models.

linear        out = sum_m w_m theta_m, over sum_m w_m with `normalize` (soups, arXiv 2203.05482)
passthrough   out = scale theta_1
greedy soup   starts with the model that scores best on held-out data and offers it the others in
              descending order; each is kept if the mean of all kept so far and it scores higher
              (arXiv 2203.05482, recipe 1)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gemma_ext.ops.souping import Part, soup_
from gemma_ext.souping.method import Method, Parameter, TensorInfo, Values
from gemma_ext.souping.methods.keys import WEIGHT, normalize, shares


class Linear(Method):
    """Weighted mean, or with `normalize` off the weighted sum."""

    name = "linear"
    parameters = (WEIGHT, normalize(True))

    def begin(self, tensor: TensorInfo, values: Values) -> list[float]:
        weights = values.of("weight")
        return shares(weights, tensor.name) if values.merge["normalize"] else weights

    def merge(self, part: Part, state: list[float]) -> None:
        self.merge_all([part], [state])

    def merge_all(self, parts: Sequence[Part], states: Sequence[list[float]]) -> None:
        soup_(parts, states)


class Passthrough(Method):
    """One model's tensor, times `scale` if there is one."""

    name = "passthrough"
    parameters = (Parameter("scale", None, per_model=True),)
    models = (1, 1)

    def merge(self, part: Part, state: Values) -> None:
        (scale,) = state.of("scale")
        soup_([part], 1.0 if scale is None else scale)


def greedy_soup(
    score: Callable[[Sequence[float]], float], models: int, *, accept_equal: bool = False
) -> list[float]:
    """Weights of a greedy soup.

    Args:
        score: held-out score, higher is better, of the linear merge with given weights [M]. It is
            called M times for the models alone and once for every further offer.
        models: M, their number.
        accept_equal: keep an ingredient that leaves the score as it is.

    Returns:
        M weights that add up to 1; equal ones for the ingredients, 0 for the rest.

    Raises:
        ValueError: no model. TypeError: `models` is no number.
    """
    if not isinstance(models, int):
        raise TypeError(f"expected models to be their number, got {type(models).__name__}")
    if models < 1:
        raise ValueError(f"expected at least one model, got {models}")
    alone = [score(_uniform([m], models)) for m in range(models)]
    order = sorted(range(models), key=lambda m: -alone[m])
    kept, best = order[:1], alone[order[0]]
    for model in order[1:]:
        offered = score(_uniform([*kept, model], models))
        if offered > best or (accept_equal and offered == best):
            kept.append(model)
            best = offered
    return _uniform(kept, models)


def _uniform(kept: Sequence[int], models: int) -> list[float]:
    return [1.0 / len(kept) if m in kept else 0.0 for m in range(models)]
