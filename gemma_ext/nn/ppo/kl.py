"""KL(pi || ref) from the log-probabilities of sampled tokens (joschu.net/blog/kl-approx.html).

    k1 = log pi - log ref,   k2 = k1^2 / 2,   k3 = exp(-k1) - 1 + k1,   abs = |k1|
    full = sum_v pi_v (log pi_v - log ref_v)

E_pi[k1] = E_pi[k3] = full, but the expectation of k1's gradient is 0, of k3's that of
KL(ref || pi), and only k2's is that of full. "k1+" and "k3+" have the values of k1 and k3 and the
gradient of k2 (verl's straight-through forms). A reward is not differentiated, so the place decides
too. Which of them lead to the optimum ref exp(r / beta), as `tests/ppo/test_bandit.py` shows:

| place  | there              | elsewhere                                                     |
|--------|--------------------|---------------------------------------------------------------|
| reward | k1                 | k2 and k3 (push tokens below ref further down); full (the     |
|        |                    | same for every token, so none answers for its own divergence) |
| loss   | full, k2, k1+, k3+ | k1 (no penalty at all); k3 (penalises KL(ref || pi))          |
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda k1: k1,
    "k2": lambda k1: k1.square() / 2,
    # expm1 keeps the digits that exp(-k1) - 1 + k1 loses near k1 = 0
    "k3": lambda k1: torch.expm1(-k1) + k1,
    "abs": torch.abs,
}
KL_ESTIMATORS = (*_ESTIMATORS, "k1+", "k3+")
VERL_LIMITS = (20.0, 10.0)


def kl_estimate(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    kind: str = "k1",
    *,
    limits: tuple[float, float] | None = None,
) -> Tensor:
    """A KL estimate of each token.

    Args:
        logprobs, ref_logprobs: of the same tokens, any shape; the gradient goes to both.
        kind: one of `KL_ESTIMATORS`; "full" needs the whole distributions, see `full_kl`.
        limits: bounds of |k1| before, and of |k3| after k3's exponential; verl has (20, 10).
    """
    name = kind.removesuffix("+")
    if kind not in KL_ESTIMATORS:
        raise ValueError(f"expected kind to be one of {', '.join(KL_ESTIMATORS)}, got {kind!r}")
    k1 = logprobs - ref_logprobs
    if limits is not None and name == "k3":
        value = _ESTIMATORS[name](k1.clamp(-limits[0], limits[0])).clamp(-limits[1], limits[1])
    else:
        value = _ESTIMATORS[name](k1)
    if name == kind:
        return value
    slope = _ESTIMATORS["k2"](k1)
    return value.detach() + slope - slope.detach()


def full_kl(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """KL(pi || ref) [...] of whole distributions [..., V]; 0 log 0 is 0.

    For small V. Of heads over large vocabularies `gemma_ext.linear_divergence` has it without the
    [N, V] tensors.
    """
    share = logprobs.exp()
    # the difference is masked, not the product, whose gradient would be 0 * inf
    return (share * torch.where(share > 0, logprobs - ref_logprobs, 0)).sum(-1)
