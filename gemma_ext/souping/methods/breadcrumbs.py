"""Model Breadcrumbs (arXiv 2312.06795): neither the smallest nor the largest of a task vector.

Of n elements, ordered from the largest magnitude down,

    breadcrumbs       of a whole tensor: places min(int(gamma n), n - int(density n)) and on,
                      int(density n) of them; mergekit's
    breadcrumbs_row   of each row of the last dimension (the authors' code): the int(gamma n) first
                      are taken out, then the int(density n) first of the rest stay; with
                      `remove_first` off the places int(gamma n) to int(density n)

and sums or, with _ties, the sum of those whose sign is elected.
"""

from __future__ import annotations

from gemma_ext.ops.souping import Mask, RowMask
from gemma_ext.souping.method import Parameter
from gemma_ext.souping.methods.keys import INT8_MASK, normalize
from gemma_ext.souping.methods.task_vectors import State, TaskVectors, shared_keys

GAMMA = Parameter("gamma", 0.01, per_model=True)


class Breadcrumbs(TaskVectors):
    """The middle of every task vector, chosen per tensor."""

    name = "breadcrumbs"
    parameters = (*shared_keys(normal=False, rescale=False), GAMMA)
    cuts = 2

    def wanted(self, state: State) -> list[list[int]] | None:
        densities, n = state.values.of("density"), state.tensor.numel
        if min(densities) >= 1:
            return None
        counts = []
        for density, gamma in zip(densities, state.values.of("gamma"), strict=True):
            stay = min(n, int(max(density, 0.0) * n))
            top = min(int(gamma * n), n - stay) if stay else 0
            counts.append([stay + top, top])
        return counts

    def sparsify(self, state: State) -> Mask | None:
        if not state.cuts:
            return None
        keep, drop = state.cuts
        return Mask(keep=keep.fresh(), drop=drop.fresh())


class BreadcrumbsTies(Breadcrumbs):
    """The middle of every task vector, with an election of signs."""

    name = "breadcrumbs_ties"
    elects = True


class BreadcrumbsRow(TaskVectors):
    """The middle of every row of the task vectors, as the authors' code has it.

    The defaults of density (their beta), gamma and lambda (their alpha) are their first guess.
    """

    name = "breadcrumbs_row"
    grain = "row"
    parameters = (
        Parameter("weight", 1.0, per_model=True),
        Parameter("density", 0.15, per_model=True),
        Parameter("gamma", 0.006, per_model=True),
        Parameter("lambda", 0.2),
        Parameter("remove_first", True, kind=bool),
        normalize(False),
        INT8_MASK,
    )

    def sparsify(self, state: State) -> RowMask:
        width = state.tensor.shape[-1] if state.tensor.shape else 1
        keep = [int(density * width) for density in state.values.of("density")]
        drop = [int(gamma * width) for gamma in state.values.of("gamma")]
        if not state.values.merge["remove_first"]:
            keep = [max(0, k - d) for k, d in zip(keep, drop, strict=True)]
        return RowMask(keep=keep, drop=drop)
