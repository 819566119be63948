"""RegMean: the linear layer whose outputs come nearest to every model's own.

With X_k the inputs that model k's layer sees (rows are tokens) and G_k = X_k^T X_k / rows, its
entries off the diagonal times `reduction` (arXiv 2212.09849, eq. 2):

    W^T = (sum_k c_k G_k)^-1 sum_k c_k G_k W_k^T

solved in float64 with ridge * trace(sum_k c_k G_k) / (D M) added to the diagonal of every G_k,
which pulls towards the mean of the W_k where no input ever went instead of towards zero. What has
no G_k becomes the weighted mean.

RegMean++ is the same formula on other statistics: `regmean_plus_plus`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gemma_ext.ops.souping import Part, soup_
from gemma_ext.souping.method import Method, Parameter, TensorInfo, Values
from gemma_ext.souping.methods.keys import shares
from gemma_ext.souping.statistics import Statistics


def regmean(
    weights: Sequence[Tensor],
    grams: Sequence[Tensor],
    coefficients: Sequence[float] | None = None,
    *,
    reduction: float = 0.5,
    ridge: float = 1e-10,
) -> Tensor:
    """The merged layer.

    Args:
        weights: M tensors [out, in] (`nn.Linear`).
        grams: M tensors [in, in].
        coefficients: M numbers from 0 up, 1 by default.
        reduction: what the entries of a Gram matrix off its diagonal are multiplied by; 1 leaves
            it, 0 weighs every input on its own, 0.5 is MergeBench's choice.
        ridge: relative to the mean of the diagonal of the sum.

    Returns:
        [out, in] float64.

    Raises:
        ValueError: a negative coefficient.
    """
    coefficients = coefficients or [1.0] * len(weights)
    if min(coefficients) < 0:
        raise ValueError(f"expected weights >= 0 with regmean, got {list(coefficients)}")
    scaled = [c * _reduced(g.double(), reduction) for c, g in zip(coefficients, grams, strict=True)]
    whole = torch.stack(scaled).sum(0)
    size = len(whole)
    trace = float(whole.diagonal().sum())
    # without any input the mean is all there is
    shift = ridge * trace / (size * len(weights)) if trace > 0 else 1.0
    eye = torch.eye(size, dtype=torch.float64, device=whole.device) * shift
    target = sum((g + eye) @ w.double().T for g, w in zip(scaled, weights, strict=True))
    factor = torch.linalg.cholesky(whole + len(weights) * eye)
    return torch.cholesky_solve(target, factor).T


def _reduced(gram: Tensor, reduction: float) -> Tensor:
    return reduction * gram + (1 - reduction) * torch.diag(gram.diagonal())


class RegMean(Method):
    """RegMean of every weight that has Gram matrices, the weighted mean of everything else.

    Args:
        grams: of each model, weight name to Gram matrix [in, in]; see `souping.statistics`. None
            to read the files that the recipe names under `grams`.
    """

    name = "regmean"
    grain = "tensor"
    parameters = (
        Parameter("weight", 1.0, per_model=True),
        Parameter("grams", None, per_model=True, kind=str),
        Parameter("reduction", 0.5),
        Parameter("ridge", 1e-10),
    )

    def __init__(self, grams: Sequence[Mapping[str, Tensor]] | None = None) -> None:
        self.statistics = Statistics("grams", grams)

    def begin(self, tensor: TensorInfo, values: Values) -> tuple[list[Tensor] | None, Values]:
        grams = self.statistics.of(tensor.name, values, tensor.shape[-1:] * 2)
        return (None if None in grams else grams), values

    def merge(self, part: Part, state: tuple[list[Tensor] | None, Values]) -> None:
        grams, values = state
        weights = values.of("weight")
        if grams is None:
            soup_([part], shares(weights, part.name))
            return
        merged = regmean(
            part.sources,
            grams,
            weights,
            reduction=values.merge["reduction"],
            ridge=values.merge["ridge"],
        )
        part.out.copy_(merged)
