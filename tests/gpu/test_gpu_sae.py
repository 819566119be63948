"""Sparse dictionaries where only a card shows it: sizes, streams, graphs, waiting."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from gpu_problem import DEVICE, DTYPES, need_memory
from sae_steps import encoders, inputs, results

from gemma_ext.ops.sae import decode, encode_threshold, encode_topk

SHAPE = (300, 72, 5000)


@pytest.fixture(autouse=True)
def allow_waiting_again() -> Iterator[None]:
    yield
    if DEVICE == "cuda":
        torch.cuda.set_sync_debug_mode("default")


def differing(found: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> list[str]:
    bits = {name: t.contiguous().view(torch.uint8).cpu() for name, t in found.items()}
    return [
        n
        for n, t in want.items()
        if not torch.equal(t.contiguous().view(torch.uint8).cpu(), bits[n])
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whole_numbers_choose_what_the_cpu_chooses(dtype):
    here, there = (encoders(inputs(*SHAPE, dtype, d), 8) for d in ("cpu", DEVICE))
    for name, codes in here.items():
        assert torch.equal(codes.indices, there[name].indices.cpu()), name
        assert torch.equal(codes.values, there[name].values.cpu()), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_runs_agree_bit_by_bit(dtype):
    """Candidates arrive in any order, and none shows."""
    q = inputs(*SHAPE, dtype, DEVICE)
    q |= {name: q[name] + 0.01 * torch.randn_like(q[name]) for name in ("x", "encoder", "decoder")}
    first = results(q)
    for _ in range(20):
        assert differing(results(q), first) == []


@pytest.mark.card
def test_features_that_get_better_are_chosen_again():
    """Every row's list runs over, and the rows are done again tile by tile."""
    n, features = 200, 20_000
    x = torch.ones(n, 64, dtype=torch.bfloat16, device="cuda")
    weight = torch.zeros(features, 64, dtype=torch.bfloat16, device="cuda")
    bias = torch.arange(features, device="cuda", dtype=torch.float32)
    codes = encode_topk(x, weight, bias, k=5).codes
    want = torch.arange(features - 1, features - 6, -1, device="cuda")
    assert torch.equal(codes.indices.long(), want.expand(n, 5))


@pytest.mark.card
def test_a_million_features():
    need_memory(30)
    n, features, width, k = 65_536, 2**20, 128, 32
    g = torch.Generator("cuda").manual_seed(1)
    options = {"generator": g, "device": "cuda", "dtype": torch.bfloat16}
    x, weight = torch.randn(n, width, **options), torch.randn(features, width, **options)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    codes = encode_topk(x, weight, k=k).codes
    assert torch.cuda.max_memory_allocated() - before < n * features * 2 / 50
    few = torch.randint(0, n, (64,), generator=g, device="cuda")
    p = x[few].float() @ weight.float().T
    want = p.topk(k).values
    torch.testing.assert_close(codes.values[few], want, rtol=1e-3, atol=1e-3)
    out = decode(codes, weight)
    mine = (codes.values[few, :, None] * weight[codes.indices[few].long()].float()).sum(1)
    torch.testing.assert_close(out[few].float(), mine, rtol=2e-2, atol=0.5)


@pytest.mark.card
def test_inputs_made_on_a_side_stream():
    q = inputs(*SHAPE, torch.bfloat16, "cuda")
    want, late = results(q), q["x"].clone()
    q["x"].zero_()
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # about 30 ms: another stream would overtake
        q["x"].copy_(late)
        found = results(q)
    side.synchronize()
    assert differing(found, want) == []


@pytest.mark.card
def test_captured_steps_replay_on_new_values():
    q, other = (inputs(*SHAPE, torch.bfloat16, "cuda") for _ in range(2))
    other["x"] = other["x"].flip(0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        results(q)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = results(q)
    q["x"].copy_(other["x"])
    graph.replay()
    torch.cuda.synchronize()
    assert differing(found, results(other)) == []


@pytest.mark.card
def test_nothing_waits():
    q = inputs(*SHAPE, torch.bfloat16, "cuda")
    results(q)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    results(q)


@pytest.mark.card
def test_a_capture_refuses_a_list_whose_length_is_asked_for():
    q = inputs(*SHAPE, torch.bfloat16, "cuda")
    encode_threshold(q["x"], q["encoder"], threshold=9.0)
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="captur"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        encode_threshold(q["x"], q["encoder"], threshold=9.0)
