"""What a policy is held near, as the trainers of `gemma_ext.ppo` take it.

| reference                | log pi_ref                               | moves               |
|--------------------------|------------------------------------------|---------------------|
| `nn.ppo.FrozenReference` | of one model, PPO's                      | never               |
| `SoupReference`          | of sum_k a_k theta_k                     | when told (`put`)   |
| `MultiReference`         | sum_k a_k log pi_k, K models             | never               |
| `MovingReference`, `ema` | of theta_ref = d theta_ref + (1-d) theta | every n-th update   |
| `sync`                   | the same, d = 1 - m (TR-DPO, TRL)        | every n-th update   |

The penalty of a `MultiReference` by k1 is log pi - sum_k a_k log pi_k, whose mean is
sum_k a_k KL(pi || pi_k) = KL(pi || prod_k pi_k^a_k / Z) - log Z. By k3 of that difference its mean
is larger by Z - 1 at every token, Z = sum_y prod_k pi_k(y)^a_k <= 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gemma_ext.nn._models import unwrap
from gemma_ext.nn.ppo import FrozenReference, HiddenHead, Sequences
from gemma_ext.papers.salsa.soup import Weights, check_weights, soup, soup_into, uniform
from gemma_ext.souping.live import ema_, parameters_of


class SoupReference(FrozenReference):
    """A weighted sum of models that can be made anew between steps.

    Memory: the parameters of one model; the parents may be dropped.

    Args:
        parents, weights, dtype: as of `salsa.soup`.
    """

    def __init__(
        self,
        parents: Sequence[nn.Module],
        weights: Weights | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(soup(parents, weights, dtype=dtype))
        self._puts = 0

    def put(self, parents: Sequence[nn.Module], weights: Weights | None = None) -> None:
        """Another soup into the same parameters; no copy is made."""
        soup_into(self.model, parents, uniform(len(parents)) if weights is None else weights)
        self._puts += 1

    def state_dict(self) -> dict[str, Any]:
        held = {"tensors": parameters_of(self.model)} if self._puts else {}
        return {"puts": self._puts, **held}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._puts = state["puts"]
        if self._puts:
            _load(self.model, state["tensors"])


class MultiReference:
    """K models whose divergences are added up with weights: K forward passes.

    Args:
        models: K of one vocabulary; frozen.
        weights: K numbers that add up to 1; by default 1 / K each.

    Raises:
        ValueError: no model, or weights that do not fit.
    """

    def __init__(self, models: Sequence[nn.Module], weights: Sequence[float] | None = None) -> None:
        if not models:
            raise ValueError("expected at least one model, got none")
        self.weights = check_weights(weights or uniform(len(models)), len(models))
        self.references = [FrozenReference(model) for model in models]
        self.identity = [
            [weight, reference.identity]
            for weight, reference in zip(self.weights, self.references, strict=True)
        ]

    @torch.no_grad()
    def logprobs(self, sequences: Sequences, temperature: float = 1.0) -> Tensor:
        each = [reference.logprobs(sequences, temperature) for reference in self.references]
        return torch.einsum("k,kn->n", each[0].new_tensor(self.weights), torch.stack(each))

    def heads(self, sequences: Sequences) -> list[tuple[float, HiddenHead]]:
        return [
            (weight, head)
            for weight, reference in zip(self.weights, self.references, strict=True)
            for _, head in reference.heads(sequences)
        ]

    def after_update(self, policy: nn.Module, step: int) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


class MovingReference(FrozenReference):
    """theta_ref <- decay theta_ref + (1 - decay) theta behind every n-th update, rounded once.

    In bfloat16 steps below half a unit in the last place are lost under rounding to nearest, so
    that a slow average stands still: round stochastically, or keep it in float32 (`shadow`).

    Args:
        model: where the reference starts; it is written into, so it is not the policy itself.
        decay: d in [0, 1].
        every: n, updates from one move to the next.
        rounding: "stochastic" or "nearest".
        shadow: hold the average in float32 beside the model, four bytes a parameter, and round it
            to nearest from there.
        seed: of stochastic rounding.

    Raises:
        ValueError: a decay or an interval out of range, or an unknown rounding.
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float,
        *,
        every: int = 1,
        rounding: str = "stochastic",
        shadow: bool = False,
        seed: int = 0,
    ) -> None:
        if not 0 <= decay <= 1:
            raise ValueError(f"expected decay in [0, 1], got {decay}")
        if every < 1:
            raise ValueError(f"expected every to be at least 1, got {every}")
        if rounding not in ("nearest", "stochastic"):
            raise ValueError(f"expected rounding to be nearest or stochastic, got {rounding!r}")
        super().__init__(model)
        self.decay, self.every, self.rounding, self.seed = decay, every, rounding, seed
        self.identity = [self.identity, decay, every, rounding, shadow, seed]
        self.moves = 0
        self.shadow: dict[str, Tensor] | None = None
        if shadow:
            self.shadow = {n: p.float().clone() for n, p in parameters_of(model).items()}

    def after_update(self, policy: nn.Module, step: int) -> dict[str, float]:
        """Moves behind steps that `every` divides.

        Raises:
            ValueError: the policy is the reference, or one of other parameters.
        """
        if step % self.every:
            return {}
        policy = unwrap(policy)
        if policy is unwrap(self.model):
            raise ValueError("expected a reference apart from the policy, got the policy itself")
        if self.shadow is None:
            seed = self.seed + (self.moves << 32)
            ema_(self.model, policy, self.decay, rounding=self.rounding, seed=seed)
        else:
            ema_(self.shadow, policy, self.decay, rounding="nearest")
            _load(self.model, self.shadow)
        self.moves += 1
        return {"reference/moves": float(self.moves)}

    def state_dict(self) -> dict[str, Any]:
        return {
            "tensors": parameters_of(self.model),
            "shadow": self.shadow,
            "moves": self.moves,
            "seed": self.seed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        _load(self.model, state["tensors"])
        if self.shadow is not None:
            _load(self.shadow, state["shadow"])
        self.moves, self.seed = state["moves"], state["seed"]


def ema(model: nn.Module, decay: float, **options: Any) -> MovingReference:
    """An average of the policies seen so far: WARP's anchor (arXiv 2406.16768), after each update.

    Options: as of `MovingReference`.
    """
    return MovingReference(model, decay, **options)


def sync(
    model: nn.Module, mixup: float = 0.6, every: int = 512, rounding: str = "nearest"
) -> MovingReference:
    """TR-DPO: ref <- (1 - mixup) ref + mixup policy every so many updates; 1 is a hard update.

    The defaults are TRL's `ref_model_mixup_alpha` and `ref_model_sync_steps`. TRL scales and adds
    in the model's dtype, which rounds twice; here the result is rounded once.
    """
    return MovingReference(model, 1 - mixup, every=every, rounding=rounding)


def _load(model: nn.Module | dict[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Copies parameters, rounded to nearest where the model has fewer bits."""
    ema_(model, tensors, 0.0, rounding="nearest")
