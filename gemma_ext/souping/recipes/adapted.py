"""A LoRA adapter of peft, added to the weights of its model while they are read.

    W' = W + s B A,  s = alpha / r, or alpha / sqrt(r) with rsLoRA

row by row and without a merged copy on disk, the product and the sum in float64 and rounded once,
to float32. What the adapter replaces as a whole (`modules_to_save`) is taken from it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from gemma_ext.souping.lora.factors import Factors
from gemma_ext.souping.lora.folder import read_folder


@dataclass(frozen=True)
class LowRank:
    """s B A of one weight.

    Attributes:
        left: [rows, r] float64, scaled. right: [r, columns] float64.
        dtype: that W' is rounded to; None for float32.
    """

    left: Tensor
    right: Tensor
    dtype: torch.dtype | None = None

    def __call__(self, rows: Tensor, first: int) -> Tensor:
        """W' of some rows: [n, columns] of W from row `first` on; float32 or `dtype`."""
        piece = self.left[first : first + len(rows)]
        whole = torch.addmm(rows.double(), piece, self.right)
        return whole.float().to(self.dtype or torch.float32)

    @cached_property
    def fingerprint(self) -> str:
        seen = hashlib.sha256(str(self.dtype).encode())
        for factor in (self.left, self.right):
            seen.update(factor.numpy().tobytes())
        return seen.hexdigest()


@dataclass(frozen=True)
class Adapter:
    """What an adapter does to the weights of its model.

    Attributes:
        deltas: by the name of the weight.
        replaced: whole tensors by name; a delta for one is added to it.
    """

    deltas: Mapping[str, LowRank]
    replaced: Mapping[str, Tensor]


def read_adapter(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype | None = None
) -> Adapter:
    """An adapter for a model whose tensors have `shapes`.

    Args:
        dtype: that adapted weights are rounded to before the merge; None for not at all.

    Raises:
        ValueError: no LoRA adapter, one that does more than LoRA, or one that does not fit the
            model; in one sentence.
    """
    stored = read_folder(folder)
    replaced = {_name_in(shapes, m, folder): tensor for m, tensor in stored.whole.items()}
    deltas = {}
    for module, factors in stored.factors.items():
        name = _name_in(shapes, module, folder)
        # an embedding's weight is [V, D] = (B A)^T, and so is that of a transposed (Conv1D) layer
        turned = module in stored.embeddings or stored.config.get("fan_in_fan_out")
        delta = _low_rank(factors, turned, dtype)
        shape = tuple(replaced[name].shape) if name in replaced else shapes[name]
        found = (delta.left.shape[0], delta.right.shape[1])
        if found != shape:
            raise ValueError(
                f"{folder}: expected factors of {name} for {list(shape)}, got {list(found)}"
            )
        deltas[name] = delta
    return Adapter(deltas, replaced)


def _low_rank(factors: Factors, turned: bool, dtype: torch.dtype | None) -> LowRank:
    left, right = (factors.a.T, factors.b.T) if turned else (factors.b, factors.a)
    return LowRank(factors.scaling * left.double().contiguous(), right.double().contiguous(), dtype)


def _name_in(shapes: Mapping[str, tuple[int, ...]], module: str, folder: Path) -> str:
    """The model's tensor that a module of the adapter means; a prefix may have been added."""
    wanted = f"{module}.weight"
    if wanted in shapes:
        return wanted
    ends = [name for name in shapes if name.endswith(f".{wanted}") or wanted.endswith(f".{name}")]
    if len(ends) == 1:
        return ends[0]
    raise ValueError(f"{folder}: the model has no tensor {wanted}, which the adapter changes")
