"""Merging models: methods, recipes and the engines that run them.

    ties = get("ties")()
    values = constant(ties, 2, weight=[1.0, 0.5], density=0.2)
    merged = merge_tensors(ties, [math, code], base, values)      # mappings of names to tensors
    merge_files(ties, ["math", "code"], "base", values, "out")    # folders, in bounded memory

| function | merges |
|---|---|
| `merge_tensors`, `merge_files` | by one of `METHODS`, in memory and from disk to disk |
| `soup_`, `ema_`, `Ema` | a weighted mean into a running model, averages over training |
| `Swap` | into a running model, and back |
| `greedy_soup` | nothing: it asks a score of yours for weights |

Recipes of mergekit are in `gemma_ext.souping.recipes`, coefficients that learn in `.adaptive`.
"""

from gemma_ext.souping.engine.memory import merge_tensors
from gemma_ext.souping.engine.stream import merge_files
from gemma_ext.souping.live import Ema, Swap, ema_, soup_
from gemma_ext.souping.methods import METHODS, get, greedy_soup
from gemma_ext.souping.parameters import constant

__all__ = [
    "METHODS",
    "Ema",
    "Swap",
    "constant",
    "ema_",
    "get",
    "greedy_soup",
    "merge_files",
    "merge_tensors",
    "soup_",
]
