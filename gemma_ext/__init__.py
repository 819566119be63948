"""Kernels and methods for training, interpreting, merging and serving Gemma-class models."""

from gemma_ext import _loader
from gemma_ext._version import __version__

_loader.load()  # before anything that registers with an op of the library

from gemma_ext.nn.linear_cross_entropy import LinearCrossEntropy  # noqa: E402
from gemma_ext.ops.cce import (  # noqa: E402
    LinearCrossEntropyOutput,
    LinearLogprobsOutput,
    linear_cross_entropy,
    linear_logprobs,
)
from gemma_ext.ops.cce.divergence import (  # noqa: E402
    LinearDivergenceOutput,
    linear_divergence,
)
from gemma_ext.ops.vocab_state import VocabState  # noqa: E402

__all__ = [
    "LinearCrossEntropy",
    "LinearCrossEntropyOutput",
    "LinearDivergenceOutput",
    "LinearLogprobsOutput",
    "VocabState",
    "__version__",
    "linear_cross_entropy",
    "linear_divergence",
    "linear_logprobs",
]
