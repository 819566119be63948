"""One model over several processes: heads, MLP and vocabulary sharded, one scheduler.

| tensor | a rank has |
|---|---|
| q, k, v, gate, up; their lora_b | its rows; whole heads, those of k and v twice if too few |
| out, down; their lora_a | its columns; partial sums are added over the ranks |
| the other factor of each LoRA, norms, embedding | all of it |
| head | its rows of the vocabulary |

The columns of `lora_a` need no exchange of their own: (x_r A_r^T) B^T is linear, so it is summed
with x_r W_r^T. Statistics of the head are gathered and merged in the order of the ranks, so that
every rank holds the same bits of them.

Rank 0 has the engine. What it asks of its runner is broadcast, and the others do the same; exits
and tokens are those of rank 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gemma_ext.distributed import vocab_shard_range
from gemma_ext.ops.depth_batching.head import HeadExit, gumbel
from gemma_ext.ops.depth_batching.linear import Projection
from gemma_ext.serve.protocol import Request
from gemma_ext.serve.readout import Head
from gemma_ext.serve.runner import ModelRunner, Rows, Sizes
from gemma_ext.serve.sampling import Sampled
from gemma_ext.serve.weights import Layer, Weights


def shard_weights(weights: Weights, rank: int, ranks: int) -> Weights:
    """What one of `ranks` processes holds of a model.

    Raises:
        ValueError: heads or widths that do not split evenly; a vocabulary of fewer tokens.
    """
    for name, count in (
        ("heads", weights.heads),
        ("MLP width", weights.block[0].down.weight.shape[1]),
    ):
        if count % ranks:
            raise ValueError(f"ranks: expected a divisor of the {count} {name}, got {ranks}")
    if weights.kv_heads % ranks and ranks % weights.kv_heads:
        raise ValueError(
            f"ranks: expected a divisor or a multiple of the {weights.kv_heads} heads of keys, "
            f"got {ranks}"
        )
    start, stop = vocab_shard_range(weights.vocabulary, rank, ranks)
    if start == stop:
        raise ValueError(f"ranks: expected at most one a token of the vocabulary, got {ranks}")
    split = _Split(weights, rank, ranks)
    early = weights.exit_head
    return dataclasses.replace(
        weights,
        prelude=tuple(map(split.layer, weights.prelude)),
        block=tuple(map(split.layer, weights.block)),
        coda=tuple(map(split.layer, weights.coda)),
        head=weights.head[start:stop],
        exit_head=early and (early[0], early[1][start:stop].contiguous()),
        heads=weights.heads // ranks,
        kv_heads=max(weights.kv_heads // ranks, 1),
    )


class _Split:
    def __init__(self, weights: Weights, rank: int, ranks: int) -> None:
        self.rank, self.ranks = rank, ranks
        self.width, self.kv_heads = weights.head_dim, weights.kv_heads

    def part(self, count: int) -> slice:
        size = count // self.ranks
        return slice(self.rank * size, (self.rank + 1) * size)

    def kv_rows(self) -> slice:
        if self.kv_heads % self.ranks == 0:
            return self.part(self.kv_heads * self.width)
        head = self.rank * self.kv_heads // self.ranks
        return slice(head * self.width, (head + 1) * self.width)

    def rows(self, p: Projection, at: slice | None = None) -> Projection:
        at = self.part(p.weight.shape[0]) if at is None else at
        return Projection(
            p.weight[at].contiguous(),
            None if p.bias is None else p.bias[at].contiguous(),
            p.lora_a,
            None if p.lora_b is None else p.lora_b[:, at].contiguous(),
        )

    def columns(self, p: Projection) -> Projection:
        at = self.part(p.weight.shape[1])
        return Projection(
            p.weight[:, at].contiguous(),
            p.bias if self.rank == 0 else None,
            None if p.lora_a is None else p.lora_a[:, :, at].contiguous(),
            p.lora_b,
        )

    def layer(self, layer: Layer) -> Layer:
        q, k, v = layer.qkv
        return dataclasses.replace(
            layer,
            qkv=(self.rows(q), self.rows(k, self.kv_rows()), self.rows(v, self.kv_rows())),
            out=self.columns(layer.out),
            gate_up=tuple(map(self.rows, layer.gate_up)),
            down=self.columns(layer.down),
        )


class ShardedHead(Head):
    """The head of a vocabulary that is spread over the ranks of a group.

    Args:
        weights: this rank's.
        group: the ranks.
    """

    def __init__(self, weights: Weights, group: dist.ProcessGroup, impl: str = "auto") -> None:
        super().__init__(weights, impl)
        self.group, self.ranks = group, dist.get_world_size(group)
        spans = [vocab_shard_range(self.vocabulary, r, self.ranks) for r in range(self.ranks)]
        self.starts = torch.tensor([start for start, _ in spans], device=weights.device)
        self.start, self.largest = spans[dist.get_rank(group)][0], spans[0][1]

    def rows(
        self,
        bank: Tensor,
        slots: Tensor,
        temperature: Tensor | None,
        keys: Tensor | None,
        candidates: int,
        early: bool,
    ) -> HeadExit:
        local = super().rows(bank, slots, temperature, keys, candidates, early)
        lse = self.gathered(local.lse)  # [R, n]
        total = lse.logsumexp(0)
        share = (lse - total).exp()
        mean = (share * (lse - self.gathered(local.entropy))).sum(0)
        tops = self.gathered(local.top)
        best = tops[:, :, 0].argmax(0)
        ids = self._global(self.gathered(local.ids)).gather(0, best.unsqueeze(0)).squeeze(0)
        top = tops.permute(1, 0, 2).flatten(1).sort(-1, descending=True).values[:, :2]
        values = indices = samples = tempered = None
        if candidates:
            values, indices = self._candidates(local, min(candidates, self.vocabulary))
        if temperature is not None:
            tempered = self.gathered(local.tempered).logsumexp(0)
            samples = ids.int()
            if bool((temperature > 0).any()):
                drawn = self._samples(bank, slots, temperature, keys, early)
                samples = torch.where(temperature > 0, drawn, samples)
        return HeadExit(
            ids.int(), top, total, total - mean, None, samples, tempered, values, indices
        )

    def logits(self, bank: Tensor, slots: Tensor, early: bool) -> Tensor:
        local = super().logits(bank, slots, early)
        padded = local.new_zeros(len(slots), self.largest)
        padded[:, : local.shape[1]] = local
        parts = self.gathered(padded)
        return parts.permute(1, 0, 2).flatten(1)[:, : self.vocabulary]

    def logits_at(self, bank: Tensor, slots: Tensor, ids: Tensor, early: bool) -> Tensor:
        count = self.weights.head.shape[0]
        own = ids - self.start
        local = super().logits_at(bank, slots, own.clamp(0, count - 1), early)
        return self.gathered(torch.where((own >= 0) & (own < count), local, 0)).sum(0)

    def _divergence_sum(self, *given: Any) -> Tensor:
        return self.gathered(super()._divergence_sum(*given)).sum(0)

    def gathered(self, x: Tensor) -> Tensor:
        """[R, ...] of every rank, in their order."""
        out = x.new_empty(self.ranks, *x.shape)
        dist.all_gather(list(out.unbind(0)), x.contiguous(), group=self.group)
        return out

    def _global(self, ids: Tensor) -> Tensor:
        """[R, n, ...] ids of the shards as ids of the vocabulary."""
        return ids + self.starts.view(-1, *[1] * (ids.dim() - 1))

    def _candidates(self, local: HeadExit, count: int) -> tuple[Tensor, Tensor]:
        """The largest of all ranks, [n, C] each; the lowest id first of equal ones."""
        n, most = local.values.shape[0], min(count, self.largest)
        values = local.values.new_full((n, most), -torch.inf)
        values[:, : local.values.shape[1]] = local.values
        ids = local.indices.new_full((n, most), self.vocabulary)
        ids[:, : local.indices.shape[1]] = local.indices
        values = self.gathered(values).permute(1, 0, 2).flatten(1)
        ids = self._global(self.gathered(ids)).permute(1, 0, 2).flatten(1)
        order = values.sort(dim=-1, descending=True, stable=True)
        found = ids.gather(1, order.indices)
        return order.values[:, :count].contiguous(), found[:, :count].int()

    def _samples(
        self, bank: Tensor, slots: Tensor, temperature: Tensor, keys: Tensor, early: bool
    ) -> Tensor:
        """Draws with the noise that each token has in the whole vocabulary, a tile at a time."""
        heat = torch.where(temperature > 0, temperature, 1).unsqueeze(-1)
        best = torch.full_like(temperature, -torch.inf)
        chosen = torch.zeros(len(slots), dtype=torch.int32, device=bank.device)
        x, weight = self._normed(bank, slots, early)
        for first, z in self._tiles(x, weight):
            ids = torch.arange(
                self.start + first, self.start + first + z.shape[1], device=z.device
            ).int()
            score = z / heat + gumbel(ids.expand(len(slots), -1).contiguous(), keys, impl=self.impl)
            value, at = score.max(-1)
            chosen = torch.where(value > best, ids[at], chosen)
            best = torch.maximum(best, value)
        rank = self.gathered(best).argmax(0)
        return self.gathered(chosen).gather(0, rank.unsqueeze(0)).squeeze(0)


class ShardedRunner(ModelRunner):
    """The runner of one rank.

    Args:
        weights: this rank's.
        group: the ranks.
        options: of `ModelRunner`.
    """

    def __init__(
        self, weights: Weights, sizes: Sizes, group: dist.ProcessGroup, **options: Any
    ) -> None:
        impl = "reference" if weights.dtype == torch.float64 else options.get("impl", "auto")
        head = ShardedHead(weights, group, impl)
        super().__init__(weights, sizes, head=head, graphs=False, **options)
        self.group = group

    def summed(self, y: Tensor) -> Tensor:
        dist.all_reduce(y, group=self.group)
        return y


class Leader:
    """The runner of rank 0, whose every call the other ranks repeat.

    Args:
        runner: of rank 0.
        control: a gloo group of the ranks, for what is asked.
    """

    def __init__(self, runner: ShardedRunner, control: dist.ProcessGroup) -> None:
        self.runner, self.control = runner, control

    def __getattr__(self, name: str) -> Any:
        return getattr(self.runner, name)

    def open(self, row: int, request: Request, drawn: Sequence[int] = ()) -> None:
        self._ask("open", row, request, tuple(drawn))

    def close(self, row: int) -> None:
        self._ask("close", row)

    def write_prefix(self, requests: Tensor, tables: Tensor) -> None:
        self._ask("write_prefix", requests, tables)

    def embed(self, slots: Tensor, ids: Tensor, positions: Tensor) -> None:
        self._ask("embed", slots, ids, positions)

    def block(self, rows: Rows) -> Tensor | None:
        return self._ask("block", rows)

    def coda(self, *given: Tensor) -> Sampled:
        return self._ask("coda", *given)

    def score(self, *given: Any) -> Sampled:
        return self._ask("score", *given)

    def stop(self) -> None:
        """Lets the other ranks go."""
        self._tell(None)

    def _ask(self, name: str, *given: Any) -> Any:
        self._tell((name, given))
        return getattr(self.runner, name)(*given)

    def _tell(self, message: Sequence[Any] | None) -> None:
        source = dist.get_global_rank(self.control, 0)
        dist.broadcast_object_list([message], source, group=self.control)


def follow(runner: ShardedRunner, control: dist.ProcessGroup) -> None:
    """Repeats what the leader asks until it lets go; what fails on rank 0 fails here too."""
    source = dist.get_global_rank(control, 0)
    while True:
        box: list[Any] = [None]
        dist.broadcast_object_list(box, source, group=control)
        if box[0] is None:
            return
        name, given = box[0]
        try:
            getattr(runner, name)(*given)
        except Exception:
            if name != "open":  # the engine ends the one request that cannot begin
                raise
