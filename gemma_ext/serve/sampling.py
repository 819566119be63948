"""The next token of each request from what the head gives away without logits.

A draw is argmax over the tokens kept of z_v / T + g_v, g the Gumbel noise of (seed, choice of the
request, position, v): a sample of their renormalised softmax, and a function of nothing else. So it
is the same whether the kept tokens were found among all, or among the candidates of the head.

| request | read off |
|---|---|
| temperature 0 | the argmax, from codes of the head if there are such |
| all tokens kept | the sample of the head |
| top-k, top-p, min-p | that sample if it is kept, else the candidates; all logits of the row |
| | where the candidates do not reach the edge of what is kept |
| logit bias, penalties, stop ids not yet allowed | all logits of the row |
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gemma_ext.ops.depth_batching.head import HeadExit, gumbel
from gemma_ext.serve.history import History
from gemma_ext.serve.protocol import Request
from gemma_ext.serve.readout import Readout

CANDIDATES = 64  # above the 20 of logprobs and the top-k that people ask for
_DENSE_ROWS = 8  # whose logits are held at a time


class Sampled(NamedTuple):
    """Tokens of n rows, on the host.

    Attributes:
        ids: int32 [n].
        logprobs: [n], under the model's own distribution or at the temperature, of rows that ask;
            None if none does.
        top_ids, top_logprobs: [n, M] the likeliest tokens, M the most that a row asks for; of a
            row that asks for m of them the first m count.
    """

    ids: Tensor
    logprobs: Tensor | None
    top_ids: Tensor | None
    top_logprobs: Tensor | None


def kept(
    values: Tensor, lse: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, *, whole: bool
) -> tuple[Tensor, Tensor]:
    """Which candidates a draw may be: (bool [n, C], bool [n] whether no other token may be).

    Args:
        values: [n, C] the largest z / T, falling, lowest id first of equal ones.
        lse: [n] log sum exp z / T over all tokens.
        top_k: int64 [n], 0 for all. top_p: share of what top-k keeps. min_p: share of the largest.
        whole: the candidates are the vocabulary.
    """
    count = values.shape[1]
    some = top_k > 0
    rank = torch.arange(count, device=values.device)
    first = rank < torch.where(some, top_k, count).unsqueeze(-1)
    of_first = values.masked_fill(~first, -torch.inf).logsumexp(-1)
    share = (values - torch.where(some, of_first, lse).unsqueeze(-1)).exp()
    up_to = share.cumsum(-1)
    least = min_p * share[:, 0]
    whole_mass = (top_p >= 1).unsqueeze(-1)  # which rounding must not cut
    inside = (up_to - share < top_p.unsqueeze(-1)) | whole_mass | (rank == 0)
    keep = first & inside & (share >= least.unsqueeze(-1))
    if whole:
        return keep, torch.ones_like(some)
    reached = ((up_to[:, -1] >= top_p) & (top_p < 1)) | (share[:, -1] < least)
    return keep, torch.where(some, top_k <= count, reached)


class Sampler:
    """Sampling parameters of every row of the block tables, and the draws.

    Args:
        readout: of the hidden bank.
        requests: rows of the block tables.
        max_length: tokens of a request at most.
        impl: of the ops.
    """

    def __init__(
        self, readout: Readout, requests: int, max_length: int, impl: str = "auto"
    ) -> None:
        self.readout, self.impl = readout, impl
        device, dtype = readout.bank.device, readout.head.dtype
        self.history = History(requests, max_length, readout.head.vocabulary, device)
        self.top_k = torch.zeros(requests, dtype=torch.int64, device=device)
        self.top_p = torch.ones(requests, dtype=dtype, device=device)
        self.min_p = torch.zeros(requests, dtype=dtype, device=device)
        self.hot = np.zeros(requests, bool)  # temperature above 0
        self.cuts = np.zeros(requests, bool)  # keeps only some tokens
        self.asked = np.full(requests, -1)  # logprobs; -1 for none
        self.divisor = torch.ones(requests, dtype=dtype, device=device)  # of their logits

    def open(self, row: int, request: Request, drawn: Sequence[int] = ()) -> None:
        """A request takes a row; `drawn` are the tokens that an earlier stay has drawn."""
        params = request.params
        self.history.open(row, request.prompt, drawn, params)
        for number, own in (
            (self.top_k, params.top_k),
            (self.top_p, params.top_p),
            (self.min_p, params.min_p),
            (self.divisor, params.divisor),
        ):
            number[row].fill_(own)  # waits for no device, as `number[row] = own` does
        self.hot[row] = hot = params.temperature > 0
        self.cuts[row] = hot and (params.top_k > 0 or params.top_p < 1 or params.min_p > 0)
        self.asked[row] = -1 if params.logprobs is None else params.logprobs
        need = CANDIDATES if self.cuts[row] else max(self.asked[row], 0)
        self.readout.open(row, params.temperature, params.seed, request.choice, need)

    def draw(self, slots: Tensor, rows: Tensor, positions: Tensor, early: Tensor) -> Sampled:
        """The tokens behind `positions`; all arguments int64 [n] on the host.

        Args:
            slots: of the bank, read now.
            rows: of the block tables.
            early: bool [n], whether a row is read before the last loop.
        """
        host = rows.numpy()
        dense = self.history.changes(host, positions.numpy())
        if not (dense | self.hot[host] | (self.asked[host] >= 0)).any():
            best = self.readout.best(slots, early)
            if best is not None:
                self.history.add(rows, positions, best)
                return Sampled(best.cpu(), None, None, None)
        read = self.readout.read(slots, rows, positions, early)
        ids = read.samples
        cut = np.flatnonzero(self.cuts[host] & ~dense)
        if len(cut):
            at = torch.from_numpy(cut)
            ids[at], covered = self.among_candidates(read, rows, positions, at)
            dense[cut] = ~covered.cpu().numpy()
        if dense.any():
            for at in torch.from_numpy(np.flatnonzero(dense)).split(_DENSE_ROWS):
                ids[at] = self._among_all(slots[at], rows[at], positions[at], early[at])
        self.history.add(rows, positions, ids)
        asked = self.asked[host]
        divisor = self.divisor[rows]
        return Sampled(ids.cpu(), *self._logprobs(ids, read, slots, early, asked, divisor))

    def score(
        self, slots: Tensor, rows: Tensor, positions: Tensor, ids: Tensor, early: Tensor, top: int
    ) -> Sampled:
        """As if `ids` [n] had been drawn, with `top` likeliest tokens each."""
        device, host = self.readout.bank.device, rows.numpy()
        before = self.readout.needs[host]
        self.readout.needs[host] = top
        self.readout.changed(slots.numpy())
        read = self.readout.read(slots, rows, positions, early)
        self.readout.needs[host] = before
        self.readout.changed(slots.numpy())  # a draw may need more candidates
        asked = np.full(len(rows), top)
        one = torch.ones_like(read.lse)
        return Sampled(ids, *self._logprobs(ids.to(device), read, slots, early, asked, one))

    def among_candidates(
        self, read: HeadExit, rows: Tensor, positions: Tensor, at: Tensor, *, waits: bool = True
    ) -> tuple[Tensor, Tensor]:
        """(ids, covered) of rows `at`, whose draws keep only some tokens.

        Args:
            waits: whether a device is asked if the head's own samples are all kept, which saves
                the noise of the candidates.
        """
        rows, positions = rows[at], positions[at]
        values, ids = read.values[at], read.indices[at]
        count = min(CANDIDATES, self.readout.head.vocabulary)
        values, ids = values[:, :count], ids[:, :count]
        scaled = values / self.readout.temperature[rows].unsqueeze(-1)
        whole = count == self.readout.head.vocabulary
        keep, covered = kept(scaled, read.tempered[at], *self._cuts(rows), whole=whole)
        sample = read.samples[at]
        stays = (keep & (ids == sample.unsqueeze(-1))).any(-1)  # the best of all is the best kept
        if waits and stays.all():
            return sample, covered
        best = self._best(scaled, ids, keep, rows, positions)
        return torch.where(stays, sample, best), covered

    def _among_all(self, slots: Tensor, rows: Tensor, positions: Tensor, early: Tensor) -> Tensor:
        """Draws from all logits of some rows."""
        z = self.readout.logits(slots, early)
        z = self.history.adjust(z, rows, positions)
        best = z.argmax(-1).int()
        hot, cuts = self.hot[rows.numpy()], self.cuts[rows.numpy()]
        for cut in (False, True):
            at = torch.from_numpy(np.flatnonzero(hot & (cuts == cut)))
            if len(at) == 0:
                continue
            own = rows[at]
            values = z[at] / self.readout.temperature[own].unsqueeze(-1)
            if cut:
                lse = values.logsumexp(-1)
                values, ids = values.sort(dim=-1, descending=True, stable=True)
                keep, _ = kept(values, lse, *self._cuts(own), whole=True)
            else:
                ids = torch.arange(z.shape[1], device=z.device).expand(values.shape)
                keep = torch.ones_like(values, dtype=torch.bool)
            best[at] = self._best(values, ids.int(), keep, own, positions[at])
        return best

    def _cuts(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.top_k[rows], self.top_p[rows], self.min_p[rows]

    def _best(
        self, scaled: Tensor, ids: Tensor, keep: Tensor, rows: Tensor, positions: Tensor
    ) -> Tensor:
        """argmax of scaled + noise among those kept, as int32 ids."""
        noise = gumbel(ids.contiguous(), self.readout.keys_of(rows, positions), impl=self.impl)
        score = torch.where(keep, scaled + noise.to(scaled.dtype), -torch.inf)
        return ids.gather(1, score.argmax(-1, keepdim=True)).squeeze(1)

    def _logprobs(
        self,
        ids: Tensor,
        read: HeadExit,
        slots: Tensor,
        early: Tensor,
        asked: np.ndarray,
        divisor: Tensor,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of rows that ask for none, NaN. A row looks at no more columns than it asks for: a logit
        of the candidates and one of `logits_at` may differ in their last bit."""
        wanted = torch.from_numpy(np.flatnonzero(asked >= 0))
        if len(wanted) == 0:
            return None, None, None
        top = int(asked.max())
        chosen = ids[wanted]
        logit = torch.where(chosen == read.ids[wanted], read.top[wanted, 0], torch.nan)
        if top:
            own = torch.arange(read.indices.shape[1]) < torch.from_numpy(asked)[wanted, None]
            same = (read.indices[wanted] == chosen.unsqueeze(-1)) & own.to(chosen.device)
            found = torch.where(same, read.values[wanted], 0).sum(-1)
            logit = torch.where(same.any(-1), found, logit)
        missing = torch.from_numpy(np.flatnonzero(logit.isnan().cpu().numpy()))
        if len(missing):
            at = wanted[missing]
            logit[missing] = self.readout.logits_at(slots[at], chosen[missing], early[at])
        lse = torch.where(divisor == 1, read.lse, read.tempered)
        logprobs = torch.full_like(lse, torch.nan)
        logprobs[wanted] = logit / divisor[wanted] - lse[wanted]
        likely = read.values[:, :top] / divisor.unsqueeze(-1) - lse.unsqueeze(-1)
        return logprobs.cpu(), read.indices[:, :top].cpu(), likely.cpu()
