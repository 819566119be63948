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
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gemma_ext.ops.depth_batching import (
    DeeperLayer,
    kv_copy,
    kv_propagate,
    paged_attn_mixed_depth,
    rope_kv_write,
    rope_table,
)
from gemma_ext.ops.depth_batching.kv import PAGE
from gemma_ext.ops.depth_batching.linear import seg_depth_gated, seg_depth_lora
from gemma_ext.ops.depth_batching.norm import gather_rms_norm, scatter_rms_norm
from gemma_ext.reference.depth_batching import rms_norm, rotate
from gemma_ext.serve.exits import Exits, ExitTest
from gemma_ext.serve.policies import WRITTEN, pool_depths
from gemma_ext.serve.protocol import Request
from gemma_ext.serve.readout import Head, Readout
from gemma_ext.serve.sampling import CANDIDATES, Sampled, Sampler
from gemma_ext.serve.weights import Layer, Weights

CURRENT, FILL, PROMPT = 0, 1, 2


class Rows(NamedTuple):
    """Rows of one run of the block, int32 on the host, sorted by loop.

    Attributes:
        slot: [n] of the hidden bank, all different.
        pos: [n] position in the request.
        req: [n] row of the block tables.
        loop: [n] from 0.
        seg_offsets: [B + 1], where each loop begins.
        kind: [n] `CURRENT`, `FILL` or `PROMPT`.
        block_tables: [R, max_pages] pages of 16 tokens.
    """

    slot: Tensor
    pos: Tensor
    req: Tensor
    loop: Tensor
    seg_offsets: Tensor
    kind: Tensor
    block_tables: Tensor


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
        place = {"dtype": weights.dtype, "device": weights.device}
        page = (2, weights.kv_heads, PAGE, weights.head_dim)
        self.kv_pool = torch.zeros(self.depths.count, sizes.pages, *page, **place)
        wide = torch.promote_types(weights.dtype, torch.float32)
        width = weights.embedding.shape[1]
        self.bank = torch.zeros(sizes.slots, width, dtype=wide, device=weights.device)
        self.rope = torch.stack(
            [
                rope_table(frequencies, sizes.max_length, scaling=scale, dtype=wide)
                for frequencies, scale in weights.ropes
            ]
        ).to(weights.device)
        self.readout = Readout(
            head or Head(weights, self.impl), self.bank, sizes.requests, CANDIDATES
        )
        self.sampler = Sampler(self.readout, sizes.requests, sizes.max_length, self.impl)
        self.exits = Exits(exits or ExitTest(), self.readout, self.loops, sizes.requests, self.impl)
        self.reached = np.zeros((sizes.requests, self.loops), np.int32)  # of active_only

    @property
    def page_bytes(self) -> int:
        """Of a page at all depths."""
        return self.kv_pool[:, 0].numel() * self.kv_pool.element_size()

    def open(self, row: int, request: Request, drawn: Sequence[int] = ()) -> None:
        """A request takes a row of the block tables.

        Args:
            drawn: tokens that an earlier stay has drawn.
        """
        self.sampler.open(row, request, drawn)
        self.exits.open(row, request.params, len(request.prompt))
        self.reached[row] = 0

    def places(self, rows: Rows) -> np.ndarray:
        """int32 [n] place of each row among the tokens of its request that ran its loop."""
        req, loop, pos = rows.req.numpy(), rows.loop.numpy(), rows.pos.numpy()
        current = rows.kind.numpy() == CURRENT
        places = np.where(current, self.reached[req, loop], pos).astype(np.int32)
        np.maximum.at(self.reached, (req, loop), places + 1)
        return places

    def summed(self, y: Tensor) -> Tensor:
        """y [n, D] of this process, which has all of it."""
        return y

    def close(self, row: int) -> None:
        """The request leaves its row. Nothing of it is read any more."""

    @torch.inference_mode()
    def embed(self, slots: Tensor, ids: Tensor, positions: Tensor) -> None:
        """Tokens `ids` [n] begin in `slots` [n] of the bank, int32 on the host."""
        at, host = slots.long(), slots.numpy()
        states = self.weights.embedding[ids.long()] * self.weights.embedding_scale
        self.bank[at] = states.to(self.bank.dtype)
        self.readout.changed(host)
        self.exits.enter(at)

    @torch.inference_mode()
    def block(self, rows: Rows) -> Tensor | None:
        """Runs every row's loop: writes its keys and values, moves its state on.

        Returns:
            bool [n] on the host, rows whose exit test passed; None where no row is tested.
        """
        step = _Step(self, rows)
        step.run()
        self.readout.changed(rows.slot.numpy())
        return step.signals()

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
            self._skip(slots[at], requests[at], positions[at], loops[at] - 1, tables)
        return self.sampler.draw(slots.long(), requests.long(), positions.long(), early)

    @torch.inference_mode()
    def score(
        self, slots: Tensor, requests: Tensor, positions: Tensor, ids: Tensor, top: int
    ) -> Sampled:
        """Log-probabilities of the given tokens `ids` [n] behind `positions`, after all loops."""
        early = torch.zeros(len(slots), dtype=torch.bool)
        where = (slots.long(), requests.long(), positions.long())
        return self.sampler.score(*where, ids, early, top)

    def _skip(
        self, slots: Tensor, requests: Tensor, positions: Tensor, last: Tensor, tables: Tensor
    ) -> None:
        """Keys and values of the loops after `last` [n], from 0, of tokens that leave."""
        where = (self.kv_pool, *(x.to(self.kv_pool.device) for x in (tables, requests, positions)))
        last = last.to(self.kv_pool.device)
        if self.policy != "propagate":
            kv_copy(*where, last, self.depths.rows, impl=self.impl)
            return
        h = self.bank[slots.long()].to(self.kv_pool.dtype)
        model = self.weights
        kv_propagate(
            h,
            [
                DeeperLayer(
                    layer.attention_norm, *layer.qkv[1:], places, layer.rope_of, layer.k_norm
                )
                for layers, depths in (
                    (model.block, self.depths.block),
                    (model.coda, self.depths.coda),
                )
                for layer, places in zip(layers, depths, strict=True)
            ],
            *where,
            last,
            rope=self.rope,
            eps=model.eps,
            plus_one=model.plus_one,
            impl=self.impl,
        )


