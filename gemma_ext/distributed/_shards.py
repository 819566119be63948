"""Which columns of a vocabulary each rank of a group holds, and the ranks' agreement on it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from gemma_ext.distributed._merge import gather_ranks


@dataclass(frozen=True)
class VocabShard:
    """Columns [start, stop) of a vocabulary of `vocab_size`, held by this rank of `group`."""

    start: int
    stop: int
    vocab_size: int
    group: dist.ProcessGroup


def vocab_shard_range(vocab_size: int, rank: int, world_size: int) -> tuple[int, int]:
    """Columns [start, stop) of `rank` under torch's chunking, that of a `DTensor` with `Shard(0)`.

    Every shard has `ceil(vocab_size / world_size)` columns except the last ones, which may have
    fewer or none.

    Example:
        >>> [vocab_shard_range(10, rank, 4) for rank in range(4)]
        [(0, 3), (3, 6), (6, 9), (9, 10)]
    """
    rows = -(-vocab_size // world_size)
    start = min(rank * rows, vocab_size)
    return start, min(start + rows, vocab_size)


def gather_head(c: Tensor) -> Tensor:
    """Whole classifier [V, D] of an FSDP2-sharded parameter, for a loss outside the forward.

    The gradient goes back to the shards averaged over the ranks, as FSDP2 does for the parameters
    that its hooks gather. Inside the forward of a `fully_shard`-ed module the parameter is whole
    already and this is not needed. Costs one all-gather of V * D elements and their memory until
    the backward; a plain tensor is returned as it is.
    """
    if not isinstance(c, DTensor):
        return c
    if c.device_mesh.ndim != 1:
        raise ValueError(
            f"expected c on a one-dimensional device mesh, got {c.device_mesh.ndim} dimensions"
        )
    return c.full_tensor(grad_placements=[Partial("avg")])


def local_head(c: Tensor) -> tuple[Tensor, dist.ProcessGroup | None, int | None]:
    """(this rank's rows of c, its group, V); the last two are None for a plain tensor."""
    if not isinstance(c, DTensor):
        return c, None, None
    _expect_mesh_1d("c_local", c)
    if type(c.placements[0]) is not Shard or c.placements[0].dim != 0:
        raise ValueError(f"expected c_local with placement Shard(0), got {c.placements[0]}")
    return c.to_local(), c.device_mesh.get_group(), c.shape[0]


def local_bias(bias: Tensor | None) -> Tensor | None:
    """This rank's entries of a bias that is sharded like the head."""
    if not isinstance(bias, DTensor):
        return bias
    _expect_mesh_1d("bias", bias)
    if type(bias.placements[0]) is not Shard:
        raise ValueError(f"expected bias with placement Shard(0), got {bias.placements[0]}")
    return bias.to_local()


def local_replica(name: str, tensor: Tensor | None) -> Tensor | None:
    """The local tensor of an argument that every rank holds whole."""
    if not isinstance(tensor, DTensor):
        return tensor
    _expect_mesh_1d(name, tensor)
    if tensor.placements[0] != Replicate():
        raise ValueError(
            f"expected {name} with placement Replicate(), got {tensor.placements[0]}: "
            f"call {name}.redistribute(placements=[Replicate()]) first"
        )
    return tensor.to_local()


def resolve_group(
    group: dist.ProcessGroup | None, head_group: dist.ProcessGroup | None
) -> dist.ProcessGroup:
    """The group asked for, else the head's own, else the default one."""
    if not dist.is_initialized():
        raise RuntimeError(
            "vocabulary-parallel losses need torch.distributed: call "
            "torch.distributed.init_process_group first, or use gemma_ext.linear_cross_entropy "
            "in one process"
        )
    if head_group is None:
        return dist.group.WORLD if group is None else group
    if group is not None:
        asked, held = map(dist.get_process_group_ranks, (group, head_group))
        if asked != held:
            raise ValueError(f"expected group to have the ranks {held} of c_local, got {asked}")
    return head_group


def resolve_shard(
    rows: int,
    targets: Tensor,
    group: dist.ProcessGroup,
    vocab_start: int | None,
    vocab_size: int | None,
    validate: bool,
) -> VocabShard:
    """Find this rank's columns, and with `validate` make sure that all ranks mean the same problem.

    The agreement is one all-gather of five integers. It turns what would be a wrong number or a
    rank waiting for ever into the same ValueError on every rank.
    """
    if not validate:
        if vocab_start is None or vocab_size is None:
            raise ValueError("expected vocab_start and vocab_size with validate=False, got None")
        return VocabShard(vocab_start, vocab_start + rows, vocab_size, group)

    unknown = -1
    claim = [
        rows,
        targets.numel(),
        unknown if vocab_start is None else vocab_start,
        unknown if vocab_size is None else vocab_size,
    ]
    mine = torch.cat([torch.tensor(claim, device=targets.device), _checksum(targets).reshape(1)])
    ranks = gather_ranks(mine, group).tolist()

    tokens = [rank[1] for rank in ranks]
    if len(set(tokens)) > 1 or len({rank[4] for rank in ranks}) > 1:
        raise ValueError(
            "expected the same targets on every rank of a vocabulary-parallel head, got different "
            f"ones (token counts {tokens}): for a head sharded by FSDP over data-parallel ranks "
            "call gemma_ext.linear_cross_entropy inside the wrapped forward or on "
            "gemma_ext.distributed.gather_head(c)"
        )
    starts, total = [], 0
    for rank in ranks:
        starts.append(total)
        total += rank[0]
    if any(rank[2] not in (unknown, start) for rank, start in zip(ranks, starts, strict=True)):
        got = [rank[2] for rank in ranks]
        raise ValueError(f"expected vocab_start {starts} by rank, got {got}")
    if any(rank[3] not in (unknown, total) for rank in ranks):
        raise ValueError(
            f"expected vocab_size {total}, the sum of the shards, got {[rank[3] for rank in ranks]}"
        )
    start = starts[dist.get_rank(group)]
    return VocabShard(start, start + rows, total, group)


def _expect_mesh_1d(name: str, tensor: DTensor) -> None:
    if tensor.device_mesh.ndim != 1:
        raise ValueError(
            f"expected {name} on a one-dimensional device mesh, got {tensor.device_mesh.ndim} "
            f"dimensions: pass {name}.to_local() and the tensor-parallel group"
        )


def _checksum(targets: Tensor) -> Tensor:
    """Order-sensitive 0-d int64 sum of the labels; wraps around."""
    flat = targets.reshape(-1).to(torch.int64)
    place = torch.arange(1, flat.numel() + 1, device=flat.device) * 2654435761  # Knuth's hash
    return ((flat + 1) * place).sum()
