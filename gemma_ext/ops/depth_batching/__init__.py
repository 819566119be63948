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
| `gather_rms_norm`, `scatter_rms_norm` | rows of the hidden bank, normed; back into it |
| `seg_depth_lora`, `seg_depth_gated` | q/k/v, gate and up: one weight, low-rank parts by loop |
| `head_exit`, `gumbel` | token, lse, entropy, sample, exit and candidates, without logits |
| `gate_exit` | exits without the head |
| `shortlist_head`, `make_shortlist` | the head through 8-bit codes that certify what they decide |

A row's bits do not depend on the rows beside it, their order or the number of threads. Nothing here
waits for a device, so that all of it can be captured in a graph; there are no derivatives.
"""

from gemma_ext.ops.depth_batching.attention import paged_attn_mixed_depth
from gemma_ext.ops.depth_batching.compact import Compacted, depth_compact
from gemma_ext.ops.depth_batching.gates import GateExit, gate_exit
from gemma_ext.ops.depth_batching.head import HeadExit, gumbel, head_exit
from gemma_ext.ops.depth_batching.kv import PAGE, kv_copy, kv_depths, unfilled
from gemma_ext.ops.depth_batching.linear import Projection, seg_depth_gated, seg_depth_lora
from gemma_ext.ops.depth_batching.norm import gather_rms_norm, scatter_rms_norm
from gemma_ext.ops.depth_batching.propagate import DeeperLayer, kv_propagate
from gemma_ext.ops.depth_batching.rope import rope_kv_write, rope_table
from gemma_ext.ops.depth_batching.shortlist import (
    Shortlist,
    ShortlistExit,
    make_shortlist,
    shortlist_head,
)

__all__ = [
    "PAGE",
    "Compacted",
    "DeeperLayer",
    "GateExit",
    "HeadExit",
    "Projection",
    "Shortlist",
    "ShortlistExit",
    "depth_compact",
    "gate_exit",
    "gather_rms_norm",
    "gumbel",
    "head_exit",
    "kv_copy",
    "kv_depths",
    "kv_propagate",
    "make_shortlist",
    "paged_attn_mixed_depth",
    "rope_kv_write",
    "rope_table",
    "scatter_rms_norm",
    "seg_depth_gated",
    "seg_depth_lora",
    "shortlist_head",
    "unfilled",
]
