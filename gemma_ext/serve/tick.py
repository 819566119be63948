"""A tick: the rows that run next, a loop of each, and the head for those that leave it.

    block   a loop of the rows that run next (`gemma_ext.serve.route`), exit tests
    head    for those that leave: final norm, head, the draw; the token is ready at loop 1. Not in
            every tick where several tokens wait for it

Every shape is fixed and no number is read by the host, so that a card replays a tick from a graph.
Nor may one come from the host: `x[index] = 0` copies its 0 there, which a capture refuses, and
`index_fill_` does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gemma_ext.ops.depth_batching.head import HeadExit
from gemma_ext.serve.exits import ON_CHANGE, ON_HEAD, REMEMBERING
from gemma_ext.serve.flight import DRAWN, FILLED, LEFT, TOLD
from gemma_ext.serve.policies import WRITTEN
from gemma_ext.serve.protocol import MOST_LOGPROBS
from gemma_ext.serve.route import ENDED, FILLING, HEAD, PARKED, READY, Chosen, Route, Shape
from gemma_ext.serve.sampling import CANDIDATES
from gemma_ext.serve.step import Step

if TYPE_CHECKING:
    from gemma_ext.serve.runner import ModelRunner

EARLY = ("cdb", "lockstep")  # modes in which tokens leave before their last loop


class Tick:
    """Ticks of a runner, and what they read and tell.

    Args:
        runner: of the model; its last row of requests and last slot of the bank are scratch.
        shape: of rows and states.
        stops: stop ids of a request that are known here.

    Attributes:
        route: where every request stands.
        now: int64 [1] ticks so far.
        tables: int32 [R, max_pages] the block tables.
        tokens: int64 [R + 1, T + 1] of prompt and output.
        forced: uint8 [R + 1, T + 1] loops after which a token is read, in the place of the test.
        stops: int32 [R + 1, S] stop ids, -1 for none.
        cuts: bool [R + 1], draws that keep only some tokens; asked: int64, logprobs, -1 for none.
        shortlists: whether codes of the head may give the best ids.
        told: int64 [1 + n, F], first what ran and what waits, then of each request that was read
            `TOLD`.
        likely: log-probabilities of those that were read.
    """

    def __init__(self, runner: ModelRunner, shape: Shape, stops: int) -> None:
        self.runner, self.shape, self.exits = runner, shape, runner.exits
        device = runner.bank.device
        self.route = Route(shape, runner.policy, runner.impl, device)
        count, head = shape.requests + 1, runner.readout.head

        def zeros(*size: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(*size, dtype=dtype, device=device)

        self.now = zeros(1)
        self.tables: Tensor | None = None
        self.tokens = runner.sampler.history.tokens
        self.forced = zeros(*self.tokens.shape, dtype=torch.uint8)
        self.stops = zeros(count, stops, dtype=torch.int32) - 1
        self.cuts = zeros(count, dtype=torch.bool)
        self.asked = zeros(count) - 1
        self.test = self.exits.test.name if shape.mode in EARLY else "none"
        self.shortlists = (
            head.shortlist is not None and not head.has_early and self.test not in ON_HEAD
        )
        compares = self.test in ON_CHANGE
        self.before = runner.bank.new_zeros(count, runner.bank.shape[1]) if compares else None
        self.read = min(shape.width, shape.requests)  # by the head at a time
        self.told = zeros(1 + self.read * (1 + shape.finishes), len(TOLD))
        top = min(CANDIDATES, head.vocabulary, MOST_LOGPROBS)
        self.likely = (
            zeros(self.read, dtype=head.dtype),
            zeros(self.read, top, dtype=torch.int32),
            zeros(self.read, top, dtype=head.dtype),
        )

    def run(self, rows: int, reading: str) -> None:
        """A tick of at most `rows` rows.

        Args:
            reading: what is asked of the head: "candidates" where a draw needs them or is told with
                log-probabilities, "best" ids alone, which codes of the head give, "samples", or
                "nothing".
        """
        self.now += 1
        self.route.fields[:, self.shape.requests] = 0
        self.told.zero_()
        self._block(rows)
        if reading != "nothing":
            self._head(reading)
        if self.shape.coda > 1:
            self.told[0, 4:6] = self.route.queues()

    def _block(self, most: int) -> None:
        route, runner = self.route, self.runner
        units = route.units(most)
        chosen = route.rows(units, most)
        enter = torch.where(chosen.enters, chosen.part.slot.long(), route.scratch)
        runner.begin(enter, self.tokens[chosen.ids, chosen.positions])
        watched = None if self.before is None else chosen.slot
        step = Step(runner, chosen.part, self.tables, watched)
        step.run()
        route.ran(units)
        self.told[0, :4] = chosen.counts
        self._advance(chosen, step.before)
        if self.shape.finishes:
            self._finish()

    def _advance(self, chosen: Chosen, before: Tensor | None) -> None:
        """What the loop that has just run means for each current token."""
        route, row, test = self.route, chosen.row, self.test
        pos, run = route.pos[row], route.loop[row] + 1
        leaves, asks = run >= route.last[row], torch.zeros_like(chosen.ran)
        if self.shape.mode in EARLY:
            forced = self.forced[row, pos].long()
            leaves |= (forced > 0) & (run >= forced)
            asks = chosen.ran & ~leaves & (forced == 0)
        if test not in REMEMBERING:
            asks &= run >= route.least[row]
        if test == "none":
            asks = torch.zeros_like(asks)
        elif test not in ON_HEAD:
            leaves |= self._passes(asks, row, chosen.slot, pos, run, before, None)
            asks = torch.zeros_like(asks)
        elif before is not None:
            self.before[row] = before
        route.loop[row] = run
        route.leaves[row] = leaves.long()
        route.kind[row] = torch.where(leaves | asks, HEAD, READY)
        route.since[row] = self.now

    def _passes(
        self,
        asks: Tensor,
        row: Tensor,
        slot: Tensor,
        pos: Tensor,
        run: Tensor,
        before: Tensor | None,
        read: HeadExit | None,
    ) -> Tensor:
        """bool [n] of those that ask: whether their exit test lets them go."""
        to = torch.where(asks, slot, self.route.scratch)  # what tests remember is kept by slot
        loop = (run - 1).clamp(min=0).int()
        passes = self.exits.signals(to, row, pos, loop, before, read)
        return asks & passes & (run >= self.route.least[row])

    def _head(self, reading: str) -> None:
        route, n = self.route, self.shape.requests
        row = route.first_come(route.kind[:n] == HEAD, self.read)
        on, pos, run = row < n, route.pos[row], route.loop[row]
        slot, early = route.slots(row, pos), run < self.shape.loops
        wide, read = reading == "candidates", None
        if reading != "best":
            read = self._read(slot, row, pos, early, CANDIDATES if wide else 0)
        leaves = on & (route.leaves[row] > 0)
        if self.test in ON_HEAD:
            asks, before = on & ~leaves, None
            if self.before is not None:
                before = self.before[row]
            leaves |= self._passes(asks, row, slot, pos, run, before, read)
        if self.runner.policy in WRITTEN:
            skips = torch.where(leaves & early, row, -1)
            last = (run - 1).clamp(min=0)
            self.runner.skip(*(x.int() for x in (slot, skips, pos, last)), self.tables)
        if read is None:
            ids, covered = self.runner.readout.head.best(self.runner.bank, slot), on
        else:
            ids, covered = self._draw(read, row, pos, wide)
        changed = (route.weighs[row] > 0) | (pos + 1 - route.first[row] < route.held[row])
        parks = leaves & (changed | ~covered)
        drawn = leaves & ~parks
        if wide:
            self._tell_likely(ids, read, slot, row, early)
        self._put_back(on & ~leaves, row, READY)
        self._put_back(parks, row, PARKED)
        how = DRAWN * drawn.long() + LEFT * parks.long()
        self._tell(1, row, ids.long(), run, how)
        self.settle(torch.where(drawn, row, n), ids)

    def _tell(self, first: int, row: Tensor, ids: Tensor, run: Tensor, how: Tensor) -> None:
        route = self.route
        columns = (route.id[row], row, route.pos[row], ids, run, route.filled(row), how)
        self.told[first : first + len(row)] = torch.stack(columns, 1)

    def _finish(self) -> None:
        """Outputs whose last owed loop has run are complete."""
        route, n = self.route, self.shape.requests
        every = torch.arange(n, device=self.now.device)
        whole = (route.kind[:n] == FILLING) & (route.filled(every) >= route.pos[:n])
        row = route.first_come(whole, self.read)
        route.kind.index_fill_(0, row, ENDED)
        none = torch.zeros_like(row)
        self._tell(1 + self.read, row, none, none, FILLED * (row < n).long())

    def _put_back(self, which: Tensor, row: Tensor, kind: int) -> None:
        to = torch.where(which, row, self.shape.requests)
        self.route.kind.index_fill_(0, to, kind)
        self.route.since[to] = self.now

    def settle(self, row: Tensor, ids: Tensor) -> None:
        """Tokens `ids` [n] were drawn for requests `row` [n], R for none."""
        route = self.route
        pos, drawn = route.pos[row] + 1, route.drawn[row] + 1
        self.tokens[row, pos] = ids.to(self.tokens.dtype)
        stops = (self.stops[row] == ids.unsqueeze(1)).any(1)
        ended = stops | (drawn >= route.most[row])
        over: Tensor | int = ENDED
        if self.shape.finishes:
            owes = (route.last[row] == self.shape.loops) & (route.filled(row) < pos)
            over = torch.where(owes, FILLING, ENDED)
        route.kind[row] = torch.where(ended, over, READY)
        route.pos[row], route.drawn[row] = pos, drawn
        route.loop.index_fill_(0, row, 0)
        route.since[row] = self.now

    def _read(
        self, slot: Tensor, row: Tensor, pos: Tensor, early: Tensor, candidates: int
    ) -> HeadExit:
        """What the head says of the states in `slot`; early ones may have a head of their own."""
        head, bank = self.runner.readout.head, self.runner.bank
        keys = self.runner.readout.keys_of(row, pos)
        given = (bank, slot, self.runner.readout.temperature[row], keys, candidates)
        found = head.rows(*given, False)
        if not head.has_early:
            return found
        own = head.rows(*given, True)
        return HeadExit(*(_where(early, a, b) for a, b in zip(own, found, strict=True)))

    def _draw(self, read: HeadExit, row: Tensor, pos: Tensor, wide: bool) -> tuple[Tensor, Tensor]:
        """(ids, whether the candidates of the head were enough)."""
        if not wide:
            return read.samples, torch.ones_like(row, dtype=torch.bool)
        every = torch.arange(len(row), device=row.device)
        ids, covered = self.runner.sampler.among_candidates(read, row, pos, every, waits=False)
        cuts = self.cuts[row]
        return torch.where(cuts, ids, read.samples), covered | ~cuts

    def _tell_likely(
        self, ids: Tensor, read: HeadExit, slot: Tensor, row: Tensor, early: Tensor
    ) -> None:
        """Log-probabilities of all rows; the host looks at those that ask."""
        head, bank = self.runner.readout.head, self.runner.bank
        direct = head.logits_at(bank, slot, ids, False)
        if head.has_early:
            direct = torch.where(early, head.logits_at(bank, slot, ids, True), direct)
        logit = torch.where(ids == read.ids, read.top[:, 0], torch.nan)
        own = torch.arange(read.indices.shape[1], device=row.device) < self.asked[row].unsqueeze(1)
        same = (read.indices == ids.unsqueeze(-1)) & own
        found = torch.where(same, read.values, 0).sum(-1)
        logit = torch.where(same.any(-1), found, logit)
        logit = torch.where(logit.isnan(), direct, logit)
        divisor = self.runner.sampler.divisor[row]
        lse = torch.where(divisor == 1, read.lse, read.tempered)
        logprobs, top_ids, top_logprobs = self.likely
        top = top_ids.shape[1]
        logprobs.copy_(logit / divisor - lse)
        top_ids.copy_(read.indices[:, :top])
        top_logprobs.copy_(read.values[:, :top] / divisor.unsqueeze(-1) - lse.unsqueeze(-1))


def _where(early: Tensor, a: Any, b: Any) -> Any:
    if a is None:
        return None
    return torch.where(early if a.dim() == 1 else early.unsqueeze(1), a, b)
