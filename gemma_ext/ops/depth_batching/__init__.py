"""Rows of one recursive model at different loops, side by side in one launch.

A model of B loops over K stored layers has B * K depths. Rows [n] carry the loop they run, so that
one launch serves tokens at all of them; K and V of every depth lie in one pool of pages.

| function | does |
|---|---|
| `depth_compact` | after a block: who goes on, sorted by loop, and who leaves for the head |
| `rope_kv_write` | norm and rotation of q and k, K and V into pages |
| `paged_attn_mixed_depth` | attention over pages, each row at its own depth, window and length |
| `kv_propagate`, `kv_copy` | K and V of loops that a token has skipped |
| `kv_depths`, `unfilled` | which loops share a depth; rows that would read what is not there |

A row's bits do not depend on the rows beside it, their order or the number of threads. Nothing here
waits for a device, so that all of it can be captured in a graph; there are no derivatives.
"""

from gemma_ext.ops.depth_batching.attention import paged_attn_mixed_depth
from gemma_ext.ops.depth_batching.compact import Compacted, depth_compact
from gemma_ext.ops.depth_batching.kv import PAGE, kv_copy, kv_depths, unfilled
from gemma_ext.ops.depth_batching.propagate import DeeperLayer, Projection, kv_propagate
from gemma_ext.ops.depth_batching.rope import rope_kv_write, rope_table

__all__ = [
    "PAGE",
    "Compacted",
    "DeeperLayer",
    "Projection",
    "depth_compact",
    "kv_copy",
    "kv_depths",
    "kv_propagate",
    "paged_attn_mixed_depth",
    "rope_kv_write",
    "rope_table",
    "unfilled",
]
