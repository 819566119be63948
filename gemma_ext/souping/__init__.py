"""Merging models: methods, recipes and the engines that run them."""

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
