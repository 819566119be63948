"""The exit test of an engine at work: which tokens it asks, and what it remembers of them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from gemma_ext.ops.depth_batching.gates import gate_exit
from gemma_ext.ops.depth_batching.head import HeadExit
from gemma_ext.serve.adaptive import AdaptiveThreshold
from gemma_ext.serve.exits import LEARNED, ON_CHANGE, ON_HEAD, REMEMBERING, ExitTest
from gemma_ext.serve.protocol import SamplingParams
from gemma_ext.serve.readout import Readout


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
        # by fill_, since `x[row] = number` waits for a device
        self.threshold[row].fill_(self.test.own_threshold(params))
        self.named[row].fill_(params.exit_threshold is not None)
        self.start[row].fill_(prompt - 1)
        self.horizon[row].fill_(max(params.max_tokens, 1))
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
        slots = slots.to(self.survival.device)
        if self.adaptive is not None:
            self.confidence.index_fill_(0, slots, torch.nan)
        if self.test.name == "hazard":
            self.survival.index_fill_(0, slots, 1.0)
        elif self.test.name == "argmax":
            self.previous.index_fill_(0, slots, -1)
            self.streak.index_fill_(0, slots, 0)
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
        learned = name in LEARNED
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
