"""Decoding that waits for nobody: exits, the next rows and the tokens that are drawn stay on the
device, and the host hears of them a tick later.

    tick   block   the rows that run next, a loop of each (`gemma_ext.serve.route`), exit tests
           head    for those that leave: final norm, head, the draw; the token is ready at loop 1

Every shape is fixed, so that a card replays a tick from a graph. The host gives requests their
rows, pages ahead of need and prompts, and ends what it finds complete: a tick or two late, which
costs work and changes no token, since a draw is a function of its request and position.

A draw that changes single logits (bias, penalties, stop ids that come too early), or cuts the
vocabulary further than the candidates of the head reach, is parked: the host launches it when it
hears of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from gemma_ext.ops.depth_batching.head import HeadExit
from gemma_ext.serve.exits import ON_HEAD, REMEMBERING
from gemma_ext.serve.flight import DRAWN, LEFT, TOLD, Flight
from gemma_ext.serve.policies import WRITTEN
from gemma_ext.serve.protocol import MOST_LOGPROBS, Request
from gemma_ext.serve.route import ENDED, FIELDS, FREE, HEAD, PARKED, READY, Chosen, Route, Shape
from gemma_ext.serve.sampling import CANDIDATES, Sampled
from gemma_ext.serve.step import Step

if TYPE_CHECKING:
    from gemma_ext.serve.runner import ModelRunner

MOST_STOPS = 16  # stop ids of a request that the device knows; the host knows all
_LEAST_ROWS = 8


class Router:
    """Ticks of a runner whose tokens route themselves.

    Args:
        runner: of the model; its last row of requests and last slot of the bank are scratch.
        shape: of rows and states.

    Raises:
        ValueError: a model or a runner that cannot be run from fixed shapes.
    """

    def __init__(self, runner: ModelRunner, shape: Shape) -> None:
        if reason := refusal(runner):
            raise ValueError(f"routing: expected {reason}, got 'device'")
        self.runner, self.shape, self.exits = runner, shape, runner.exits
        device = runner.bank.device
        self.route = Route(shape, runner.policy, runner.impl, device)
        count, head = shape.requests + 1, runner.readout.head

        def zeros(*size: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(*size, dtype=dtype, device=device)

        self.tokens = runner.sampler.history.tokens  # [R + 1, T + 1]
        self.forced = zeros(*self.tokens.shape, dtype=torch.uint8)  # loops of replayed exits
        self.stops = zeros(count, MOST_STOPS, dtype=torch.int32) - 1
        self.cuts = zeros(count, dtype=torch.bool)
        self.asked = zeros(count) - 1
        self.temperature, self.keys = runner.readout.temperature, runner.readout.keys
        wide = self.exits.wants_before
        self.before = runner.bank.new_zeros(count, runner.bank.shape[1]) if wide else None
        self.tables: Tensor | None = None
        self.now = zeros(1)
        told = 1 + min(shape.width, shape.requests)
        self.told = zeros(told, len(TOLD))
        most = min(CANDIDATES, head.vocabulary)
        self.top = min(most, MOST_LOGPROBS)
        self.likely = (
            zeros(told - 1, dtype=head.dtype),
            zeros(told - 1, self.top, dtype=torch.int32),
            zeros(told - 1, self.top, dtype=head.dtype),
        )
        self.ticks = 0
        self.wide: set[int] = set()  # rows whose draws need candidates or are told with log-probs
        self._graphs: dict[tuple[int, bool], Any] = {}
        self._pool: Any = None

    def start(
        self,
        row: int,
        id: int,
        request: Request,
        pos: int,
        slot: int,
        drawn: int,
        depths: Sequence[int] = (),
    ) -> None:
        """A request goes on from the token at `pos`.

        Args:
            slot: of the bank, of the state of that token after all loops; -1 if it has run none.
            drawn: tokens of the output so far.
            depths: loops after which each token of the output is read, in the place of the test.
        """
        params, runner, route = request.params, self.runner, self.route
        last = min(params.max_loops or self.shape.loops, self.shape.loops)
        history = runner.sampler.history
        values = {
            "kind": READY if slot < 0 else HEAD,
            "id": id,
            "pos": pos,
            "loop": 0 if slot < 0 else last,
            "since": self.ticks,
            "last": last,
            "least": params.min_loops,
            "most": params.max_tokens,
            "drawn": drawn,
            "leaves": 1,
            "first": len(request.prompt),
            "held": int(history.min_tokens[row]),
            "weighs": int(history.weighs[row]),
        }
        self._put(route.fields[:, row], [values[name] for name in FIELDS])
        route.done[row] = pos + (slot >= 0)
        stops = list(params.stop_ids)[:MOST_STOPS]
        self._put(self.stops[row], stops + [-1] * (MOST_STOPS - len(stops)))
        sampler = runner.sampler
        self.cuts[row], self.asked[row] = bool(sampler.cuts[row]), int(sampler.asked[row])
        self.forced[row] = 0
        if depths:
            begin = len(request.prompt) - 1
            self._put(self.forced[row, begin : begin + len(depths)], list(depths))
        self.wide.discard(row)
        if sampler.cuts[row] or sampler.asked[row] >= 0:
            self.wide.add(row)
        if slot >= 0:
            with torch.inference_mode():
                mine = self.shape.first_slot + row * self.shape.ring + pos % self.shape.ring
                runner.bank[mine] = runner.bank[slot]

    def stop(self, row: int) -> None:
        """Nothing of the row runs any more behind what is under way."""
        self.route.kind[row] = FREE
        self.wide.discard(row)

    def _put(self, where: Tensor, values: list[int]) -> None:
        where.copy_(torch.tensor(values), non_blocking=True)

    @torch.inference_mode()
    def tick(self, tables: Tensor, limits: Tensor, requests: int) -> Flight:
        """Launches a tick.

        Args:
            tables: int32 [R, max_pages] on the host.
            limits: int32 [R] on the host, places of each request that have pages.
            requests: that are on the device.
        """
        if self.tables is None:
            self.tables = torch.zeros_like(tables, device=self.now.device)
        self.tables.copy_(tables, non_blocking=True)
        limits = limits - self.shape.prefix
        self.route.limit[: self.shape.requests].copy_(limits, non_blocking=True)
        rows = max(_LEAST_ROWS, 1 << (2 * requests - 1).bit_length())
        key = min(rows, self.shape.rows), bool(self.wide)
        self.ticks += 1
        if self.now.device.type == "cuda":
            self._replay(key)
        else:
            self.step(*key)
        return Flight(self.told, self.likely if key[1] else None)

    def _replay(self, key: tuple[int, bool]) -> None:
        if key not in self._graphs:
            if not self._graphs:  # once as it is: libraries begin with what no graph can hold
                kept = self.route.fields.clone()
                self.route.fields.zero_()
                side = torch.cuda.Stream()
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    self.step(*key)
                torch.cuda.current_stream().wait_stream(side)
                self.route.fields.copy_(kept)
                self.now -= 1
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                self.step(*key)
            self._pool, self._graphs[key] = graph.pool(), graph
        self._graphs[key].replay()

    def step(self, rows: int, wide: bool) -> None:
        """A tick of at most `rows` rows, of fixed shapes and without a word to the host."""
        self.now += 1
        self.route.fields[:, self.shape.requests] = 0
        self.told.zero_()
        self._block(rows)
        self._head(wide)

    def _block(self, most: int) -> None:
        route, runner = self.route, self.runner
        units = route.units(most)
        chosen = route.rows(units, most)
        enter = torch.where(chosen.enters, chosen.part.slot.long(), route.scratch)
        runner.begin(enter, self.tokens[chosen.ids, chosen.positions])
        watched = chosen.slot if self.exits.wants_before else None
        step = Step(runner, chosen.part, self.tables, watched)
        step.run()
        route.ran(units)
        self.told[0, :4] = chosen.counts
        self._advance(chosen, step.before)

    def _advance(self, chosen: Chosen, before: Tensor | None) -> None:
        """What the loop that has just run means for each current token."""
        route, row, test = self.route, chosen.row, self.exits.test.name
        pos, run = route.pos[row], route.loop[row] + 1
        forced = self.forced[row, pos].long()
        leaves = (run >= route.last[row]) | ((forced > 0) & (run >= forced))
        asks = chosen.ran & ~leaves & (forced == 0)
        if test not in REMEMBERING:
            asks &= run >= route.least[row]
        if test == "none":
            asks &= False
        elif test not in ON_HEAD:
            passes = self._passes(asks, row, chosen.slot, pos, run, before, None)
            leaves |= passes
            asks &= False
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

    def _head(self, wide: bool) -> None:
        route, n = self.route, self.shape.requests
        row = route.first_come(HEAD, len(self.told) - 1)
        on, pos, run = row < n, route.pos[row], route.loop[row]
        slot, early = route.slots(row, pos), run < self.shape.loops
        read = self._read(slot, row, pos, early, CANDIDATES if wide else 0)
        leaves = on & (route.leaves[row] > 0)
        if self.exits.test.name in ON_HEAD:
            asks, before = on & ~leaves, None
            if self.before is not None:
                before = self.before[row]
            leaves |= self._passes(asks, row, slot, pos, run, before, read)
        if self.runner.policy in WRITTEN:
            skips = torch.where(leaves & early, row, -1)
            last = (run - 1).clamp(min=0)
            self.runner.skip(*(x.int() for x in (slot, skips, pos, last)), self.tables)
        ids, covered = self._draw(read, row, pos, wide)
        changed = (route.weighs[row] > 0) | (pos + 1 - route.first[row] < route.held[row])
        parks = leaves & (changed | ~covered)
        drawn = leaves & ~parks
        if wide:
            self._tell_likely(ids, read, slot, row, early)
        self._put_back(on & ~leaves, row, READY)
        self._put_back(parks, row, PARKED)
        filled = route.done[row].gather(1, (route.last[row] - 1).clamp(min=0).unsqueeze(1))
        how = DRAWN * drawn.long() + LEFT * parks.long()
        columns = (route.id[row], row, pos, ids.long(), run, filled.squeeze(1), how)
        self.told[1:] = torch.stack(columns, 1)
        self._settle(torch.where(drawn, row, n), ids)

    def _put_back(self, which: Tensor, row: Tensor, kind: int) -> None:
        to = torch.where(which, row, self.shape.requests)
        self.route.kind[to] = kind
        self.route.since[to] = self.now

    def _settle(self, row: Tensor, ids: Tensor) -> None:
        """Tokens `ids` [n] were drawn for requests `row` [n], R for none."""
        route = self.route
        pos, drawn = route.pos[row] + 1, route.drawn[row] + 1
        self.tokens[row, pos] = ids.to(self.tokens.dtype)
        stops = (self.stops[row] == ids.unsqueeze(1)).any(1)
        ended = stops | (drawn >= route.most[row])
        route.kind[row] = torch.where(ended, ENDED, READY)
        route.pos[row], route.drawn[row] = pos, drawn
        route.loop[row] = 0
        route.since[row] = self.now

    def _read(
        self, slot: Tensor, row: Tensor, pos: Tensor, early: Tensor, candidates: int
    ) -> HeadExit:
        """What the head says of the states in `slot`; early ones may have a head of their own."""
        head, bank = self.runner.readout.head, self.runner.bank
        keys = self.runner.readout.keys_of(row, pos)
        given = (bank, slot, self.temperature[row], keys, candidates)
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
        logprobs, top_ids, top_logprobs = self.likely
        logprobs.copy_(logit - read.lse)
        top_ids.copy_(read.indices[:, : self.top])
        top_logprobs.copy_(read.values[:, : self.top] - read.lse.unsqueeze(-1))

    @torch.inference_mode()
    def draw(self, parked: np.ndarray) -> Sampled:
        """Draws for rows that a tick has parked (`News.parked`), from all their logits."""
        row, pos, depth = (torch.from_numpy(parked[:, i].copy()) for i in (1, 2, 4))
        slot = self.shape.first_slot + row * self.shape.ring + pos % self.shape.ring
        self.runner.readout.changed(slot.numpy())
        sampled = self.runner.sampler.draw(slot, row, pos, depth < self.shape.loops)
        device = self.now.device
        self._settle(row.to(device), sampled.ids.to(device))
        return sampled


def refusal(runner: ModelRunner) -> str | None:
    """What a runner would have to be for tokens to route themselves; None if it is."""
    model, head = runner.weights, runner.readout.head
    if model.prelude or model.coda:
        return "a model whose layers are all in its loops with it"
    if head.shortlist is not None:
        return "no shortlist with it"
    return None


def _where(early: Tensor, a: Any, b: Any) -> Any:
    if a is None:
        return None
    return torch.where(early if a.dim() == 1 else early.unsqueeze(1), a, b)
