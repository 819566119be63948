"""One head problem solved by one process and by a vocabulary spread over all ranks."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

import gemma_ext
from gemma_ext.distributed import vocab_parallel_linear_cross_entropy, vocab_shard_range


@dataclass
class Problem:
    """The same tensors on every rank; `bounds` are the first columns of the shards, and V."""

    vocab: int = 37
    shape: tuple[int, ...] = (3, 7)
    width: int = 8
    dtype: torch.dtype = torch.float64
    scale: float = 2.0
    bias: bool = False
    ignored: float = 0.25
    poison: bool = False
    bounds: list[int] | None = None
    seed: int = 0
    e: Tensor = field(init=False)
    c: Tensor = field(init=False)
    b: Tensor | None = field(init=False)
    targets: Tensor = field(init=False)

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(self.seed)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=g, dtype=torch.float64).to(self.dtype)

        self.e = self.scale * normal(*self.shape, self.width)
        self.c = normal(self.vocab, self.width)
        self.b = normal(self.vocab) if self.bias else None
        self.targets = torch.randint(self.vocab, self.shape, generator=g)
        hidden = torch.rand(self.shape, generator=g) < self.ignored
        self.targets[hidden] = -100
        if self.poison:
            self.e[hidden] = torch.nan
        if self.bounds is None:
            world = dist.get_world_size()
            starts = [vocab_shard_range(self.vocab, rank, world)[0] for rank in range(world)]
            self.bounds = [*starts, self.vocab]

    def mine(self, tensor: Tensor) -> Tensor:
        rank = dist.get_rank()
        return tensor[self.bounds[rank] : self.bounds[rank + 1]]


@dataclass
class Solution:
    """Outputs and gradients; the gradients of c and the bias are those of the given rows."""

    outputs: list[Tensor]
    de: Tensor | None
    dc: Tensor | None
    db: Tensor | None


def solve(function, e: Tensor, c: Tensor, b: Tensor | None, targets: Tensor, **options) -> Solution:
    """Run `function` and send a fixed upstream through every differentiable output."""
    e = e.detach().clone().requires_grad_()
    c = c.detach().clone().requires_grad_()
    b = None if b is None else b.detach().clone().requires_grad_()
    result = function(e, c, targets, bias=b, **options)
    outputs = [result] if isinstance(result, Tensor) else [x for x in result if x is not None]
    objective = 0.0
    for k, output in enumerate(outputs):
        if output.requires_grad:
            wave = torch.arange(output.numel(), dtype=torch.float64).cos().reshape(output.shape)
            objective = objective + (output * (0.37 + k + wave)).sum()
    objective.backward()
    return Solution([x.detach() for x in outputs], e.grad, c.grad, None if b is None else b.grad)


def assert_equal_to_one_process(problem: Problem, rtol: float, atol: float, **options) -> Solution:
    """Outputs and gradients of the shards against those of `gemma_ext.linear_cross_entropy`."""
    one = solve(
        gemma_ext.linear_cross_entropy, problem.e, problem.c, problem.b, problem.targets, **options
    )
    shard_b = None if problem.b is None else problem.mine(problem.b)
    many = solve(
        vocab_parallel_linear_cross_entropy,
        problem.e,
        problem.mine(problem.c),
        shard_b,
        problem.targets,
        **options,
    )
    close = partial(torch.testing.assert_close, rtol=rtol, atol=atol)
    assert len(many.outputs) == len(one.outputs)
    for ours, theirs in zip(many.outputs, one.outputs, strict=True):
        close(ours, theirs)
    close(many.de, one.de)
    close(many.dc, problem.mine(one.dc))
    if problem.b is not None:
        close(many.db, problem.mine(one.db))
    return many


def assert_same_bits_on_every_rank(tensor: Tensor) -> None:
    copies = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(copies, tensor.contiguous())
    assert all(torch.equal(copy, copies[0]) for copy in copies)
