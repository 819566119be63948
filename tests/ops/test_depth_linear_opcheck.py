"""torch's own checks of linear layers, norms, head and gates, and compilers."""

from __future__ import annotations

import pytest
import torch
from depth_rows import DEVICES, DTYPES, IDS, offsets, projection, randn
from torch.library import opcheck

from gemma_ext.ops.depth_batching.gates import gate_exit
from gemma_ext.ops.depth_batching.head import head_exit
from gemma_ext.ops.depth_batching.linear import seg_depth_gated, seg_depth_lora
from gemma_ext.ops.depth_batching.norm import gather_rms_norm, scatter_rms_norm
from gemma_ext.ops.depth_batching.shortlist import make_shortlist

CHECKS = ("test_schema", "test_faketensor")
SLOTS = torch.tensor([2, -1, 0], dtype=torch.int32)


def linear(dtype, device, *, activation=0):
    ps = [projection(12, 20, 2, r, bias=True, dtype=dtype, device=device) for r in (4, 0)]
    empty = torch.empty(0, dtype=dtype, device=device)
    lists = [
        [empty if x is None else x for x in (getattr(p, name) for p in ps)]
        for name in ("weight", "bias", "lora_a", "lora_b")
    ]
    x = randn(9, 20, dtype=dtype).to(device)
    return x, *lists, offsets(4, 5).to(device), 0.5, activation


def head(dtype, device, *, bare=False):
    h, weight = (randn(n, 20, dtype=dtype).to(device) for n in (5, 300))
    if bare:
        return h, None, weight, None, None, None, None, None, 1e-6, False, 0.0, 1.0, 0, False, 0
    rows = torch.rand(5, device=device)
    keys = torch.arange(15, device=device).reshape(5, 3)
    norm = torch.ones(20, dtype=dtype, device=device)
    bias = torch.zeros(300, device=device)
    none = torch.zeros(5, dtype=torch.bool, device=device)
    return h, norm, weight, bias, rows, rows, keys, none, 1e-6, True, 30.0, 1.0, 2, True, 7


def gate(dtype, device, mode):
    h, weight = randn(5, 20, dtype=dtype).to(device), randn(20, dtype=dtype).to(device)
    rows = torch.rand(5, device=device)
    learned = mode < 2
    return (
        h, None if learned else h, weight if learned else None, rows[:1] if learned else None,
        rows if mode == 1 else None, rows, rows > 0.5, mode, False,
    )  # fmt: skip


def shortlist(dtype, device):
    h, weight = (randn(n, 20, dtype=dtype).to(device) for n in (5, 300))
    return h, None, weight, None, *make_shortlist(weight)[1:], 1e-6, False, 0.0, 1.0, 9


OPS = {
    "depth_gather_rms_norm": lambda t, d: (
        randn(4, 20, dtype=t).to(d), SLOTS.to(d), randn(20, dtype=t).to(d), 1e-6, True,
    ),
    "depth_scatter_rms_norm": lambda t, d: (
        randn(4, 20, dtype=t).to(d), SLOTS.to(d), randn(3, 20, dtype=t).to(d),
        randn(20, dtype=t).to(d), randn(20, dtype=t).to(d), 1e-6, True,
    ),
    "depth_scatter_rms_norm, bare": lambda t, d: (
        randn(4, 20, dtype=t).to(d), SLOTS.to(d), randn(3, 20, dtype=t).to(d), None, None, 1e-6,
        False,
    ),
    "depth_linear": linear,
    "depth_linear, gated": lambda t, d: linear(t, d, activation=1),
    "depth_head_exit": head,
    "depth_head_exit, bare": lambda t, d: head(t, d, bare=True),
    "depth_gumbel": lambda t, d: (
        torch.ones(5, 4, dtype=torch.int32, device=d), torch.arange(15, device=d).reshape(5, 3),
    ),
    "depth_gate_exit": lambda t, d: gate(t, d, 1),
    **{f"depth_gate_exit, {m}": lambda t, d, m=m: gate(t, d, m) for m in (0, 2, 3)},
    "depth_shortlist": shortlist,
}  # fmt: skip
SAMPLES = {
    name: lambda dtype, variant, _, made=made: made(dtype, "cpu")
    for name, made in OPS.items()
    if "," not in name
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("name", OPS)
def test_opcheck(name, dtype, device):
    op = name.split(",")[0]
    opcheck(getattr(torch.ops.gemma_ext, op).default, OPS[name](dtype, device), test_utils=CHECKS)


@pytest.mark.parametrize("device", DEVICES)
def test_compiled_is_eager(device):
    """A whole block's worth of these ops, for numbers of rows that vary."""
    torch._dynamo.reset()
    gate_w, up_w = projection(24, 16, 2, 3, device=device), projection(24, 16, 2, 5, device=device)
    down = projection(16, 24, 2, 3, device=device)
    weight, vocabulary = torch.rand(16, device=device), randn(300, 16).to(device)

    def step(bank, slots, cut):
        x = gather_rms_norm(bank, slots, weight)
        y = seg_depth_gated(x, gate_w, up_w, cut)
        (y,) = seg_depth_lora(y, [down], cut)
        after = scatter_rms_norm(bank, slots, y, next_weight=weight)
        got = head_exit(after, vocabulary, mode="margin", threshold=0.1)
        gone = gate_exit(after, "cosine", 0.9, previous=x)
        return after, got.ids, got.exits, gone.exits

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (3, 5, 9):
        bank = randn(12, 16).to(device)
        slots = torch.randperm(12)[:n].int().to(device)
        cut = offsets(n - 2, 2).to(device)
        other = bank.clone()
        for a, b in zip(step(bank, slots, cut), compiled(other, slots, cut), strict=True):
            assert torch.equal(a, b)
        assert torch.equal(bank, other)
