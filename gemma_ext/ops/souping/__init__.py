"""Weight-space merging over parts of M models."""

from gemma_ext.ops.souping.parts import Part

__all__ = ["Part"]
