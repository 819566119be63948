"""What the models of a merge look like, tensor by tensor, in one pass over their weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gemma_ext.ops.souping import Gram, Part
from gemma_ext.souping.engine.files.sources import Source
from gemma_ext.souping.engine.plan import Target
from gemma_ext.souping.recipes.peek import read_pieces


@dataclass(frozen=True)
class Measured:
    """A tensor of the output, seen from its M sources.

    Attributes:
        name: of the tensor. layer: it is in, or None. numel: its elements.
        gram: [M, M] float64, inner products of the sources' deltas from the base, or of the
            sources where there is no base.
        base_norm: Euclidean norm of the base, or of the first source.
        conflicts: share of the elements, of those where any delta is not 0, in which two deltas
            have opposite signs; None without a base.
        changed: [M] share of elements that differ from the base; None without a base.
    """

    name: str
    layer: int | None
    numel: int
    gram: Tensor
    base_norm: float
    conflicts: float | None
    changed: Tensor | None

    @property
    def norms(self) -> Tensor:
        """[M] Euclidean norms of the deltas, or of the sources."""
        return self.gram.diagonal().clamp(min=0).sqrt()

    @property
    def cosines(self) -> Tensor:
        """[M, M]; nan where a delta is zero."""
        norms = self.norms
        return (self.gram / (norms[:, None] * norms[None, :])).clamp(-1, 1)


def measure(target: Target) -> Measured | None:
    """Reads a target's sources; None for a tensor that is copied or empty."""
    shape = target.info.shape
    numel = math.prod(shape)
    if target.values is None or not numel:
        return None
    count, name, offset = len(target.sources), target.info.name, 0
    grams, squares = Gram(count), Gram(1)
    opposed, moved = 0, 0
    changed = torch.zeros(count, dtype=torch.float64)
    for pieces in read_pieces(target.inputs, shape):
        sources, base = (pieces[:-1], pieces[-1]) if target.base else (pieces, None)
        grams.add([Part(sources, base, None, name, offset)])
        squares.add([Part([pieces[0] if base is None else base], None, None, name, offset)])
        offset += pieces[0].numel()
        if base is not None:
            raised = lowered = torch.zeros(len(base), dtype=torch.bool)
            for index, source in enumerate(sources):
                up, down = source > base, source < base
                raised, lowered = raised | up, lowered | down
                changed[index] += int((up | down).sum())
            opposed += int((raised & lowered).sum())
            moved += int((raised | lowered).sum())
    has_base = target.base is not None
    return Measured(
        name=target.info.name,
        layer=target.info.layer,
        numel=numel,
        gram=grams.value[0],
        base_norm=math.sqrt(float(squares.value)),
        conflicts=opposed / max(moved, 1) if has_base else None,
        changed=changed / numel if has_base else None,
    )


def measure_all(
    targets: Iterable[Target], progress: Callable[[int, int], None]
) -> Iterator[Measured]:
    """`measure` of those that have something to measure; progress(bytes read, bytes to read)."""
    targets = [target for target in targets if target.values is not None]
    sizes = [sum(_nbytes(source, target) for source in target.inputs) for target in targets]
    done = 0
    for target, size in zip(targets, sizes, strict=True):
        found = measure(target)
        done += size
        progress(done, sum(sizes))
        if found is not None:
            yield found


def _nbytes(source: Source, target: Target) -> int:
    return math.prod(target.info.shape) * source.stored.dtype.itemsize


def weighted_mean(values: Sequence[float], weights: Sequence[float]) -> float:
    """Mean over the values that are numbers; nan without one."""
    pairs = [(v, w) for v, w in zip(values, weights, strict=True) if not math.isnan(v)]
    total = sum(w for _, w in pairs)
    return sum(v * w for v, w in pairs) / total if total else math.nan
