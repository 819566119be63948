"""Losses of heads that are spread over several processes."""

from gemma_ext.distributed._shards import gather_head, vocab_shard_range
from gemma_ext.distributed.vocab_parallel import (
    vocab_parallel_linear_cross_entropy,
    vocab_parallel_linear_logprobs,
)

__all__ = [
    "gather_head",
    "vocab_parallel_linear_cross_entropy",
    "vocab_parallel_linear_logprobs",
    "vocab_shard_range",
]
