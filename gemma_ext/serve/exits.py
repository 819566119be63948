"""Whether a token may be read after the loop that has just run.

h_j is the hidden state after loop j = 1 .. B, p_j the distribution of the head on it.

| test | score | leaves | published by |
|---|---|---|---|
| none | | never before the last loop | |
| max_prob | max p_j | >= t | EE-LLM |
| margin | the two largest of p_j, subtracted | > t | CALM, FREE |
| entropy | H(p_j) | <= t | Huginn |
| kl | KL(p_j, p_before) | <= t | Huginn |
| argmax | loops in a row whose argmax is that of the loop before | >= t | |
| cosine | cos(h_j, h_before) | > t | CALM |
| latent_diff | norm(h_j - h_before) / norm(h_j) | < t | Huginn |
| gate | sigmoid(w . h_j + b) | >= t | CALM; FREE, as the difference of two classes |
| hazard | 1 - prod over i <= j of (1 - sigmoid(w . h_i + b)) | >= t | Ouro |
| preloop | sum over i <= j of softmax(w h_0 + b)_i, h_0 the embedding | >= t | |

"before" is the loop before, so that nothing leaves after the first loop; in a model of two loops it
is the state before the last layer of the block, without which these tests could never leave.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from gemma_ext.serve.protocol import SamplingParams

# name: (score must exceed the threshold, a score equal to it stays)
_DIRECTIONS = {
    "max_prob": (True, False),
    "margin": (True, True),
    "entropy": (False, False),
    "kl": (False, False),
    "argmax": (True, False),
    "cosine": (True, True),
    "latent_diff": (False, True),
    "gate": (True, False),
    "hazard": (True, False),
    "preloop": (True, False),
}
TESTS = ("none", *_DIRECTIONS)
ON_HEAD = ("max_prob", "margin", "entropy", "kl", "argmax")
ON_CHANGE = ("kl", "cosine", "latent_diff")
LEARNED = ("gate", "hazard", "preloop")
REMEMBERING = ("argmax", "hazard")  # what earlier loops of a token gave
_DECAYING = ("max_prob", "margin", "cosine", "gate")
_ADAPTING = ("max_prob", "margin")
_DEFAULTS = {"argmax": 2.0, "latent_diff": 0.03}  # twice in a row; Huginn


@dataclass(frozen=True)
class ExitTest:
    """An exit test of an engine; the threshold and the bounds of loops may differ by request.

    Attributes:
        name: of `TESTS`.
        threshold: of requests that name none; None for 2 of argmax and 0.03 of latent_diff
            (Huginn), the other tests need one.
        strict: whether a score at the threshold stays; None for the test's own way, as above.
        decay: tau of CALM's falling threshold 0.9 t + 0.1 t exp(-tau n / N) for output n of at
            most N, cut to [0, 1], of max_prob, margin, cosine and gate; 0 for a constant one.
        adapt: zeta of FREE's adaptive threshold (`gemma_ext.serve.adaptive`), of max_prob and
            margin where exits are drafts (`EngineConfig.drafts`), which tells right ones from
            wrong ones; `threshold` is where it begins. 0 for none.
        weight, bias: of gate and hazard [D] and a number; of preloop [B, D] and [B].

    Raises:
        ValueError: one sentence that begins with the attribute's name.
    """

    name: str = "none"
    threshold: float | None = None
    strict: bool | None = None
    decay: float = 0.0
    adapt: float = 0.0
    weight: Tensor | None = None
    bias: Tensor | float | None = None

    def __post_init__(self) -> None:
        if self.name not in TESTS:
            raise ValueError(f"name: expected one of {', '.join(TESTS)}, got {self.name!r}")
        if (self.name in LEARNED) != (self.weight is not None):
            wanted = "a weight" if self.name in LEARNED else "no weight"
            got = "none" if self.weight is None else "one"
            raise ValueError(f"weight: expected {wanted} with exit test {self.name}, got {got}")
        if self.decay and self.name not in _DECAYING:
            raise ValueError(
                f"decay: expected exit test {', '.join(_DECAYING)} with it, got {self.name}"
            )
        if self.threshold is None and self.name not in ("none", *_DEFAULTS):
            raise ValueError(
                f"exit_threshold: expected a number with exit test {self.name}, got None"
            )
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise ValueError(f"exit_threshold: expected a finite number, got {self.threshold}")
        if not 0 <= self.adapt < 1:
            raise ValueError(f"adapt: expected a share in [0, 1), got {self.adapt}")
        if self.adapt and self.name not in _ADAPTING:
            raise ValueError(
                f"adapt: expected exit test {' or '.join(_ADAPTING)} with it, got {self.name}"
            )
        if not 0 <= self.decay < math.inf:
            raise ValueError(f"decay: expected a number of at least 0, got {self.decay}")

    def own_threshold(self, params: SamplingParams) -> float:
        """The threshold of a request."""
        own = (params.exit_threshold, self.threshold, _DEFAULTS.get(self.name, 0.0))
        return float(next(value for value in own if value is not None))

    def passes(self, score: Tensor, threshold: Tensor) -> Tensor:
        """bool [n]; a score of NaN stays."""
        above, strict = _DIRECTIONS[self.name]
        strict = strict if self.strict is None else self.strict
        if above:
            return score > threshold if strict else score >= threshold
        return score < threshold if strict else score <= threshold
