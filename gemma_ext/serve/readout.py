"""What the head says of rows of the hidden bank: once for each state, whoever asks first.

An exit test and the sampling behind it read the same distribution, so a token that leaves costs one
pass over the head and not two.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from gemma_ext.ops.depth_batching.head import HeadExit, head_exit
from gemma_ext.ops.depth_batching.linear import Projection, seg_depth_lora
from gemma_ext.ops.depth_batching.norm import gather_rms_norm
from gemma_ext.ops.depth_batching.shortlist import make_shortlist, shortlist_head
from gemma_ext.serve.weights import Weights

_TILE = 16384  # rows of the head that are widened at a time where it is stored in 16 bits


class Head:
    """Final norm, head and soft-cap over hidden rows [n, D].

    Args:
        weights: of the model.
        impl: of the ops.
        shortlist: read 8-bit codes of the head where they prove which token is the best
            (`shortlist_head`), V D bytes more.
    """

    def __init__(self, weights: Weights, impl: str = "auto", *, shortlist: bool = False) -> None:
        self.weights, self.impl = weights, impl
        self.shortlist = make_shortlist(weights.head) if shortlist else None
        self.vocabulary = weights.vocabulary
        self.dtype = torch.promote_types(weights.dtype, torch.float32)
        self._early = None
        if weights.exit_head is not None:
            self._early = torch.cat([weights.head, weights.exit_head[1]], 1)

    @property
    def has_early(self) -> bool:
        """Whether early exits have a head of their own."""
        return self._early is not None

    def rows(
        self,
        bank: Tensor,
        slots: Tensor,
        temperature: Tensor | None,
        keys: Tensor | None,
        candidates: int,
        early: bool,
    ) -> HeadExit:
        """Statistics of bank[slots]; `early` ones, read before the last loop, may have their own
        head."""
        model = self.weights
        h, weight = self._input(bank, slots, early)
        normed = early and self._early is not None
        return head_exit(
            h,
            weight,
            norm_weight=None if normed else model.final_norm,
            eps=model.eps,
            plus_one=model.plus_one,
            softcap=model.head_softcap,
            temperature=temperature,
            keys=keys,
            candidates=candidates,
            impl=self.impl,
        )

    def best(self, bank: Tensor, slots: Tensor) -> Tensor:
        """int32 [n] ids of `rows`, and nothing else, of states after the last loop."""
        model = self.weights
        if self.shortlist is None:
            return self.rows(bank, slots, None, None, 0, False).ids
        return shortlist_head(
            bank[slots.long()],
            self.shortlist,
            norm_weight=model.final_norm,
            eps=model.eps,
            plus_one=model.plus_one,
            softcap=model.head_softcap,
            impl=self.impl,
        ).ids

    def logits(self, bank: Tensor, slots: Tensor, early: bool) -> Tensor:
        """[n, V], at least float32: for requests that change single logits."""
        return torch.cat([z for _, z in self._tiles(*self._normed(bank, slots, early))], 1)

    def divergence(self, bank: Tensor, slots: Tensor, before: Tensor) -> Tensor:
        """[n] KL of early heads: of bank[slots] from that of the states `before` [n, D].

        sum_v p_v (s_v - t_v) - lse s + lse t over tiles of the vocabulary, each product and sum by
        itself: a row has the bits that it has alone, which the exit must not lose.
        """
        every = torch.arange(len(before), device=before.device)
        sides = ((bank, slots), (before, every))
        s_lse, t_lse = (self.rows(*side, None, None, 0, True).lse for side in sides)
        return self._divergence_sum(sides, s_lse) - s_lse + t_lse

    def _divergence_sum(self, sides: tuple, lse: Tensor) -> Tensor:
        """sum_v p_v (s_v - t_v) of the rows of the head that are here."""
        total = torch.zeros_like(lse)
        tiles = (self._tiles(*self._normed(*side, True)) for side in sides)
        for (_, s), (_, t) in zip(*tiles, strict=True):
            total += ((s - lse.unsqueeze(-1)).exp() * (s - t)).sum(-1)
        return total

    def logits_at(self, bank: Tensor, slots: Tensor, ids: Tensor, early: bool) -> Tensor:
        """[n] logits of one token `ids` [n] each."""
        x, weight = self._normed(bank, slots, early)
        return self._capped((x * weight[ids.long()].to(x.dtype)).sum(-1))

    def _tiles(self, x: Tensor, weight: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Soft-capped logits [n, tile] of x [n, D], each with its first row of `weight`."""
        for first in range(0, len(weight), _TILE):
            tile = Projection(weight[first : first + _TILE].to(x.dtype))
            yield first, self._capped(seg_depth_lora(x, (tile,), impl=self.impl)[0])

    def _input(self, bank: Tensor, slots: Tensor, early: bool) -> tuple[Tensor, Tensor]:
        if not early or self._early is None:
            return bank[slots.long()], self.weights.head
        x = self._norm(bank, slots)
        low = seg_depth_lora(x, (Projection(self.weights.exit_head[0]),), impl=self.impl)[0]
        return torch.cat([x, low], 1), self._early

    def _normed(self, bank: Tensor, slots: Tensor, early: bool) -> tuple[Tensor, Tensor]:
        x, weight = self._input(bank, slots, early)
        if weight is self.weights.head:
            x = self._norm(bank, slots)
        return x.to(self.dtype), weight

    def _norm(self, bank: Tensor, slots: Tensor) -> Tensor:
        model = self.weights
        return gather_rms_norm(
            bank,
            slots.to(bank.device, torch.int32),
            model.final_norm,
            eps=model.eps,
            plus_one=model.plus_one,
            impl=self.impl,
        )

    def _capped(self, logits: Tensor) -> Tensor:
        cap = self.weights.head_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)


