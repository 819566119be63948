"""Steerings of a batch side by side, as the op takes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gemma_ext.ops.sae.steer_inputs import numbers

if TYPE_CHECKING:
    from gemma_ext.ops.sae.steer import Steering

MODE_CODES = {
    "add": 0,
    "ablate": 1,
    "clamp": 2,
    "min_clamp": 3,
    "scale": 4,
    "project": 5,
    "cap": 6,
}
ALWAYS, OWN, TOGETHER, CAUSAL, PROMPT = range(5)
FOREVER = 2**31 - 1


@dataclass(frozen=True)
class Requests:
    """Tables of R directions, and for each request the list of those that it uses.

    Attributes:
        decoder: [R, D].
        encoder: [R, D], or [0, 0] where nobody reads a code.
        tables: float32 [R, 3]: bias, threshold, |d|.
        offsets: int64 [B + 1]: request b has entries offsets[b] .. offsets[b + 1].
        latents: int32 [nnz], rows of the tables.
        modes: int32 [nnz], a `MODE_CODES`.
        amounts: float32 [nnz, 3]: strength, level, gate threshold.
        gates: int32 [B, 2]: ALWAYS, OWN, TOGETHER, CAUSAL or PROMPT; window.
        shared: the one request serves every one of a batch.
        remembers: whether a gate knows of earlier calls.
    """

    decoder: Tensor
    encoder: Tensor
    tables: Tensor
    offsets: Tensor
    latents: Tensor
    modes: Tensor
    amounts: Tensor
    gates: Tensor
    shared: bool
    remembers: bool

    @property
    def count(self) -> int:
        return self.gates.shape[0]

    @property
    def requires_grad(self) -> bool:
        found = (self.decoder, self.encoder, self.tables, self.amounts)
        return any(x.requires_grad for x in found)

    def spread(self, batch: int) -> Requests:
        """One request for each of the batch."""
        if not self.shared or batch == 1:
            return self
        size = self.latents.shape[0]
        steps = torch.arange(batch + 1, device=self.offsets.device)
        return replace(
            self,
            offsets=steps * size,
            latents=self.latents.repeat(batch),
            modes=self.modes.repeat(batch),
            amounts=self.amounts.repeat(batch, 1),
            gates=self.gates.repeat(batch, 1),
            shared=False,
        )


def pack(steerings: Sequence[Steering | None]) -> Requests:
    """The requests of a batch, None for one that is left alone.

    One steering alone serves every request, or those that the rows of its strengths are of. Tables
    are shared where the steering is the same object.

    Raises:
        ValueError: no steering at all, or such as do not go together.
    """
    given = list({id(s): s for s in steerings if s is not None}.values())
    if not given:
        raise ValueError("expected at least one steering, got none")
    _check_alike(given)
    alone = len(steerings) == 1
    rows = given[0].requests_of_its_own if alone else 1
    starts, start = {}, 0
    for s in given:
        starts[id(s)] = start
        start += s.decoder.shape[0]
    device = given[0].decoder.device
    latents, modes, amounts, gates, sizes = [], [], [], [], [0]
    for b in range(rows if alone else len(steerings)):
        s = steerings[0 if alone else b]
        gates.append((ALWAYS, FOREVER) if s is None else _gate(s))
        size = 0 if s is None else s.decoder.shape[0]
        sizes.append(sizes[-1] + size)
        if s is None:
            continue
        latents.append(starts[id(s)] + torch.arange(size, dtype=torch.int32, device=device))
        modes.append(latents[-1].new_full((size,), MODE_CODES[s.mode]))
        amounts.append(_amounts(s, b if alone else 0, alone))
    return Requests(
        decoder=torch.cat([s.decoder for s in given]),
        encoder=_encoders(given),
        tables=torch.cat([_table(s) for s in given]),
        offsets=torch.tensor(sizes, device=device),
        latents=torch.cat(latents),
        modes=torch.cat(modes),
        amounts=torch.cat(amounts),
        gates=torch.tensor(gates, dtype=torch.int32, device=device),
        shared=alone and rows == 1,
        remembers=any(gate in (CAUSAL, PROMPT) for gate, _ in gates),
    )


def _check_alike(tables: list[Steering]) -> None:
    like = tables[0].decoder
    for s in tables:
        if (s.decoder.shape[1], s.decoder.dtype) != (like.shape[1], like.dtype):
            raise ValueError(
                f"expected every decoder to be [S, {like.shape[1]}] in {like.dtype}, "
                f"got {list(s.decoder.shape)} in {s.decoder.dtype}"
            )
        if s.decoder.device != like.device:
            raise ValueError(
                f"expected every decoder on {like.device}, got one on {s.decoder.device}"
            )


def _encoders(tables: list[Steering]) -> Tensor:
    if not any(s.reads_code for s in tables):
        return tables[0].decoder.new_empty(0, 0)
    return torch.cat([s.decoder if s.encoder is None else s.encoder for s in tables])


def _table(s: Steering) -> Tensor:
    wide = torch.promote_types(s.decoder.dtype, torch.float32)
    columns = (
        numbers("bias", 0.0 if s.bias is None else s.bias, s.decoder),
        numbers("threshold", s.threshold, s.decoder),
        s.decoder.to(wide).norm(dim=-1),
    )
    return torch.stack([c.to(wide) for c in columns], -1)


def _amounts(s: Steering, row: int, alone: bool) -> Tensor:
    found = []
    for name in ("strength", "level"):
        value = numbers(name, getattr(s, name), s.decoder, batched=True)
        if not alone and value.shape[0] > 1:
            raise ValueError(
                f"expected {name} to be [S] where each request has a steering, "
                f"got {list(value.shape)}"
            )
        found.append(value[min(row, value.shape[0] - 1)])
    return torch.stack([*found, torch.full_like(found[0], s.gate_threshold)], -1)


def _gate(s: Steering) -> tuple[int, int]:
    if s.gate == "per_token":
        return (TOGETHER if s.together else OWN), FOREVER
    if s.gate == "constant":
        return ALWAYS, FOREVER
    window = FOREVER if s.window is None else min(s.window, FOREVER)
    return (PROMPT if s.scope == "prompt" else CAUSAL), window
