"""Rows at mixed loops over a pool of shuffled pages, with NaN wherever nobody has written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gemma_ext.ops.depth_batching import PAGE

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IDS = ("fp32", "bf16", "fp16")
IMPLS = ("auto", "reference")
EPS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@dataclass
class Problem:
    """Requests of `lengths` tokens whose K and V lie in a pool; rows of queries over them."""

    q: Tensor
    pool: Tensor
    tables: Tensor
    req: Tensor
    pos: Tensor
    loop: Tensor
    depth_of: Tensor

    def places(self) -> tuple[Tensor, ...]:
        return self.tables, self.req, self.pos, self.loop, self.depth_of

    def columns(self) -> Iterator[tuple[int, int, int]]:
        """(request, position, loop) of every row."""
        return zip(self.req.tolist(), self.pos.tolist(), self.loop.tolist(), strict=True)

    def rows(self, chosen: list[int] | Tensor) -> Problem:
        picked = {name: getattr(self, name)[chosen] for name in ("q", "req", "pos", "loop")}
        return replace(self, **picked)

    def to(self, device: str) -> Problem:
        return Problem(**{name: x.to(device) for name, x in vars(self).items()})

    def wide(self) -> Problem:
        return replace(self, q=self.q.double(), pool=self.pool.double())


def tables_of(lengths: list[int], spare: int, g: torch.Generator) -> tuple[Tensor, int]:
    """Pages dealt at random; entries that no token needs lead nowhere."""
    pages = [-(-length // PAGE) for length in lengths]
    total = sum(pages) + spare
    order = torch.randperm(total, generator=g).to(torch.int32)
    tables = torch.full((len(lengths), max(pages) + 1), 2**30, dtype=torch.int32)
    at = 0
    for r, count in enumerate(pages):
        tables[r, :count] = order[at : at + count]
        at += count
    return tables, total


def problem(
    lengths: list[int],
    rows: list[tuple[int, int, int]],
    *,
    heads: tuple[int, int] = (4, 2),
    width: int = 32,
    loops: int = 3,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Problem:
    """Rows are (request, position, loop); a request of -1 fills up."""
    g = torch.Generator().manual_seed(seed)
    tables, pages = tables_of(lengths, 2, g)
    depths = loops + 2
    depth_of = torch.randperm(depths, generator=g)[:loops].to(torch.int32)
    pool = torch.full((depths, pages, 2, heads[1], PAGE, width), float("nan"), dtype=dtype)
    for r, length in enumerate(lengths):
        for t in range(length):
            token = torch.randn(depths, 2, heads[1], width, generator=g).to(dtype)
            pool[:, tables[r, t // PAGE], :, :, t % PAGE] = token
    q = torch.randn(len(rows), heads[0], width, generator=g).to(dtype)
    req, pos, loop = (torch.tensor(c, dtype=torch.int32) for c in zip(*rows, strict=True))
    return Problem(q, pool, tables, req, pos, loop, depth_of)


def mixed(lengths: list[int], loops: int, count: int, seed: int = 0) -> list[tuple[int, int, int]]:
    """Random rows, some of them chunks of positions that follow each other."""
    g = torch.Generator().manual_seed(seed)

    def draw(end: int) -> int:
        return int(torch.randint(end, (), generator=g))

    rows: list[tuple[int, int, int]] = []
    while len(rows) < count:
        r = draw(len(lengths) + 1) - 1
        if r < 0:
            rows.append((-1, 0, 0))
            continue
        loop, first = draw(loops), draw(lengths[r])
        last = min(first + draw(2) * draw(12), lengths[r] - 1)
        rows += [(r, t, loop) for t in range(first, last + 1)]
    return rows[:count]
