"""Sparse dictionaries without the dense matrix: codes are lists from the encoder on.

An encoder's `weight` is [F, D] row by row: SAELens' W_enc [D, F] is passed as its transpose. A bias
that is subtracted from the input is folded by the caller: bias = b_enc - W_enc @ b_dec. A
crosscoder of M sources has D = M times the width of one.

| function | gives |
|---|---|
| `encode_topk` | K entries a token: TopK, AbsTopK, Multi-TopK; with `scale`, by decoder norms |
| `encode_group_max` | one entry for each run of features |
| `encode_batch_topk` | N * K entries of a batch: BatchTopK, Matryoshka |
| `encode_threshold` | entries above a threshold: ReLU, JumpReLU, Gated, BatchTopK at inference |
| `decode`, `decode_error` | reconstructions of lists; what they leave of a target |
| `nested_errors` | errors of all Matryoshka or HierarchicalTopK prefixes in one pass |
| `dots`, `scatter` | <x_n, W_i> of every entry; f^T x |
| `steer` | a residual stream with latents added, clamped or removed where they fire |

Encoders return pre-activations, so that activations, their straight-through estimators and losses
are elementwise on short lists.
"""

from gemma_ext.ops.sae.codes import Codes, Encoding
from gemma_ext.ops.sae.decode import decode, decode_error
from gemma_ext.ops.sae.decode_nested import nested_errors
from gemma_ext.ops.sae.encode import (
    encode_batch_topk,
    encode_group_max,
    encode_threshold,
    encode_topk,
)
from gemma_ext.ops.sae.products import dots, scatter
from gemma_ext.ops.sae.steer import Steering, fresh_state, steer
from gemma_ext.ops.sae.steer_requests import Requests, pack

__all__ = [
    "Codes",
    "Encoding",
    "Requests",
    "Steering",
    "decode",
    "decode_error",
    "dots",
    "encode_batch_topk",
    "encode_group_max",
    "encode_threshold",
    "encode_topk",
    "fresh_state",
    "nested_errors",
    "pack",
    "scatter",
    "steer",
]
