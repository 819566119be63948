"""Where every request stands, on the device that runs the model, and which rows run next.

A request's unit of work is one loop of a range of its positions: those behind `done[loop]`, the
positions that have this loop's keys and values, up to its current token. So owed rows need no list:
they are what lies between two of these marks, which fall from loop to loop. The state of position
p waits in the bank at p modulo `ring`, since what a request owes is always an unbroken range.

No number here is read by the host: counts are bounds of fixed shapes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gemma_ext.ops.depth_batching import depth_compact
from gemma_ext.serve.step import Part

FREE, READY, HEAD, PARKED, ENDED = range(5)
"""Nobody's row; a token that runs its next loop; one that waits for the head, and for a draw that
the host launches; an output that is complete."""
FIELDS = (
    "kind", "id", "pos", "loop", "since", "last", "least", "most", "drawn", "leaves", "first",
    "held", "weighs",
)  # fmt: skip
_NEVER = 2**62


class Shape(NamedTuple):
    """What is fixed: R requests, W width, C rows of a block at most, B loops, tokens that a request
    may owe, states of a request, the first of them in the bank, and places in front of a prompt."""

    requests: int
    width: int
    rows: int
    loops: int
    backlog: int
    ring: int
    first_slot: int
    prefix: int


class Units(NamedTuple):
    """[R] each: the loop that a request runs next, its positions [begin, end), whether they are
    only owed ones, and the rows of it that run now, from `begin` on."""

    loop: Tensor
    begin: Tensor
    end: Tensor
    owed: Tensor
    take: Tensor


class Chosen(NamedTuple):
    """Rows of a block, and the requests whose current token is among them.

    Attributes:
        part: [C]; behind the last row -1 for slot and request.
        ids: int64 [C] request of each row, 0 where there is none; positions: likewise.
        enters: bool [C], rows that run their first loop.
        row: int64 [U] request of each unit, R for none; ran: bool [U], whether it is one.
        slot: int64 [U] of its current token, the scratch slot for none.
        counts: int64 [4] rows, current ones, owed ones, loops.
    """

    part: Part
    ids: Tensor
    positions: Tensor
    enters: Tensor
    row: Tensor
    ran: Tensor
    slot: Tensor
    counts: Tensor


class Route:
    """State of R requests and a scratch row behind them, which takes what is masked.

    Args:
        shape: of everything.
        policy: of keys and values; `exact` owes, "active_only" counts tokens by loop.
        impl: of `depth_compact`.
        device: of the model.

    Attributes:
        fields: int64 [F, R + 1], each field a view of its own as well: `kind`; `id` of the request;
            `pos` of the current token and loops it has run; `since`, the tick it became ready;
            loops it runs at most (`last`) and before an exit (`least`); tokens to draw at most
            (`most`) and drawn; whether it leaves for sure; length of the prompt (`first`); tokens
            before a stop id (`held`); whether single logits are changed (`weighs`).
        done: int64 [R + 1, B], see above.
        limit: int64 [R + 1], positions that have pages.
    """

    kind: Tensor
    id: Tensor
    pos: Tensor
    loop: Tensor
    since: Tensor
    last: Tensor
    least: Tensor
    most: Tensor
    drawn: Tensor
    leaves: Tensor
    first: Tensor
    held: Tensor
    weighs: Tensor

    def __init__(self, shape: Shape, policy: str, impl: str, device: torch.device) -> None:
        self.shape, self.impl = shape, impl
        self.exact, self.counts_loops = policy.startswith("exact"), policy == "active_only"
        count = shape.requests + 1

        def zeros(*size: int) -> Tensor:
            return torch.zeros(*size, dtype=torch.int64, device=device)

        self.fields = zeros(len(FIELDS), count)
        for name, field in zip(FIELDS, self.fields, strict=True):
            setattr(self, name, field)
        self.done, self.limit = zeros(count, shape.loops), zeros(count)
        self.scratch = shape.first_slot + shape.requests * shape.ring
        self._count = torch.arange(max(shape.rows, count), device=device)
        self._stays = torch.zeros(shape.requests, dtype=torch.bool, device=device)
        self._loops = self._count[: shape.loops]

    def slots(self, request: Tensor, pos: Tensor) -> Tensor:
        """Of the bank, of positions of requests; those of request R are the scratch slot."""
        ring, n = self.shape.ring, self.shape.requests
        at = self.shape.first_slot + request * ring + pos % ring
        return torch.where(request < n, at, self.scratch)

    def first_come(self, kind: int, most: int) -> Tensor:
        """int64 [most] requests of a kind, those that wait longest first; R for none."""
        n = self.shape.requests
        waits = self.kind[:n] == kind
        order = torch.where(waits, self.since[:n], _NEVER).argsort(stable=True)[:most]
        return torch.where(waits[order], order, n)

    def units(self, rows: int) -> Units:
        """The work of every request, and how much of it fits into `rows`."""
        n, width = self.shape.requests, self.shape.width
        pos, done = self.pos[:n], self.done[:n]
        ready = (self.kind[:n] == READY) & (pos < self.limit[:n])
        loop = torch.where(ready, self.loop[:n], 0)
        owed = self._stays
        begin, end = pos, pos + 1
        if self.exact and self.shape.loops > 1:
            reached = self._loops[1:] < self.last[:n, None]
            behind = torch.where(reached, done[:, :-1] - done[:, 1:], 0)  # of loop 1, 2, ..
            owed = (loop == 0) & (behind.sum(1) >= self.shape.backlog)
            next_owed = (behind > 0).int().argmax(1) + 1
            before = done.gather(1, (next_owed - 1).unsqueeze(1)).squeeze(1)
            loop = torch.where(owed, next_owed, loop)
            end = torch.where(owed, before, end)
            begin = done.gather(1, loop.unsqueeze(1)).squeeze(1)
        wanted = torch.where(ready, end - begin, 0)
        order = torch.where(ready, self.since[:n], _NEVER).argsort(stable=True)
        own = torch.where(self._count[:n] < width, wanted[order], 0)
        room = (rows - (own.cumsum(0) - own)).clamp(min=0)
        take = torch.zeros_like(wanted).index_copy(0, order, torch.minimum(own, room))
        return Units(loop, begin, end, owed, take)

    def rows(self, units: Units, most: int) -> Chosen:
        """Rows of the units by loop, those of a request side by side in the order of positions."""
        n, loops = self.shape.requests, self.shape.loops
        sorted_ = depth_compact(
            (units.loop - 1).int(), self._stays, loops, drop=units.take == 0, impl=self.impl
        )
        order = sorted_.order.long()
        own = units.take[order]
        ends = own.cumsum(0)
        at = self._count[:most]
        which = torch.searchsorted(ends, at, right=True).clamp(max=n - 1)
        ids = order[which]
        there = at < ends[-1]
        pos = torch.where(there, units.begin[ids] + at - (ends - own)[which], 0)
        ids, loop = torch.where(there, ids, 0), units.loop[ids]
        place = self.shape.prefix + (self.done[ids, loop] if self.counts_loops else pos)
        bounds = torch.cat([ends.new_zeros(1), ends])[sorted_.seg_offsets.long()]
        columns = (
            torch.where(there, self.slots(ids, pos), -1),
            pos,
            torch.where(there, ids, -1),
            torch.where(there, loop, loops - 1),
            torch.where(there, place, 0),
            bounds,
        )
        units_ = order[: min(n, self.shape.width, most)]
        took = units.take[units_]
        whole = took == (units.end - units.begin)[units_]
        ran = (took > 0) & whole & ~units.owed[units_]
        row = torch.where(ran, units_, n)
        current = ran.sum()
        counts = torch.stack([ends[-1], current, ends[-1] - current, (bounds.diff() > 0).sum()])
        return Chosen(
            Part(*(column.int() for column in columns)),
            ids,
            pos,
            there & (loop == 0),
            row,
            ran,
            self.slots(row, self.pos[row]),
            counts,
        )

    def ran(self, units: Units) -> None:
        """The rows that were taken have their loop's keys and values."""
        done = self.done[: self.shape.requests]
        done.scatter_add_(1, units.loop.unsqueeze(1), units.take.unsqueeze(1))
