"""The model step of an engine: one run of the block for rows that stand at different loops.

    embed    tokens -> hidden bank
    block    K stored layers for every row at its own loop; keys and values into pages
    coda     final norm, head, the next tokens

The prelude runs in front of the first loop of a row, the coda layers behind its last one; an early
exit goes from the end of its loop straight to the final norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from gemma_ext.ops.depth_batching import kv_copy, kv_propagate, rope_table
from gemma_ext.ops.depth_batching.kv import PAGE
from gemma_ext.serve.exit_state import Exits
from gemma_ext.serve.exits import ExitTest
from gemma_ext.serve.graphs import Graphs
from gemma_ext.serve.policies import WRITTEN, deeper_layers, pool_depths
from gemma_ext.serve.prefix import prefix_kv
from gemma_ext.serve.protocol import Request
from gemma_ext.serve.readout import Head, Readout
from gemma_ext.serve.sampling import CANDIDATES, Sampled, Sampler
from gemma_ext.serve.step import CURRENT, FILL, PROMPT, Part, Rows, Step
from gemma_ext.serve.weights import Weights

__all__ = ["CURRENT", "FILL", "PROMPT", "ModelRunner", "Rows", "Sizes"]


@dataclass(frozen=True)
class Sizes:
    """Memory of a runner.

    Attributes:
        requests: rows of the block tables, R.
        slots: of the hidden bank, S.
        pages: of the pool, 16 tokens each.
        max_length: tokens of a request at most.
    """

    requests: int
    slots: int
    pages: int
    max_length: int


class ModelRunner:
    """Runs a model for an engine.

    Args:
        weights: of the model.
        sizes: of pool, bank and tables; fixed from here on.
        policy, keep: where keys and values lie (`gemma_ext.serve.policies`).
        exits: the exit test.
        impl: of the ops; the formulas in float64.
        head: in the place of the model's own.
        shortlist: of the head, for greedy requests (`gemma_ext.serve.readout.Head`).
        graphs: whether a block is run from fixed buffers, captured on a card
            (`gemma_ext.serve.graphs`); by default on a card.
        drafts: whether the head reads states behind owed loops too.

    Raises:
        ValueError: sizes that no request fits, a policy or exit test that does not fit the model.
    """

    def __init__(
        self,
        weights: Weights,
        sizes: Sizes,
        *,
        policy: str = "exact_lazy",
        keep: int = 1,
        exits: ExitTest | None = None,
        impl: str = "auto",
        head: Head | None = None,
        graphs: bool | None = None,
        shortlist: bool = False,
        drafts: bool = False,
    ) -> None:
        for name in ("requests", "slots", "pages", "max_length"):
            if getattr(sizes, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(sizes, name)}")
        if sizes.max_length > weights.max_length:
            raise ValueError(
                f"max_length: expected at most the {weights.max_length} positions of the model, "
                f"got {sizes.max_length}"
            )
        self.weights, self.sizes, self.policy = weights, sizes, policy
        self.impl = "reference" if weights.dtype == torch.float64 else impl
        self.depths = pool_depths(weights, policy, keep)
        self.loops, self.vocabulary = weights.loops, weights.vocabulary
        self.prefix, self.drafts = weights.prefix, drafts
        place = {"dtype": weights.dtype, "device": weights.device}
        page = (2, weights.kv_heads, PAGE, weights.head_dim)
        self.kv_pool = torch.zeros(self.depths.count, sizes.pages, *page, **place)
        wide = torch.promote_types(weights.dtype, torch.float32)
        width = weights.embedding.shape[1]
        self.bank = torch.zeros(sizes.slots, width, dtype=wide, device=weights.device)
        angles = [
            rope_table(frequencies, sizes.max_length, scaling=scale, dtype=wide)
            for frequencies, scale in weights.ropes
        ]
        # by place: a prefix stands in front of position 0 and is not turned
        self.rope = pad(torch.stack(angles), (0, 0, 0, 0, self.prefix, 0)).to(weights.device)
        head = head or Head(weights, self.impl, shortlist=shortlist)
        self.readout = Readout(head, self.bank, sizes.requests, CANDIDATES)
        self.sampler = Sampler(self.readout, sizes.requests, sizes.max_length, self.impl)
        if exits is not None and exits.adapt and not drafts:
            raise ValueError("adapt: expected drafts of at least 1 with it, got 0")
        self.exits = Exits(exits or ExitTest(), self.readout, self.loops, sizes.requests, self.impl)
        on_card = weights.device.type == "cuda"
        self.graphs = Graphs(self) if (on_card if graphs is None else graphs) else None
        self._deeper = deeper_layers(weights, self.depths)
        if self.prefix:
            self._prefix_kv = prefix_kv(weights, self.depths, self.kv_pool, self.impl)
        self.last_loop = np.zeros(sizes.requests, np.int64)
        self.read_from = np.zeros(sizes.requests, np.int64)  # the first position that is read
        self.reached = np.zeros((sizes.requests, self.loops), np.int32)  # of active_only

    def open(self, row: int, request: Request, drawn: Sequence[int] = ()) -> None:
        """A request takes a row of the block tables.

        Args:
            drawn: tokens that an earlier stay has drawn.
        """
        self.sampler.open(row, request, drawn)
        self.exits.open(row, request.params, len(request.prompt))
        params = request.params
        self.last_loop[row] = min(params.max_loops or self.loops, self.loops) - 1
        known = len(request.prompt) + len(drawn)
        self.read_from[row] = known - 1 if request.prompt_logprobs is None else 0
        self.reached[row] = self.prefix

    def places(self, rows: Rows) -> Tensor:
        """int32 [n] place of each row among the tokens of its request that ran its loop, behind
        its prefix."""
        places = rows.pos + self.prefix
        if self.policy != "active_only":
            return places
        req, loop, pos = rows.req.numpy(), rows.loop.numpy(), places.numpy()
        current = rows.kind.numpy() == CURRENT
        places = np.where(current, self.reached[req, loop], pos).astype(np.int32)
        np.maximum.at(self.reached, (req, loop), places + 1)
        return torch.from_numpy(places)

    @torch.inference_mode()
    def write_prefix(self, requests: Tensor, tables: Tensor) -> None:
        """Keys and values of the model's prefix into the first pages of `requests` [n], int64 on
        the host."""
        at = torch.arange(self.prefix)
        pages = tables[requests][:, at // PAGE].long().to(self.kv_pool.device)  # [n, P]
        offsets = (at % PAGE).expand(pages.shape).to(self.kv_pool.device)
        self.kv_pool[:, pages, :, :, offsets] = self._prefix_kv  # [n, P] in front

    def _quiet(self, rows: Rows) -> np.ndarray:
        """bool [n] rows at their last loop whose state behind it nobody reads."""
        req, kind = rows.req.numpy(), rows.kind.numpy()
        unread = (kind == PROMPT) & (rows.pos.numpy() < self.read_from[req])
        if not self.drafts:
            unread |= kind == FILL
        return unread & (rows.loop.numpy() == self.last_loop[req])

    def summed(self, y: Tensor) -> Tensor:
        """y [n, D] of this process, which has all of it."""
        return y

    def close(self, row: int) -> None:
        """The request leaves its row. Nothing of it is read any more."""

    @torch.inference_mode()
    def embed(self, slots: Tensor, ids: Tensor, positions: Tensor) -> None:
        """Tokens `ids` [n] begin in `slots` [n] of the bank, int32 on the host."""
        self.begin(slots.long(), ids.long())
        self.readout.changed(slots.numpy())

    def begin(self, slots: Tensor, ids: Tensor) -> None:
        """`embed` of int64 [n], wherever they are."""
        states = self.weights.embedding[ids] * self.weights.embedding_scale
        self.bank[slots] = states.to(self.bank.dtype)
        self.exits.enter(slots)

    @torch.inference_mode()
    def block(self, rows: Rows) -> Tensor | None:
        """Runs every row's loop: writes its keys and values, moves its state on.

        Returns:
            bool [n] on the host, rows whose exit test passed; None where no row is tested.
        """
        tested = self.exits.tested(rows.kind.numpy() == CURRENT, rows.req, rows.loop)
        if self.graphs is not None:
            states = self.graphs.run(rows)
            before = None if states is None else states[torch.from_numpy(tested)]
        else:
            before = self._run(rows, tested)
        self.readout.changed(rows.slot.numpy())
        return self._signals(rows, tested, before)

    def _run(self, rows: Rows, tested: np.ndarray) -> Tensor | None:
        """The states of tested rows that their test compares with, if it does."""
        device = self.bank.device
        columns = (rows.slot, rows.pos, rows.req, rows.loop, self.places(rows), rows.seg_offsets)
        watched = None
        if self.exits.wants_before and len(tested):
            watched = rows.slot[torch.from_numpy(tested)].long().to(device)
        part = Part(*(column.to(device) for column in columns))
        step = Step(self, part, rows.block_tables.to(device), watched)
        step.run(rows.seg_offsets.tolist(), self._quiet(rows))
        return step.before

    def _signals(self, rows: Rows, tested: np.ndarray, before: Tensor | None) -> Tensor | None:
        if len(tested) == 0:
            return None
        at = torch.from_numpy(tested)
        where = (rows.slot[at].long(), rows.req[at].long(), rows.pos[at].long())
        out = torch.zeros(len(rows.slot), dtype=torch.bool)
        out[at] = self.exits.signals(*where, rows.loop[at], before).cpu()
        return out

    @torch.inference_mode()
    def coda(
        self, slots: Tensor, requests: Tensor, positions: Tensor, loops: Tensor, tables: Tensor
    ) -> Sampled:
        """The tokens behind `positions`; keys and values of skipped loops where the policy says so.

        Args:
            slots, requests, positions: int32 [n] on the host; requests are rows of `tables`.
            loops: int32 [n] how many loops have run.
            tables: the block tables.
        """
        early = loops < self.loops
        if self.policy in WRITTEN and bool(early.any()):
            at = early.nonzero().squeeze(1)
            self.skip(slots[at], requests[at], positions[at], loops[at] - 1, tables)
        sampled = self.sampler.draw(slots.long(), requests.long(), positions.long(), early)
        if self.exits.adaptive is not None:
            whole = loops.numpy() > self.last_loop[requests.numpy()]
            at = slots[torch.from_numpy(whole)].long()
            self.exits.learn(at, self.readout.likeliest(at))
        return sampled

    @torch.inference_mode()
    def score(
        self, slots: Tensor, requests: Tensor, positions: Tensor, ids: Tensor, top: int
    ) -> Sampled:
        """Log-probabilities of the given tokens `ids` [n] behind `positions`, after all the loops
        that their requests may run."""
        early = torch.from_numpy(self.last_loop[requests.numpy()] < self.loops - 1)
        where = (slots.long(), requests.long(), positions.long())
        return self.sampler.score(*where, ids, early, top)

    def skip(
        self, slots: Tensor, requests: Tensor, positions: Tensor, last: Tensor, tables: Tensor
    ) -> None:
        """Keys and values of the loops after `last` [n], from 0, of tokens that leave; all int32
        [n], a request of -1 is none."""
        device, model = self.kv_pool.device, self.weights
        places = positions + self.prefix
        where = (self.kv_pool, *(x.to(device) for x in (tables, requests, places, last)))
        if self.policy != "propagate":
            kv_copy(*where, self.depths.rows, impl=self.impl)
            return
        kv_propagate(
            self.bank[slots.long()].to(self.kv_pool.dtype),
            self._deeper,
            *where,
            rope=self.rope,
            eps=model.eps,
            plus_one=model.plus_one,
            impl=self.impl,
        )
