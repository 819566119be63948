"""Modules built on the ops."""

from gemma_ext.nn.linear_cross_entropy import LinearCrossEntropy
from gemma_ext.nn.linear_divergence import distillation_loss

__all__ = ["LinearCrossEntropy", "distillation_loss"]
