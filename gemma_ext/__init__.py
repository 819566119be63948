"""Kernels and losses for training, scoring and serving Gemma-class models."""

from gemma_ext._version import __version__
from gemma_ext.nn.linear_cross_entropy import LinearCrossEntropy
from gemma_ext.ops.cce import LinearCrossEntropyOutput, linear_cross_entropy, linear_logprobs

__all__ = [
    "LinearCrossEntropy",
    "LinearCrossEntropyOutput",
    "__version__",
    "linear_cross_entropy",
    "linear_logprobs",
]
