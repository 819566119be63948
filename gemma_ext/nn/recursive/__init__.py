"""Models that run few stored layers many times, each depth with low-rank matrices of its own.

A recursive model is an ordinary causal language model of `transformers` with L layers of which
those of one stored index share their Parameters. So its forward, masks, attention types, caches
and `generate` are the library's, and `layer_idx`, window and RoPE belong to the depth.

    y = W[s(l)] x + b[s(l)] + B[l] (A[l] x)        linear of depth l, stored layer s(l)
"""

from gemma_ext.nn.recursive.exits import ExitHead, exit_heads
from gemma_ext.nn.recursive.files import load, save
from gemma_ext.nn.recursive.linear import DepthLinear
from gemma_ext.nn.recursive.merge import merged
from gemma_ext.nn.recursive.plan import ORDERS, Plan
from gemma_ext.nn.recursive.prefix import add_prefixes
from gemma_ext.nn.recursive.tying import decoder_layers, linear_names, make_recursive

__all__ = [
    "ORDERS",
    "DepthLinear",
    "ExitHead",
    "Plan",
    "add_prefixes",
    "decoder_layers",
    "exit_heads",
    "linear_names",
    "load",
    "make_recursive",
    "merged",
    "save",
]
