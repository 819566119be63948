"""Checks of the statistics of reward shapers and of ODIN's correlation; see `ranks.py`."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gemma_ext.papers.reward_shaping import Quirks, RewardShaper, Shaping
from gemma_ext.papers.reward_shaping.losses import gather_rows, odin_penalties


def stream(steps: int, world: int) -> list[list[torch.Tensor]]:
    """Rewards [step][rank], of other sizes on every rank, none on the last one at step 1."""
    generator = torch.Generator().manual_seed(0)
    return [
        [
            3 + torch.randn(0 if step == 1 and rank == world - 1 else 2 + rank + step,
                            generator=generator, dtype=torch.float64)
            for rank in range(world)
        ]
        for step in range(steps)
    ]  # fmt: skip


def check_shards_of_a_stream_are_shaped_as_the_whole(rank: int, world: int) -> None:
    for name in ("meanstd", "clip", "minmax"):
        alone = RewardShaper(Shaping.named(name, quirks=Quirks(per_rank=True)))
        shaper = RewardShaper(name)
        for parts in stream(4, world):
            whole = alone(torch.cat(parts))
            found = shaper(parts[rank])
            expected = whole.split([len(part) for part in parts])[rank]
            torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
        states = [None] * world
        torch.distributed.all_gather_object(states, shaper.state_dict())
        assert all(state == states[0] for state in states)
        seen, one = shaper.statistics(name), alone.statistics(name)
        assert (seen.count, seen.low, seen.high) == (one.count, one.low, one.high)
        assert abs(seen.mean - one.mean) < 1e-12
        assert abs(seen.std - one.std) < 1e-12


def check_ranks_may_be_left_apart(rank: int, world: int) -> None:
    shaper = RewardShaper(Shaping.named("meanstd", quirks=Quirks(per_rank=True)))
    shaper(torch.full((2,), float(rank)))
    assert shaper.statistics("meanstd").mean == rank


def check_gathered_rows_have_the_gradient_of_the_whole(rank: int, world: int) -> None:
    generator = torch.Generator().manual_seed(1)
    parts = [torch.randn(1 + r, 3, generator=generator, dtype=torch.float64) for r in range(world)]
    mine = parts[rank].clone().requires_grad_()
    rows = gather_rows(mine)
    assert torch.equal(rows.detach(), torch.cat(parts))
    rows.pow(3).sum().backward()
    torch.testing.assert_close(mine.grad, world * 3 * parts[rank] ** 2)


def check_odin_under_ddp_is_odin_on_one_rank(rank: int, world: int) -> None:
    """The length term has a gradient, that of the global batch."""
    generator = torch.Generator().manual_seed(2)
    states = torch.randn(4 * world, 5, generator=generator, dtype=torch.float64)
    tokens = torch.randint(1, 50, (4 * world,), generator=generator)
    head = nn.Linear(5, 2, bias=False).double()
    with torch.no_grad():
        head.weight.copy_(torch.randn(2, 5, generator=generator, dtype=torch.float64))

    def loss(module: nn.Module, rows: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        quality, length = module(rows).unbind(1)
        apart, overlap = odin_penalties(quality, length, lengths, head.weight)
        return apart + overlap

    ddp = DistributedDataParallel(head)
    loss(ddp, states.chunk(world)[rank], tokens.chunk(world)[rank]).backward()
    found = head.weight.grad.clone()
    weight = head.weight.detach().clone().requires_grad_()
    quality, length = (states @ weight.T).unbind(1)
    t = tokens.double()

    def rho(x: torch.Tensor) -> torch.Tensor:
        return torch.corrcoef(torch.stack([x, t]))[0, 1]

    q, w = weight
    whole = rho(quality).abs() - rho(length) + (q @ w).abs() / (q.norm() * w.norm() + 1e-6)
    whole.backward()
    torch.testing.assert_close(found, weight.grad, atol=1e-12, rtol=1e-10)
    assert found.abs().max() > 1e-3
