"""Decoding that waits for nobody: exits, the next rows and the tokens that are drawn stay on the
device (`gemma_ext.serve.tick`), and the host hears of them a tick later.

The host gives requests their rows, pages ahead of need and prompts, and ends what it finds
complete: a tick or two late, which costs work and changes no token, since a draw is a function of
its request and position.

A draw that changes single logits (bias, penalties, stop ids that come too early), or cuts the
vocabulary further than the candidates of the head reach, is parked: the host launches it when it
hears of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from gemma_ext._host import DEVICE_STOPS
from gemma_ext.serve.exits import ON_HEAD
from gemma_ext.serve.flight import Flight
from gemma_ext.serve.graphs import Recorder
from gemma_ext.serve.protocol import Request
from gemma_ext.serve.route import FIELDS, FREE, HEAD, READY, Shape
from gemma_ext.serve.sampling import Sampled
from gemma_ext.serve.tick import Tick

if TYPE_CHECKING:
    from gemma_ext.serve.runner import ModelRunner

_LEAST_ROWS = 8


class Router:
    """Ticks of a runner whose tokens route themselves.

    Args:
        runner: of the model; its last row of requests and last slot of the bank are scratch.
        shape: of rows and states.
    """

    def __init__(self, runner: ModelRunner, shape: Shape) -> None:
        self.runner, self.shape = runner, shape
        self.work = Tick(runner, shape, DEVICE_STOPS)
        self.ticks = 0
        self.wide: set[int] = set()  # rows whose draws need candidates or are told with log-probs
        self.hot: set[int] = set()  # rows whose draws are samples
        self.queues: tuple[int, ...] = (0, 0)  # as last heard (`News.queues`)
        self._read = False  # whether the last tick had a head
        # an exit test on the head reads it behind every block
        self._coda = 1 if self.work.test in ON_HEAD else shape.coda
        self._graphs: dict[tuple[int, str], torch.cuda.CUDAGraph] = {}
        device = runner.bank.device
        self._recorder = Recorder(device) if device.type == "cuda" else None

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
        params, runner, work = request.params, self.runner, self.work
        route = work.route
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
        stops = list(params.stop_ids)[:DEVICE_STOPS]
        self._put(work.stops[row], stops + [-1] * (DEVICE_STOPS - len(stops)))
        sampler = runner.sampler
        work.cuts[row].fill_(bool(sampler.cuts[row]))
        work.asked[row].fill_(int(sampler.asked[row]))
        work.forced[row] = 0
        if depths:
            begin = len(request.prompt) - 1
            self._put(work.forced[row, begin : begin + len(depths)], list(depths))
        for rows, own in (
            (self.wide, sampler.cuts[row] or sampler.asked[row] >= 0),
            (self.hot, sampler.hot[row]),
        ):
            (rows.add if own else rows.discard)(row)
        if slot >= 0:
            with torch.inference_mode():
                mine = self.shape.first_slot + row * self.shape.ring + pos % self.shape.ring
                runner.bank[mine] = runner.bank[slot]

    def stop(self, row: int) -> None:
        """Nothing of the row runs any more behind what is under way."""
        self.work.route.kind[row].fill_(FREE)
        self.wide.discard(row)
        self.hot.discard(row)

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
        work = self.work
        if work.tables is None:
            work.tables = torch.zeros_like(tables, device=work.now.device)
        work.tables.copy_(tables, non_blocking=True)
        limits = limits - self.shape.prefix
        work.route.limit[: self.shape.requests].copy_(limits, non_blocking=True)
        rows = max(_LEAST_ROWS, 1 << (2 * requests - 1).bit_length())
        key = min(rows, self.shape.rows), self._reading(requests)
        self.ticks += 1
        if self._recorder is None:
            work.run(*key)
        else:
            self._replay(key, self._recorder)
        return Flight(work.told, work.likely if self.wide else None)

    def _reading(self, requests: int) -> str:
        """What the next tick asks of the head: nothing while too few of `requests` wait for it and
        others can run. The tick before has not been heard of; a head in it left none waiting."""
        waiting, ready = self.queues
        few = self._read or (ready > 0 and waiting < self._coda)
        self._read = not (few and 1 < self._coda <= requests)
        if not self._read:
            return "nothing"
        best = self.work.shortlists and not self.hot
        return "candidates" if self.wide else "best" if best else "samples"

    def _replay(self, key: tuple[int, str], recorder: Recorder) -> None:
        if key not in self._graphs:
            work = self.work
            kept = work.route.fields.clone()
            work.route.fields.zero_()  # nobody's rows, so that the first run changes nothing
            recorder.warm(lambda: work.run(*key))
            work.route.fields.copy_(kept)
            work.now -= 1
            self._graphs[key] = recorder.capture(lambda: work.run(*key))
        self._graphs[key].replay()

    @torch.inference_mode()
    def draw(self, parked: np.ndarray) -> Sampled:
        """Draws for rows that a tick has parked (`News.parked`), from all their logits."""
        row, pos, depth = (torch.from_numpy(parked[:, i].copy()) for i in (1, 2, 4))
        slot = self.shape.first_slot + row * self.shape.ring + pos % self.shape.ring
        self.runner.readout.changed(slot.numpy())
        sampled = self.runner.sampler.draw(slot, row, pos, depth < self.shape.loops)
        device = self.work.now.device
        self.work.settle(row.to(device), sampled.ids.to(device))
        return sampled
