"""Activations of a model over a text, in an order that is random and can be taken up anywhere.

The rows of tokens are put in one random order and cut into blocks. A block is run through the
model, and its activations are shuffled; epochs visit the blocks in random orders. Which activation
stands where is a function of the seed alone, so a resumed run recomputes one block and goes on,
and nothing of a buffer is ever saved.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from gemma_ext import files
from gemma_ext.lm.huggingface import evaluating
from gemma_ext.lm.identity import identity
from gemma_ext.sae.sites import Site, capture, find_site

_ABOUT = "activations.json"


@dataclass(frozen=True)
class Activations:
    """Batches of activations.

    Args:
        models: one model, or several for a crosscoder, which see the same tokens.
        sites: where; one for every model, or several places of one model.
        tokens: [rows, T] ids.
        batch: activations per step.
        buffer: activations that are shuffled among each other, about; memory grows with it.
        rows: rows that are run at once.
        skip: first positions of a row that are left out; 1 leaves out <bos>.
        seed: of all orders.
        folder: keep blocks on disk: an epoch behind the first reads them.
        rank, world: every rank takes every world-th block.

    Raises:
        ValueError: sites that do not fit the models, or fewer activations than a batch.
    """

    models: Sequence[nn.Module]
    sites: Sequence[str | int]
    tokens: Tensor
    batch: int = 4096
    buffer: int = 65536
    rows: int = 8
    skip: int = 1
    seed: int = 0
    folder: Path | None = None
    rank: int = 0
    world: int = 1
    _places: list[tuple[nn.Module, list[Site]]] = field(init=False, repr=False)
    _order: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.models:
            raise ValueError("models: expected at least one")
        if len(self.models) == 1:
            places = [(self.models[0], [find_site(self.models[0], s) for s in self.sites])]
        elif len(self.models) == len(self.sites):
            places = [
                (model, [find_site(model, site)])
                for model, site in zip(self.models, self.sites, strict=True)
            ]
        else:
            raise ValueError(
                f"sites: expected one for each of {len(self.models)} models, got {len(self.sites)}"
            )
        rows, length = self.tokens.shape
        if not 0 <= self.skip < length:
            raise ValueError(f"skip: expected 0 to {length - 1}, got {self.skip}")
        object.__setattr__(self, "_places", places)
        order = torch.randperm(rows, generator=self._generator(0))
        object.__setattr__(self, "_order", order)
        if self.steps_per_block < 1:
            raise ValueError(
                f"batch: expected at most {self.block_rows * self.per_row} activations, which the "
                f"tokens give, got {self.batch}"
            )
        if self.blocks < self.world:
            raise ValueError(f"tokens: expected {self.world} blocks for as many ranks")
        if self.folder is not None:
            self._claim(Path(self.folder))

    @property
    def sources(self) -> int:
        """M."""
        return len(self.sites)

    @property
    def per_row(self) -> int:
        """Activations of a row."""
        return self.tokens.shape[1] - self.skip

    @property
    def block_rows(self) -> int:
        """Rows of a block."""
        wanted = -(-max(self.buffer, self.batch) // self.per_row)
        return min(wanted, self.tokens.shape[0])

    @property
    def blocks(self) -> int:
        """Blocks of an epoch; the rows behind the last are left out."""
        return self.tokens.shape[0] // self.block_rows

    @property
    def steps_per_block(self) -> int:
        """Batches of a block; the activations behind the last are left out."""
        return self.block_rows * self.per_row // self.batch

    def batches(self, first: int = 0) -> Iterator[Tensor]:
        """Batches [batch, D] or [batch, M, D] from step `first` on, without an end."""
        turn, step = divmod(first, self.steps_per_block)
        while True:
            epoch, place = divmod(turn * self.world + self.rank, self.blocks)
            orders = torch.randperm(self.blocks, generator=self._generator(1, epoch))
            rows = self.block(int(orders[place]))
            mixed = torch.randperm(rows.shape[0], generator=self._generator(2, epoch, place))
            for part in mixed.split(self.batch)[step : self.steps_per_block]:
                yield rows[part.to(rows.device)]
            turn, step = turn + 1, 0

    def block(self, number: int) -> Tensor:
        """Activations [n, D] or [n, M, D] of a block, in the order of its rows."""
        if self.folder is None:
            return self._run(number)
        path = Path(self.folder) / f"block-{number:06d}.safetensors"
        if not path.exists():
            files.write_safetensors(path, {"activations": self._run(number)})
        return files.read_safetensors(path)["activations"]

    def _run(self, number: int) -> Tensor:
        places = self._order[number * self.block_rows : (number + 1) * self.block_rows]
        done = [self.activations(self.tokens[part]) for part in places.split(self.rows)]
        return torch.cat([part[:, self.skip :].flatten(0, 1) for part in done])

    def activations(self, ids: Tensor) -> Tensor:
        """[B, T, D] or [B, T, M, D] of rows of ids [B, T], all positions."""
        found = []
        for model, sites in self._places:
            device = model.get_input_embeddings().weight.device
            with evaluating(model):
                found += capture(model, ids.to(device, torch.int64), sites)
        return found[0] if self.sources == 1 else torch.stack(found, -2)

    def _generator(self, *key: int) -> torch.Generator:
        text = json.dumps([self.seed, *key]).encode()
        number = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")
        return torch.Generator().manual_seed(number >> 1)

    def _claim(self, folder: Path) -> None:
        """Blocks of something else are refused."""
        ids = self.tokens.contiguous().numpy().tobytes()
        about = {
            "models": [identity(model) for model in self.models],
            "sites": [str(site) for site in self.sites],
            "tokens": hashlib.blake2b(ids).hexdigest(),
            "rows": self.block_rows,
            "skip": self.skip,
            "seed": self.seed,
        }
        place = folder / _ABOUT
        if place.exists() and files.read_json(place) != about:
            raise ValueError(f"folder: {folder} holds activations of something else")
        files.write_json(place, about)


def shuffled(rows: int, wanted: int, generator: torch.Generator) -> Tensor:
    """Numbers of rows [wanted]: all of them in a new order in every epoch."""
    epochs = math.ceil(wanted / rows)
    return torch.cat([torch.randperm(rows, generator=generator) for _ in range(epochs)])[:wanted]
