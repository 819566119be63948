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

FREE, READY, HEAD, PARKED, ENDED, FILLING = range(6)
"""Nobody's row; a token that runs its next loop; one that waits for the head, and for a draw that
the host launches; an output that is complete, and one whose owed loops run before it is."""
FIELDS = (
    "kind", "id", "pos", "loop", "since", "last", "least", "most", "drawn", "leaves", "first",
    "held", "weighs",
)  # fmt: skip
_NEVER = 2**62
_FAR = 2**40  # ticks


class Shape(NamedTuple):
    """What is fixed: R requests, W width, C rows of a block at most, B loops, tokens that a request
    may owe, states of a request, the first of them in the bank, and places in front of a prompt;
    and of `EngineConfig` the mode, the order, tokens that wait for the head until it runs, and
    whether owed loops run early and behind an output's end."""

    requests: int
    width: int
    rows: int
    loops: int
    backlog: int
    ring: int
    first_slot: int
    prefix: int
    mode: str = "cdb"
    order: str = "fifo"
    coda: int = 1
    eager: bool = False
    finishes: bool = False


class Units(NamedTuple):
    """[U] each: a request, the loop that it runs next, its positions [begin, end), whether they are
    only owed ones, and the rows of it that run now, from `begin` on.

    The first R are those of all requests in turn; R more, where owed loops run early, are what each
    may run beside its first.
    """

    request: Tensor
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
        self.spares = self.exact and shape.loops > 1 and (shape.eager or shape.finishes)
        most = max(shape.rows, count, shape.loops)
        self._count = torch.arange(most, device=device)
        self._stays = torch.zeros(2 * shape.requests, dtype=torch.bool, device=device)
        self._loops = self._count[: shape.loops]

    def slots(self, request: Tensor, pos: Tensor) -> Tensor:
        """Of the bank, of positions of requests; those of request R are the scratch slot."""
        ring, n = self.shape.ring, self.shape.requests
        at = self.shape.first_slot + request * ring + pos % ring
        return torch.where(request < n, at, self.scratch)

    def filled(self, request: Tensor) -> Tensor:
        """Positions of requests that have all the loops that their tokens may run."""
        last = (self.last[request] - 1).clamp(min=0)
        return self.done[request].gather(1, last.unsqueeze(1)).squeeze(1)

    def first_come(self, waits: Tensor, most: int) -> Tensor:
        """int64 [most] requests of `waits` bool [R], those that wait longest first; R for none."""
        n = self.shape.requests
        order = torch.where(waits, self.since[:n], _NEVER).argsort(stable=True)[:most]
        return torch.where(waits[order], order, n)

    def queues(self) -> Tensor:
        """int64 [2] tokens that wait for the head, and those that may run their next loop."""
        waits = self.kind[: self.shape.requests] == HEAD
        return torch.stack([waits.sum(), self._may_run().sum()])

    def units(self, rows: int) -> Units:
        """The work of every request, and how much of it fits into `rows`."""
        n = self.shape.requests
        pos, done = self.pos[:n], self.done[:n]
        ready = self._may_run()
        loop = torch.where(ready, self.loop[:n], 0)
        key = self._key(loop, ready)
        owed = self._stays[:n]
        begin, end = pos, pos + 1
        if self.exact and self.shape.loops > 1:
            behind = self._behind(done[:, :-1])
            owed = (loop == 0) & (behind.sum(1) >= self.shape.backlog)
            loop = torch.where(owed, _first(behind > 0) + 1, loop)
            end = torch.where(owed, _at(done, loop - 1), end)
            begin = _at(done, loop)
        wanted = torch.where(ready, end - begin, 0)
        take = self._shared_out(key, wanted, rows)
        units = Units(self._count[:n], loop, begin, end, owed, take)
        return self._with_spares(units, rows) if self.spares else units

    def _may_run(self) -> Tensor:
        """bool [R] requests whose token may run its next loop."""
        n = self.shape.requests
        kind, inside = self.kind[:n], self.loop[:n] > 0
        ready = (kind == READY) & (self.pos[:n] < self.limit[:n])
        if self.shape.mode == "cdb":
            return ready
        asks = inside & (kind == HEAD) & (self.leaves[:n] == 0)
        passing = (inside & ready) | asks  # it moves on as one, and ends before the next begins
        return ready & (inside | ~passing.any()) & ~asks.any()

    def _key(self, loop: Tensor, ready: Tensor) -> Tensor:
        """int64 [R]: the smaller runs first."""
        since = torch.where(ready, self.since[: len(loop)], _NEVER)
        if self.shape.order == "deepest":
            return since - torch.where(ready, loop, 0) * _FAR
        if self.shape.order == "uniform":
            own = loop.gather(0, since.argmin(0, keepdim=True))
            same = ready & (loop == own)
            enough = (same.sum() >= self.shape.width) & ((ready & ~same).sum() >= self.shape.width)
            return torch.where(enough & ~same, _NEVER, since)
        return since

    def _behind(self, reached: Tensor) -> Tensor:
        """int64 [R, B - 1]: positions that have run each loop, of `reached`, and owe the next."""
        done, last = self.done[: len(reached)], self.last[: len(reached), None]
        behind = (reached - done[:, 1:]).clamp(min=0)
        return torch.where(self._loops[1:] < last, behind, 0)

    def _shared_out(self, key: Tensor, wanted: Tensor, room: int | Tensor) -> Tensor:
        """Rows that requests get of those they want: W of them, in the order of their keys."""
        order = key.argsort(stable=True)
        own = torch.where(
            (self._count[: len(key)] < self.shape.width) & (key[order] < _NEVER), wanted[order], 0
        )
        left = (room - (own.cumsum(0) - own)).clamp(min=0)
        return torch.zeros_like(wanted).index_copy(0, order, torch.minimum(own, left))

    def _with_spares(self, first: Units, rows: int) -> Units:
        """Also owed loops, in rows of the width that no token takes: of requests that go on, then
        of those that have ended."""
        n = self.shape.requests
        kind, pos, done = self.kind[:n], self.pos[:n], self.done[:n]
        ended = kind == FILLING
        goes_on = (kind == READY) | (kind == HEAD) | (kind == PARKED)
        may = ended
        if self.shape.eager:
            may = may | (goes_on & (pos < self.limit[:n]))
        behind = self._behind(torch.minimum(done[:, :-1], pos.unsqueeze(1)))
        runs = (first.take > 0).unsqueeze(1) & (self._loops[1:] == first.loop.unsqueeze(1))
        owes = (behind > 0) & ~runs
        loop = _first(owes) + 1
        begin, end = _at(done, loop), torch.minimum(_at(done, loop - 1), pos)
        wanted = torch.where(may & owes.any(1), end - begin, 0)
        key = self.since[:n] + torch.where(ended, _FAR, 0)
        key = torch.where(wanted > 0, key, _NEVER)
        room = min(self.shape.width, rows) - first.take.sum()
        take = self._shared_out(key, wanted, room)
        spare = Units(first.request, loop, begin, end, ~self._stays[:n], take)
        return Units(*(torch.cat(pair) for pair in zip(first, spare, strict=True)))

    def rows(self, units: Units, most: int) -> Chosen:
        """Rows of the units by loop, those of a unit side by side in the order of positions."""
        n, loops, count = self.shape.requests, self.shape.loops, len(units.loop)
        sorted_ = depth_compact(
            (units.loop - 1).int(), self._stays[:count], loops, drop=units.take == 0, impl=self.impl
        )
        order = sorted_.order.long()
        own = units.take[order]
        ends = own.cumsum(0)
        at = self._count[:most]
        which = torch.searchsorted(ends, at, right=True).clamp(max=count - 1)
        unit = order[which]
        there = at < ends[-1]
        pos = torch.where(there, units.begin[unit] + at - (ends - own)[which], 0)
        ids, loop = torch.where(there, units.request[unit], 0), units.loop[unit]
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
        width = self.shape.width
        units_ = order[: min(count, width * (1 + self.spares), most)]
        took = units.take[units_]
        whole = took == (units.end - units.begin)[units_]
        ran = (took > 0) & whole & ~units.owed[units_]
        row = torch.where(ran, units.request[units_], n)
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
        n, loops = self.shape.requests, self.shape.loops
        place = units.request * loops + units.loop
        self.done[:n].view(-1).scatter_add_(0, place, units.take)


def _first(which: Tensor) -> Tensor:
    """int64 [R] the first column of bool [R, C] that is set; 0 for none."""
    return which.int().argmax(1)


def _at(marks: Tensor, loop: Tensor) -> Tensor:
    """marks [R, B] at a loop of each; that of loop 0 before it."""
    return marks.gather(1, loop.clamp(min=0).unsqueeze(1)).squeeze(1)
