"""What the ranks of torch.distributed hold together: numbers, weights and gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def everyone() -> dist.ProcessGroup | None:
    """The group of all ranks, None for a process alone."""
    return dist.group.WORLD if world() > 1 else None


def gathered(value: Any) -> list[Any]:
    """A plain value of every rank."""
    if world() == 1:
        return [value]
    found: list[Any] = [None] * world()
    dist.all_gather_object(found, value)
    return found


def clip_gradients(parameters: Sequence[nn.Parameter], limit: float | None) -> float:
    """The norm of the gradients, which is brought to `limit`, sharded ones beside whole ones."""
    kinds = [
        [p for p in parameters if isinstance(p, DTensor) is sharded] for sharded in (False, True)
    ]
    norms = []
    for kind in filter(None, kinds):
        norm = nn.utils.get_total_norm([p.grad for p in kind if p.grad is not None])
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    total = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    if limit is not None:
        for kind in filter(None, kinds):
            nn.utils.clip_grads_with_norm_(kind, limit, total)
    return float(total)


def mean_of(values: Mapping[str, Sequence[float] | Tensor]) -> dict[str, float]:
    """Means over the ranks of all finite numbers under each name, those of some ranks included."""
    sums: dict[str, list[float]] = {}
    local = {}
    for name, some in values.items():
        numbers = torch.as_tensor(some, dtype=torch.float64).flatten()
        numbers = numbers[numbers.isfinite()]
        local[name] = (float(numbers.sum()), numbers.numel())
    for each in gathered(local):
        for name, (total, count) in each.items():
            kept = sums.setdefault(name, [0.0, 0.0])
            kept[0] += total
            kept[1] += count
    return {name: total / count if count else float("nan") for name, (total, count) in sums.items()}


def same_start(*modules: nn.Module | None) -> None:
    """What trains is on every rank as on the first; sharded parameters are parts of one already."""
    if world() == 1:
        return
    for module in filter(None, modules):
        for parameter in module.parameters():
            if parameter.requires_grad and not isinstance(parameter, DTensor):
                dist.broadcast(parameter.data, 0)


class Gradients:
    """Averages gradients over the ranks.

    Sharded parameters (FSDP2) reduce themselves; the rest is reduced here once a step, also below
    DistributedDataParallel, which would wait in each backward for the adapters of other roles.
    Losses are scaled by the world size before, so that the average is a sum.

    Args:
        modules: that hold the parameters or wrap them.
        parameters: that train.
    """

    def __init__(self, modules: Sequence[nn.Module], parameters: Sequence[nn.Parameter]) -> None:
        self.wrapped = [
            part
            for module in modules
            for part in module.modules()
            if isinstance(part, DistributedDataParallel)
        ]
        self.plain = [p for p in parameters if not isinstance(p, DTensor)]
        self.scale = float(world())

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Around a forward and its backward."""
        with ExitStack() as stack:
            for part in self.wrapped:
                stack.enter_context(part.no_sync())
            yield

    def average(self) -> None:
        if world() == 1 or not self.plain:
            return
        # what no rank has used keeps no gradient, as in a process alone: weight decay passes it by
        used = [p.grad is not None for p in self.plain]
        used = torch.tensor(used, dtype=torch.int32, device=self.plain[0].device)
        dist.all_reduce(used, dist.ReduceOp.MAX)
        some = [p for p, one in zip(self.plain, used.tolist(), strict=True) if one]
        for parameter in some:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        work = [dist.all_reduce(p.grad, async_op=True) for p in some]
        for each, parameter in zip(work, some, strict=True):
            each.wait()
            parameter.grad /= self.scale