class _Step:
    """One run of the block."""

    def __init__(self, runner: ModelRunner, rows: Rows) -> None:
        self.runner, self.rows = runner, rows
        device = runner.bank.device
        self.slot, self.pos, self.req, self.loop, self.seg, self.tables = (
            x.to(device)
            for x in (rows.slot, rows.pos, rows.req, rows.loop, rows.seg_offsets, rows.block_tables)
        )
        self.place = self.pos  # of keys and values in the pages
        if runner.policy == "active_only":
            self.place = torch.from_numpy(runner.places(rows)).to(device)
        self.tested = runner.exits.tested(rows.kind.numpy() == CURRENT, rows.req, rows.loop)
        self.before: Tensor | None = None

    def run(self) -> None:
        runner, (segments, loops) = self.runner, (self.rows.seg_offsets.tolist(), self.runner.loops)
        model, depths = runner.weights, runner.depths
        everything = slice(0, len(self.slot))
        last = slice(segments[loops - 1], segments[loops])
        self._keep_before(by_layer=False)
        self._layers(model.prelude, depths.prelude, slice(0, segments[1]), None)
        self._layers(model.block[:-1], depths.block[:-1], everything, self.seg)
        self._keep_before(by_layer=True)
        self._layers(model.block[-1:], depths.block[-1:], everything, self.seg)
        self._layers(model.coda, depths.coda, last, None)

    def signals(self) -> Tensor | None:
        """bool [n] on the host, or None."""
        if len(self.tested) == 0:
            return None
        rows, at = self.rows, torch.from_numpy(self.tested)
        passed = self.runner.exits.signals(
            rows.slot[at].long(), rows.req[at].long(), rows.pos[at].long(), rows.loop[at],
            self.before,
        )  # fmt: skip
        out = torch.zeros(len(rows.slot), dtype=torch.bool)
        out[at] = passed.cpu()
        return out

    def _keep_before(self, *, by_layer: bool) -> None:
        exits = self.runner.exits
        if len(self.tested) and exits.wants_before and exits.by_layer == by_layer:
            self.before = self.runner.bank[self.rows.slot[torch.from_numpy(self.tested)].long()]

    def _layers(
        self, layers: Sequence[Layer], depths: Sequence[Tensor], at: slice, seg: Tensor | None
    ) -> None:
        """Runs layers one after the other for the rows `at`."""
        if not layers or at.start == at.stop:
            return
        runner, slot = self.runner, self.slot[at]
        norms = {"eps": runner.weights.eps, "plus_one": runner.weights.plus_one}
        shared = {**norms, "impl": runner.impl}
        x = gather_rms_norm(runner.bank, slot, layers[0].attention_norm, **shared)
        following = [layer.attention_norm for layer in layers[1:]]
        for layer, places, after in zip(layers, depths, [*following, None], strict=True):
            y = self._attention(layer, places, x, at, seg)
            x = scatter_rms_norm(
                runner.bank, slot, y, layer.attention_out_norm, next_weight=layer.mlp_norm, **shared
            )
            activation = runner.weights.activation
            x = seg_depth_gated(x, *layer.gate_up, seg, activation=activation, impl=runner.impl)
            y = runner.summed(seg_depth_lora(x, (layer.down,), seg, impl=runner.impl)[0])
            x = scatter_rms_norm(
                runner.bank, slot, y, layer.mlp_out_norm, next_weight=after, **shared
            )

    def _attention(
        self, layer: Layer, places: Tensor, x: Tensor, at: slice, seg: Tensor | None
    ) -> Tensor:
        runner, model = self.runner, self.runner.weights
        q, k, v = (
            y.unflatten(1, (-1, model.head_dim))
            for y in seg_depth_lora(x, layer.qkv, seg, impl=runner.impl)
        )
        turn = {"rope": runner.rope, "q_norm": layer.q_norm, "k_norm": layer.k_norm}
        if runner.policy == "active_only":  # pages count the tokens of a loop, angles count all
            q, k = (
                self._turned(z, norm, layer, at)
                for z, norm in ((q, layer.q_norm), (k, layer.k_norm))
            )
            turn = {}
        where = (
            runner.kv_pool, self.tables, self.req[at], self.place[at], self.loop[at], places
        )  # fmt: skip
        q = rope_kv_write(
            q, k, v, *where, rope_of=layer.rope_of if turn else None,
            eps=model.eps, plus_one=model.plus_one, impl=runner.impl, **turn,
        )  # fmt: skip
        out = paged_attn_mixed_depth(
            q, *where, window=layer.window, scale=model.scale, softcap=model.attention_softcap,
            impl=runner.impl,
        )  # fmt: skip
        return runner.summed(seg_depth_lora(out.flatten(1), (layer.out,), seg, impl=runner.impl)[0])

    def _turned(self, x: Tensor, norm: Tensor | None, layer: Layer, at: slice) -> Tensor:
        """x [n, heads, hd] normed and rotated by the rows' own positions."""
        model, wide = self.runner.weights, self.runner.rope.dtype
        z = x.to(wide)
        if norm is not None:
            z = rms_norm(z, norm.to(wide), model.eps, model.plus_one)
        setting = layer.rope_of[self.loop[at].long()].long()
        table = self.runner.rope[setting, self.pos[at].long()]  # [n, 2, H]
        return rotate(z, table.transpose(0, 1).unsqueeze(2)).to(x.dtype)
