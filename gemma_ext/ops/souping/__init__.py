"""Weight-space merging over parts of M models.

Every op takes a sequence of `Part`s, so that one call serves a tensor, a run of one, or a whole
model, and gives the same bits however tensors are cut.

| function | writes or returns |
|---|---|
| `soup_`, `soup` | weighted sums, in place; differentiable |
| `Magnitudes` -> `Cut` | where the largest magnitudes end: exact, over two readings |
| `merge_` | trim (`Mask`, `RowMask`), elect and combine (`Rule`) |
| `Gram`, `Norms`, `gram_rows`, `overlaps`, `sign_balance` | sums that methods need first |
| `consensus_`, `fisher_`, `nearswap_`, `gather_rows_` | element rules of their own |
| `mutate_`, `crossover_`, `swarm_` | moves of populations |
"""

from gemma_ext.ops.souping.magnitudes import Magnitudes
from gemma_ext.ops.souping.merge import consensus_, fisher_, gather_rows_, merge_, nearswap_
from gemma_ext.ops.souping.parts import Part
from gemma_ext.ops.souping.population import Move, crossover_, mutate_, swarm_
from gemma_ext.ops.souping.rules import Cut, Mask, RowMask, Rule
from gemma_ext.ops.souping.soup import soup, soup_
from gemma_ext.ops.souping.sums import Gram, Norms, dots, gram_rows, overlaps, sign_balance

__all__ = [
    "Cut",
    "Gram",
    "Magnitudes",
    "Mask",
    "Move",
    "Norms",
    "Part",
    "RowMask",
    "Rule",
    "consensus_",
    "crossover_",
    "dots",
    "fisher_",
    "gather_rows_",
    "gram_rows",
    "merge_",
    "mutate_",
    "nearswap_",
    "overlaps",
    "sign_balance",
    "soup",
    "soup_",
    "swarm_",
]
