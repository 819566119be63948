"""Modules built on the ops."""

from gemma_ext.nn.linear_cross_entropy import LinearCrossEntropy

__all__ = ["LinearCrossEntropy"]
