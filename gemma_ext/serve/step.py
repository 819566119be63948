"""One run of the block for rows that stand at different loops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gemma_ext.ops.depth_batching import paged_attn_mixed_depth, rope_kv_write
from gemma_ext.ops.depth_batching.linear import seg_depth_gated, seg_depth_lora
from gemma_ext.ops.depth_batching.norm import gather_rms_norm, scatter_rms_norm
from gemma_ext.reference.depth_batching import rms_norm, rotate
from gemma_ext.serve.weights import Layer

if TYPE_CHECKING:
    from gemma_ext.serve.runner import ModelRunner

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


class Part(NamedTuple):
    """Some rows of a step, on the device of the model.

    Attributes:
        slot, pos, req, loop: int32 [n], as in `Rows`.
        place: int32 [n], where keys and values of the row lie among those of its request.
        seg: int32 [B + 1], where each loop begins.
    """

    slot: Tensor
    pos: Tensor
    req: Tensor
    loop: Tensor
    place: Tensor
    seg: Tensor


class Step:
    """One run of the block.

    Args:
        part: all rows of it.
        tables: the block tables, on the device.
        watched: int64 slots whose states the exit test compares with later ones, or None.

    Attributes:
        before: the states of `watched` [m, D] before the block, or before its last layer.
    """

    def __init__(
        self, runner: ModelRunner, part: Part, tables: Tensor, watched: Tensor | None = None
    ) -> None:
        self.runner, self.all, self.tables, self.watched = runner, part, tables, watched
        self.before: Tensor | None = None

    def run(self, segments: Sequence[int] = (), quiet: np.ndarray | None = None) -> None:
        """Runs every row's loop.

        Args:
            segments: bounds of the loops, so that layers in front of and behind the loops run the
                rows of one loop alone; without them they run all rows, of which the others are
                none, from fixed shapes.
            quiet: bool [n], rows whose last layer this is and whose state behind it nobody reads,
                so that only its keys and values are computed.
        """
        model, depths = self.runner.weights, self.runner.depths
        self._watch(by_layer=False)
        if model.prelude:
            self._layers(model.prelude, depths.prelude, self._of_loop(0, segments))
        self._layers(model.block[:-1], depths.block[:-1], self.all)
        self._watch(by_layer=True)
        if not model.coda:
            self._last(model.block[-1], depths.block[-1], self.all, quiet)
            return
        self._layers(model.block[-1:], depths.block[-1:], self.all)
        behind = self._of_loop(self.runner.loops - 1, segments)
        self._layers(model.coda[:-1], depths.coda[:-1], behind)
        quiet = None if quiet is None else quiet[segments[-2] :]
        self._last(model.coda[-1], depths.coda[-1], behind, quiet)

    def _watch(self, *, by_layer: bool) -> None:
        if self.watched is not None and self.runner.exits.by_layer == by_layer:
            self.before = self.runner.bank[self.watched]

    def _of_loop(self, loop: int, segments: Sequence[int]) -> Part:
        """Rows of one loop, for layers that only this loop runs."""
        slot, pos, req, own, place, _ = self.all
        if segments:
            some = slice(*segments[loop : loop + 2])
            slot, pos, req, own, place = (x[some] for x in (slot, pos, req, own, place))
        else:
            slot, req = (torch.where(own == loop, x, -1) for x in (slot, req))
        bounds = torch.arange(self.runner.loops + 1, device=slot.device)
        return Part(slot, pos, req, own, place, (bounds > loop).int() * len(slot))

    def _some(self, part: Part, chosen: np.ndarray) -> Part:
        """The rows of `part` at `chosen` bool [n]."""
        at = torch.from_numpy(np.flatnonzero(chosen)).to(part.slot.device)
        ends = np.append(0, np.cumsum(chosen))[part.seg.cpu().numpy()]
        seg = torch.from_numpy(ends.astype(np.int32)).to(part.seg.device)
        return Part(*(column[at] for column in part[:-1]), seg)

    def _last(self, layer: Layer, places: Tensor, part: Part, quiet: np.ndarray | None) -> None:
        """The last layer; of quiet rows only its keys and values."""
        if quiet is not None and quiet.any():
            silent, part = self._some(part, quiet), self._some(part, ~quiet)
            self._write(layer, places, self._normed(layer, silent), silent, queries=False)
        self._layers((layer,), (places,), part)

    def _layers(self, layers: Sequence[Layer], depths: Sequence[Tensor], part: Part) -> None:
        """Runs layers one after the other."""
        if not layers or len(part.slot) == 0:
            return
        runner, slot, seg = self.runner, part.slot, part.seg
        model, impl = runner.weights, runner.impl
        shared = {"eps": model.eps, "plus_one": model.plus_one, "impl": impl}
        x = self._normed(layers[0], part)
        following = [layer.attention_norm for layer in layers[1:]]
        for layer, places, after in zip(layers, depths, [*following, None], strict=True):
            y = self._attention(layer, places, x, part)
            x = scatter_rms_norm(
                runner.bank, slot, y, layer.attention_out_norm, next_weight=layer.mlp_norm, **shared
            )
            x = seg_depth_gated(x, *layer.gate_up, seg, activation=model.activation, impl=impl)
            y = runner.summed(seg_depth_lora(x, (layer.down,), seg, impl=impl)[0])
            x = scatter_rms_norm(
                runner.bank, slot, y, layer.mlp_out_norm, next_weight=after, **shared
            )

    def _normed(self, layer: Layer, part: Part) -> Tensor:
        model, bank = self.runner.weights, self.runner.bank
        shared = {"eps": model.eps, "plus_one": model.plus_one, "impl": self.runner.impl}
        return gather_rms_norm(bank, part.slot, layer.attention_norm, **shared)

    def _attention(self, layer: Layer, places: Tensor, x: Tensor, part: Part) -> Tensor:
        runner, model = self.runner, self.runner.weights
        q = self._write(layer, places, x, part)
        out = paged_attn_mixed_depth(
            q, *self._where(places, part), window=layer.window, scale=model.scale,
            softcap=model.attention_softcap, sinks=model.prefix, impl=runner.impl,
        )  # fmt: skip
        y = seg_depth_lora(out.flatten(1), (layer.out,), part.seg, impl=runner.impl)[0]
        return runner.summed(y)

    def _write(
        self, layer: Layer, places: Tensor, x: Tensor, part: Part, *, queries: bool = True
    ) -> Tensor:
        """Keys and values of normed rows x into pages; the queries [n, heads, hd], or none."""
        runner, model = self.runner, self.runner.weights
        chosen = layer.qkv if queries else layer.qkv[1:]
        made = [
            y.unflatten(1, (-1, model.head_dim))
            for y in seg_depth_lora(x, chosen, part.seg, impl=runner.impl)
        ]
        k, v = made[-2:]
        q = made[0] if queries else k[:, :0]
        turn = {"rope": runner.rope, "q_norm": layer.q_norm, "k_norm": layer.k_norm}
        if runner.policy == "active_only":  # pages count the tokens of a loop, angles all tokens
            q = self._turned(q, layer.q_norm, layer, part)
            k, turn = self._turned(k, layer.k_norm, layer, part), {}
        return rope_kv_write(
            q, k, v, *self._where(places, part), rope_of=layer.rope_of if turn else None,
            eps=model.eps, plus_one=model.plus_one, impl=runner.impl, **turn,
        )  # fmt: skip

    def _where(self, places: Tensor, part: Part) -> tuple[Tensor, ...]:
        return self.runner.kv_pool, self.tables, part.req, part.place, part.loop, places

    def _turned(self, x: Tensor, norm: Tensor | None, layer: Layer, part: Part) -> Tensor:
        """x [n, heads, hd] normed and rotated by the rows' own positions."""
        model, wide = self.runner.weights, self.runner.rope.dtype
        z = x.to(wide)
        if norm is not None:
            z = rms_norm(z, norm.to(wide), model.eps, model.plus_one)
        setting = layer.rope_of[part.loop.long()].long()
        table = self.runner.rope[setting, part.pos.long() + model.prefix]  # [n, 2, H]
        return rotate(z, table.transpose(0, 1).unsqueeze(2)).to(x.dtype)
