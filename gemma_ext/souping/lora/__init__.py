"""Merging LoRA adapters of one base model."""

from gemma_ext.souping.lora.adapter import Adapter, load_adapter, merge_adapters, save_adapter
from gemma_ext.souping.lora.factors import COMBINATIONS, Factors, merge_factors

__all__ = [
    "COMBINATIONS",
    "Adapter",
    "Factors",
    "load_adapter",
    "merge_adapters",
    "merge_factors",
    "save_adapter",
]
