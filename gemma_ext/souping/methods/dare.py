"""DARE (arXiv 2311.03099): drop elements of the task vectors at random, make up for it.

    mask_m ~ Bernoulli(density_m),   out = theta_0 + lambda combine_m w_m mask_m delta_m / density_m

`rescale_norm: density` is the paper's division by the probability of being kept and keeps the
expectation; "l1" is what mergekit calls rescale: the L1 norm of each tensor is made what it was.
The draws depend on (seed, tensor, model, position) alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gemma_ext.ops.souping import Mask, Part, merge_
from gemma_ext.souping.methods.task_vectors import BY_DENSITY, State, TaskVectors, shared_keys


class DareLinear(TaskVectors):
    """Random elements of the task vectors, added up."""

    name = "dare_linear"
    parameters = shared_keys(normal=False, rescale=True, norm=BY_DENSITY)

    def sparsify(self, state: State) -> Mask | None:
        density = state.values.of("density")
        return None if min(density) >= 1 else Mask(density=density)

    def by_density(self, state: State) -> list[float]:
        return [d if 0 < d < 1 else 1.0 for d in state.values.of("density")]

    def merge_all(self, parts: Sequence[Part], states: Sequence[State]) -> None:
        """One call for all tensors of a rule, a seed and draws or none."""
        alike: dict[Any, list[int]] = {}
        for i, state in enumerate(states):
            alike.setdefault((state.rule, state.values.seed, state.mask is None), []).append(i)
        for (rule, seed, whole), places in alike.items():
            own = [states[i] for i in places]
            ones = [1.0] * len(own[0].weights)
            merge_(
                [parts[i] for i in places],
                rule,
                [state.weights for state in own],
                mask=None if whole else Mask(density=[state.mask.density for state in own]),
                divide=[ones if state.divide == 1.0 else state.divide for state in own],
                scale=[state.scale for state in own],
                seed=seed,
            )


class DareTies(DareLinear):
    """Random elements of the task vectors, of which those with the elected sign are added up."""

    name = "dare_ties"
    elects = True
