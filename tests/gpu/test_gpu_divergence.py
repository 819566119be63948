"""Divergences where only a card shows it: graphs, waiting, repeated runs, sizes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from gpu_problem import DEVICE, DTYPES, need_memory

# tests/ops, which gpu_problem has put on the path
from divergence_oracle import KINDS, divergence, gradients, problem  # isort: skip

from gemma_ext.ops.cce.divergence import divergence_rows

GRADIENT = {torch.float32: 2.0**-12, torch.bfloat16: 2.0**-5, torch.float16: 2.0**-8}
FORMS = {"exact": {"impl": "exact"}, "sampled": {"impl": "cce", "filter_eps": 2.0**-4}}


@pytest.fixture(autouse=True)
def allow_waiting_again() -> Iterator[None]:
    yield
    if DEVICE == "cuda":
        torch.cuda.set_sync_debug_mode("default")


def inputs(dtype, seed=0, n=70):
    """Arguments of `divergence_rows`, the student's with gradients, and the problem."""
    x = problem(n, 72, 1100, 40, bias=True, ignored=0.2, dtype=dtype, seed=seed, softcap=9.0)
    given = [t.to(DEVICE) for t in x.tensors()]
    for at in (0, 1, 5):
        given[at].requires_grad_()
    return given, x


def step(given, kind, **options):
    rows = divergence_rows(*given, kind=kind, softcap=9.0, **{"impl": "exact"} | options)
    grads = torch.autograd.grad(rows.divergence.sum(), [given[0], given[1], given[5]])
    return [rows.divergence.detach(), rows.nll.detach(), *grads]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients(kind, dtype):
    given, x = inputs(dtype)
    got = [t.cpu().double() for t in step(given, kind)]
    valid = x.targets >= 0
    want = torch.where(valid, divergence(*x.scores(), kind), 0)
    torch.testing.assert_close(got[0], want, rtol=1e-4, atol=1e-4)
    one, zero = torch.ones(70).double(), torch.zeros(70).double()
    for mine, exact in zip(got[2:], gradients(x, kind, 0.5, one, zero, zero), strict=True):
        assert (mine - exact).abs().max() <= GRADIENT[dtype] * exact.abs().max()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_runs_agree_bit_by_bit(dtype, form):
    options = FORMS[form] | ({"filter_seed": 5} if form == "sampled" else {})
    for kind in KINDS:
        first = step(inputs(dtype)[0], kind, **options)
        for _ in range(10):
            for a, b in zip(step(inputs(dtype)[0], kind, **options), first, strict=True):
                assert torch.equal(a, b), kind


@pytest.mark.card
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_waits(kind):
    given, _ = inputs(torch.bfloat16)
    step(given, kind)
    torch.cuda.set_sync_debug_mode("error")
    step(given, kind)


@pytest.mark.card
@pytest.mark.parametrize("kind", KINDS)
def test_graphs_follow_what_the_device_holds(kind):
    given, _ = inputs(torch.bfloat16)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step(given, kind)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step(given, kind)
    for seed in (1, 2, 3):
        theirs, _ = inputs(torch.bfloat16, seed)
        with torch.no_grad():
            for mine, other in zip(given, theirs, strict=True):
                mine.copy_(other)
        graph.replay()
        torch.cuda.synchronize()
        for a, b in zip(got, step(theirs, kind), strict=True):
            assert torch.equal(a, b)


@pytest.mark.card
@pytest.mark.parametrize("kind", KINDS)
def test_a_real_head(kind):
    """Gemma's vocabulary: values of rows against float64 logits on the card."""
    need_memory(12)
    g = torch.Generator(DEVICE).manual_seed(0)

    def normal(*size):
        return torch.randn(*size, generator=g, device=DEVICE, dtype=torch.bfloat16)

    e, teacher_e = normal(256, 1024), normal(256, 2304)
    c, teacher_c = normal(256_000, 1024) / 32, normal(256_000, 2304) / 48
    targets = torch.arange(256, device=DEVICE)
    rows = divergence_rows(e, c, teacher_e, teacher_c, targets, kind=kind, impl="exact")
    s, t = (a[:16].double() @ w.double().T for a, w in ((e, c), (teacher_e, teacher_c)))
    want = divergence(s, t, kind)
    torch.testing.assert_close(rows.divergence[:16].double(), want, rtol=2e-3, atol=1e-4)
