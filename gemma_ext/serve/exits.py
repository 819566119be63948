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

import numpy as np
import torch
from torch import Tensor

from gemma_ext.ops.depth_batching.gates import gate_exit
from gemma_ext.ops.depth_batching.head import HeadExit
from gemma_ext.serve.adaptive import AdaptiveThreshold
from gemma_ext.serve.protocol import SamplingParams
from gemma_ext.serve.readout import Readout

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
_LEARNED = ("gate", "hazard", "preloop")
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
        if (self.name in _LEARNED) != (self.weight is not None):
            wanted = "a weight" if self.name in _LEARNED else "no weight"
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


class Exits:
    """The exit test of all requests, and what it remembers of the tokens that run.

    Args:
        test: the engine's.
        head: reads rows of the hidden bank.
        loops: B of the model.
        requests: rows of the block tables.
        impl: of the ops.

    Raises:
        ValueError: the weight of the test does not fit the model.
    """

    def __init__(
        self, test: ExitTest, head: Readout, loops: int, requests: int, impl: str = "auto"
    ) -> None:
        self.test, self.head, self.loops, self.impl = test, head, loops, impl
        bank = head.bank
        self.by_layer = loops == 2
        like = {"dtype": torch.promote_types(bank.dtype, torch.float32), "device": bank.device}
        slots = bank.shape[0]
        self.threshold = torch.zeros(requests, **like)
        self.start = torch.zeros(requests, **like)
        self.horizon = torch.ones(requests, **like)
        self.min_loops = np.ones(requests, np.int64)
        self.max_loops = np.full(requests, loops)
        self.survival = torch.ones(slots, **like)
        self.previous = torch.full((slots,), -1, dtype=torch.int32, device=bank.device)
        self.streak = torch.zeros(slots, dtype=torch.int32, device=bank.device)
        self.share = torch.zeros(slots, loops, **like)  # of depths up to each loop
        self.weight, self.bias = self._learned(test, bank)
        self.adaptive = AdaptiveThreshold(test.adapt) if test.adapt else None
        self.named = torch.zeros(requests, dtype=torch.bool, device=bank.device)  # own thresholds
        self.confidence = torch.full((slots,), torch.nan, **like)  # at the last test of a token
        self.early = torch.zeros(slots, dtype=torch.int32, device=bank.device)  # its argmax

    @property
    def wants_before(self) -> bool:
        """Whether the state before the block, or before its last layer, is needed."""
        return self.test.name in ON_CHANGE

    def open(self, row: int, params: SamplingParams, prompt: int) -> None:
        """A request of `prompt` tokens takes a row of the block tables."""
        self.threshold[row] = self.test.own_threshold(params)
        self.named[row] = params.exit_threshold is not None
        self.start[row] = prompt - 1
        self.horizon[row] = max(params.max_tokens, 1)
        self.min_loops[row] = params.min_loops
        self.max_loops[row] = min(params.max_loops or self.loops, self.loops)

    def tested(self, current: np.ndarray, rows: Tensor, loop: Tensor) -> np.ndarray:
        """Which rows have to be tested: of tokens, before the last loop that they may run.

        Args:
            current: bool [n], whether a row is a token and no fill and no prompt.
            rows, loop: int32 [n] on the host.
        """
        if self.test.name == "none":
            return np.empty(0, np.int64)
        row, done = rows.numpy(), loop.numpy() + 1
        wanted = current & (done < self.max_loops[row])
        if self.test.name not in REMEMBERING:
            wanted &= done >= self.min_loops[row]
        return np.flatnonzero(wanted)

    def enter(self, slots: Tensor) -> None:
        """Tokens begin whose embeddings have just been written to `slots` [n]."""
        if self.adaptive is not None:
            self.confidence[slots] = torch.nan
        if self.test.name == "hazard":
            self.survival[slots] = 1.0
        elif self.test.name == "argmax":
            self.previous[slots] = -1
            self.streak[slots] = 0
        elif self.test.name == "preloop":
            h = self.head.bank[slots].to(self.weight.dtype)
            z = (h.unsqueeze(1) * self.weight).sum(-1) + self.bias
            self.share[slots] = torch.softmax(z, -1).cumsum(-1)

    def signals(
        self,
        slots: Tensor,
        rows: Tensor,
        positions: Tensor,
        loop: Tensor,
        before: Tensor | None,
        read: HeadExit | None = None,
    ) -> Tensor:
        """bool [n] of tokens that have run `loop` [n], from 0, below the last one.

        Args:
            slots, rows, positions: int64 [n] of the tokens; rows of the block tables. On the host,
                unless what the head says is given.
            loop: int32 [n] beside them.
            before: [n, D], see `wants_before`.
            read: what the head says of `slots`; None to ask it, if the test does.
        """
        score = self._score(slots, rows, positions, loop, before, read)
        passes = self.test.passes(score, self._threshold(rows, positions))
        if self.wants_before and not self.by_layer:
            passes &= (loop > 0).to(passes.device)
        return passes

    def learn(self, slots: Tensor, ids: Tensor) -> None:
        """Of tokens in `slots` int64 [n] that have run all loops, `ids` [n] are the likeliest."""
        if self.adaptive is None:
            return
        right = self.early[slots] == ids.to(self.early.device)
        self.adaptive.add(self.confidence[slots].cpu().numpy(), right.cpu().numpy())

    def _threshold(self, rows: Tensor, positions: Tensor) -> Tensor:
        t = self.threshold[rows]
        if self.adaptive is not None and self.adaptive.value is not None:
            t = torch.where(self.named[rows], t, self.adaptive.value)
        if self.test.decay == 0:
            return t
        done = (positions.to(t.device) - self.start[rows]) / self.horizon[rows]
        return (0.9 * t + 0.1 * t * torch.exp(-self.test.decay * done)).clamp(0.0, 1.0)

    def _score(
        self,
        slots: Tensor,
        rows: Tensor,
        positions: Tensor,
        loop: Tensor,
        before: Tensor | None,
        read: HeadExit | None,
    ) -> Tensor:
        name = self.test.name
        if name == "preloop":
            return self.share[slots, loop.long()]
        if name == "kl":
            return self.head.divergence(slots, before)
        if name in ON_HEAD:
            if read is None:
                early = torch.ones(len(slots), dtype=torch.bool)
                read = self.head.read(slots, rows, positions, early)
            if name == "entropy":
                return read.entropy
            if name == "argmax":
                same = read.ids == self.previous[slots]
                self.previous[slots] = read.ids
                self.streak[slots] = torch.where(same, self.streak[slots] + 1, 0)
                return self.streak[slots]
            p = (read.top - read.lse.unsqueeze(-1)).exp()
            score = p[:, 0] if name == "max_prob" else p[:, 0] - p[:, 1]
            if self.adaptive is not None:
                self.confidence[slots], self.early[slots] = score, read.ids
            return score
        h = self.head.bank[slots]
        learned = name in _LEARNED
        found = gate_exit(
            h,
            name,
            0.0,
            weight=self.weight.to(h.dtype) if learned else None,
            bias=self.bias if learned else None,
            previous=None if learned else before,
            survival=self.survival[slots] if name == "hazard" else None,
            impl=self.impl,
        )
        if found.survival is not None:
            self.survival[slots] = found.survival
        return found.scores

    def _learned(self, test: ExitTest, bank: Tensor) -> tuple[Tensor | None, Tensor | None]:
        if test.weight is None:
            return None, None
        width = bank.shape[1]
        shape = (self.loops, width) if test.name == "preloop" else (width,)
        if tuple(test.weight.shape) != shape:
            raise ValueError(
                f"weight: expected {list(shape)} with exit test {test.name}, "
                f"got {list(test.weight.shape)}"
            )
        like = {"dtype": self.threshold.dtype, "device": bank.device}
        bias = torch.as_tensor(0.0 if test.bias is None else test.bias, **like).reshape(-1)
        if bias.numel() not in (1, shape[0] if test.name == "preloop" else 1):
            raise ValueError(f"bias: expected one number a score, got {bias.numel()}")
        return test.weight.detach().to(**like), bias
