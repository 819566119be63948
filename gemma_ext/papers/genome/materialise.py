"""From a recipe to weights: one pass of the souping kernels over the pool, into resident tensors.

| rule | child of sources s_i with weights w_i, tensor by tensor |
|---|---|
| linear | sum_i w_i s_i |
| ties | largest `density` of each s_i; sign of their sum; mean over those that agree of w_i s_i |
| dare_linear | sum_i w_i m_i s_i / density, m_i ~ Bernoulli(density) |
| dare_ties | the same in place of the largest, then as ties |
| blxalpha | the linear child, kept within 1.2 times the parents' spread beyond them |
| random | each element from one parent, drawn by the softmax of their magnitudes |
| product | of LoRA factors: the B A of rank r nearest to sum_i w_i B_i A_i (QR, small SVD) |

All but "product" treat LoRA factors A and B as any tensors, as the release does:
dW of a linear child is (sum w B)(sum w A), not sum w B A. With a base they act on s_i - base.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from gemma_ext.files import write_safetensors
from gemma_ext.ops import souping
from gemma_ext.ops.souping import Magnitudes, Mask, Part, Rule
from gemma_ext.papers.genome.pool import Pool
from gemma_ext.papers.genome.recipe import Genome, Source
from gemma_ext.souping.lora.factors import Factors, merge_factors

RULES = ("linear", "ties", "dare_linear", "dare_ties", "blxalpha", "random", "product")
BLX_ALPHA = 1.2  # of the release; it never binds for convex weights
_AGREE = Rule(election="sum", weighted=False, zero=1, combine="mean")
_AT_ONCE = 1 << 26  # elements that share a float32 scratch
_OPEN = 32  # finished genomes held at a time


class Materialiser:
    """Writes individuals of a pool.

    Args:
        pool: the experts.
        folder: where genomes that others are built on are stored, float32 safetensors named by
            their keys; several processes may share it. None keeps them in memory.
    """

    def __init__(self, pool: Pool, folder: Path | None = None) -> None:
        self.pool, self.folder = pool, folder
        self._finished: OrderedDict[str, Mapping[str, Tensor]] = OrderedDict()

    @torch.no_grad()
    def write(self, genome: Genome, out: Mapping[str, Tensor]) -> None:
        """Writes every tensor of the pool into `out`, rounded once to its dtype.

        Without noises that is one pass straight into `out`; with noises and narrower tensors a
        float32 scratch of at most 256 MB comes between.

        Raises:
            ValueError: `out` lacks a tensor of the pool, or the rule does not apply to it.
        """
        missing = [name for name in self.pool.shapes if name not in out]
        if missing:
            raise ValueError(f"out: expected the tensors of the pool, got none for {missing[0]!r}")
        sources = [self._source(source) for source, _ in genome.terms]
        for names in self._groups():
            direct = not genome.noises or all(out[n].dtype == torch.float32 for n in names)
            target = {
                n: out[n] if direct else torch.empty_like(out[n], dtype=torch.float32)
                for n in names
            }
            self._apply(genome, sources, names, target)
            for noise in genome.noises:
                parts = [Part([x], out=x, name=name) for name, x in target.items()]
                souping.mutate_(parts, noise.rate, noise.sigma, seed=noise.seed)
            if not direct:
                for name, x in target.items():
                    out[name].copy_(x)

    def tensors(self, genome: Genome, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """The individual in new tensors."""
        made = {
            name: torch.empty(shape, dtype=dtype, device=self.pool.device)
            for name, shape in self.pool.shapes.items()
        }
        self.write(genome, made)
        return made

    def _apply(
        self,
        genome: Genome,
        sources: Sequence[Mapping[str, Tensor]],
        names: Sequence[str],
        out: Mapping[str, Tensor],
    ) -> None:
        base = self.pool.base
        if not sources:
            for name in names:
                out[name].zero_() if base is None else out[name].copy_(base[name])
            return
        weights = [weight for _, weight in genome.terms]
        parts = [
            Part([s[n] for s in sources], None if base is None else base[n], out[n], n)
            for n in names
        ]
        density, seed = genome.density, genome.seed
        if genome.rule == "linear":
            souping.soup_(parts, weights)
        elif genome.rule == "ties":
            for part in parts:
                keep = int(density * part.out.numel())
                cut = Magnitudes(len(part.sources)).find([part], keep).cut()
                souping.merge_([part], _AGREE, weights, mask=Mask(keep=cut))
        elif genome.rule in ("dare_linear", "dare_ties"):
            rule = Rule() if genome.rule == "dare_linear" else _AGREE
            divide = density if genome.rescale else 1.0
            mask = Mask(density=density)
            souping.merge_(parts, rule, weights, mask=mask, divide=divide, seed=seed)
        elif genome.rule == "blxalpha":
            souping.crossover_(parts, weights, kind="blend", alpha=BLX_ALPHA)
        elif genome.rule == "random":
            souping.crossover_(parts, 1.0, kind="magnitude", seed=seed)
        elif genome.rule == "product":
            self._product(sources, weights, out)
        else:
            raise ValueError(f"rule: expected one of {', '.join(RULES)}, got {genome.rule!r}")

    def _product(
        self,
        sources: Sequence[Mapping[str, Tensor]],
        weights: Sequence[float],
        out: Mapping[str, Tensor],
    ) -> None:
        loose = [name for unit in self.pool.units if len(unit) == 1 for name in unit]
        if loose:
            raise ValueError(f"product: expected pairs of LoRA factors only, got {loose[0]!r}")
        for a, b in self.pool.factors:
            if a in out:
                pairs = [Factors(s[a], s[b]) for s in sources]
                child = merge_factors(pairs, weights, "svd", rank=len(out[a]), name=a)
                out[a].copy_(child.a)
                out[b].copy_(child.b)

    def _source(self, source: Source) -> Mapping[str, Tensor]:
        if isinstance(source, int):
            return self.pool.experts[source]
        if source.key not in self._finished:
            self._finished[source.key] = self._finish(source)
            while len(self._finished) > _OPEN:
                self._finished.popitem(last=False)
        self._finished.move_to_end(source.key)
        return self._finished[source.key]

    def _finish(self, genome: Genome) -> Mapping[str, Tensor]:
        if self.folder is None:
            return self.tensors(genome)
        from safetensors.torch import load_file

        path = self.folder / f"{genome.key}.safetensors"
        if not path.exists():
            write_safetensors(path, self.tensors(genome))
        return load_file(path, device=str(self.pool.device))

    def _groups(self) -> Iterator[list[str]]:
        """Names in runs of at most `_AT_ONCE` elements, the two factors of a pair together."""
        group: list[str] = []
        size = 0
        for unit in self.pool.units:
            numel = sum(self.pool.shapes[name].numel() for name in unit)
            if group and size + numel > _AT_ONCE:
                yield group
                group, size = [], 0
            group += unit
            size += numel
        if group:
            yield group