class Readout:
    """Statistics of the head for each slot of the bank, as long as its state stays the same.

    Args:
        head: of the model.
        bank: [S, D] hidden states.
        requests: rows of the block tables.
        candidates: the most that a request may need.
    """

    def __init__(self, head: Head, bank: Tensor, requests: int, candidates: int) -> None:
        self.head, self.bank = head, bank
        slots, device = bank.shape[0], bank.device
        count = min(candidates, head.vocabulary)
        self.temperature = torch.zeros(requests, dtype=head.dtype, device=device)
        self.keys = torch.zeros(requests, 3, dtype=torch.int64, device=device)
        self.needs = np.zeros(requests, np.int64)  # candidates
        self.fresh = np.zeros(slots, bool)

        def field(*shape: int, dtype: torch.dtype = head.dtype) -> Tensor:
            return torch.zeros(slots, *shape, dtype=dtype, device=device)

        def ids(*shape: int) -> Tensor:
            return field(*shape, dtype=torch.int32)

        self.kept = HeadExit(
            ids(), field(2), field(), field(), None, ids(), field(), field(count), ids(count)
        )

    def open(self, row: int, temperature: float, seed: int, choice: int, candidates: int) -> None:
        """A request takes a row of the block tables; it reads that many candidates."""
        self.temperature[row].fill_(temperature)  # waits for no device, as `[row] =` does
        self.keys[row, 0].fill_(seed)
        self.keys[row, 1].fill_(choice)
        self.needs[row] = candidates

    def changed(self, slots: np.ndarray) -> None:
        """The states of `slots` are others now."""
        self.fresh[slots] = False

    def keys_of(self, rows: Tensor, positions: Tensor) -> Tensor:
        """int64 [n, 3] of the tokens behind `positions`: seed, choice, position of the token."""
        keys = self.keys[rows]
        keys[:, 2] = positions + 1
        return keys

    def read(self, slots: Tensor, rows: Tensor, positions: Tensor, early: Tensor) -> HeadExit:
        """Statistics of the states in `slots`, of which the fields are the caller's own.

        Args:
            slots, rows, positions: int64 [n] on the host; rows of the block tables.
            early: bool [n], whether a row is read before the last loop.
        """
        stale = torch.from_numpy(np.flatnonzero(~self.fresh[slots.numpy()]))
        for flag, at in self._groups(early, stale):
            self._compute(slots[at], rows[at], positions[at], flag)
        return HeadExit(*(None if field is None else field[slots] for field in self.kept))

    def best(self, slots: Tensor, early: Tensor) -> Tensor | None:
        """int32 [n] ids that `read` would give; None where a full reading is no more work."""
        if self.head.shortlist is None or (self.head.has_early and bool(early.any())):
            return None
        stale = ~self.fresh[slots.numpy()]
        ids = self.kept.ids[slots]
        if stale.any():
            at = torch.from_numpy(np.flatnonzero(stale))
            ids[at] = self.head.best(self.bank, slots[at])
        return ids

    def likeliest(self, slots: Tensor) -> Tensor:
        """int32 [n] ids of states behind the last loop, from their reading if there is one."""
        ids, stale = self.kept.ids[slots], np.flatnonzero(~self.fresh[slots.numpy()])
        if len(stale):
            at = torch.from_numpy(stale)
            ids[at] = self.head.best(self.bank, slots[at])
        return ids

    def logits(self, slots: Tensor, early: Tensor) -> Tensor:
        """[n, V]."""
        out = self.bank.new_empty(len(slots), self.head.vocabulary, dtype=self.head.dtype)
        for flag, at in self._groups(early, torch.arange(len(slots))):
            out[at] = self.head.logits(self.bank, slots[at], flag)
        return out

    def logits_at(self, slots: Tensor, ids: Tensor, early: Tensor) -> Tensor:
        """[n] logits of one token `ids` [n] each."""
        out = self.bank.new_empty(len(slots), dtype=self.head.dtype)
        for flag, at in self._groups(early, torch.arange(len(slots))):
            out[at] = self.head.logits_at(self.bank, slots[at], ids[at], flag)
        return out

    def divergence(self, slots: Tensor, before: Tensor) -> Tensor:
        """[n] KL of the early distribution in `slots` from that of the states `before` [n, D]."""
        return self.head.divergence(self.bank, slots, before)

    def _groups(self, early: Tensor, at: Tensor) -> list[tuple[bool, Tensor]]:
        """Places `at`, apart where early exits have a head of their own."""
        if len(at) == 0:
            return []
        if not self.head.has_early:
            return [(False, at)]
        flags = early[at]
        groups = [(flag, at[flags == flag]) for flag in (False, True)]
        return [(flag, group) for flag, group in groups if len(group)]

    def _compute(self, slots: Tensor, rows: Tensor, positions: Tensor, early: bool) -> None:
        self.fresh[slots.numpy()] = True
        need = int(self.needs[rows.numpy()].max())
        found = self.head.rows(
            self.bank,
            slots,
            self.temperature[rows],
            self.keys_of(rows, positions),
            need,
            early,
        )
        for mine, new in zip(self.kept, found, strict=True):
            if new is None:
                continue
            if mine.dim() == 2 and new.shape[1] < mine.shape[1]:
                mine[slots] = -1  # no token, in the columns behind
                mine[slots, : new.shape[1]] = new
            else:
                mine[slots] = new
        if need == 0:
            self.kept.indices[slots] = -1
