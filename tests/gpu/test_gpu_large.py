"""Sizes of real heads: more than 2^31 logits, more than 2^31 weights, several chunks of strips."""

from __future__ import annotations

import pytest
import torch
from gpu_problem import DTYPES, EXACT, Outcome, Problem, check, need_memory, ours, problem
from gpu_problem import truth as small_truth

from gemma_ext.bench.data import head_data
from gemma_ext.reference import cce as reference

ROWS = 512  # tokens whose float64 logits are held at a time


def truth(p: Problem, **options: object) -> Outcome:
    """Float64 loss and gradients, a few rows at a time."""
    c = p.c.double().requires_grad_()
    loss, de = torch.zeros((), device=c.device, dtype=torch.float64), []
    for e, targets in zip(p.e.split(ROWS), p.targets.split(ROWS), strict=True):
        e = e.double().requires_grad_()
        part = reference.linear_cross_entropy(e, c, targets, reduction="sum", **options)
        part.backward()
        loss += part.detach()
        de.append(e.grad)
    return {"loss": loss, "de": torch.cat(de), "dc": c.grad}


def on_card(n: int, d: int, v: int, dtype: torch.dtype) -> Problem:
    """Random inputs, made where they are used."""
    g = torch.Generator("cuda").manual_seed(1)
    e = torch.randn(n, d, generator=g, device="cuda", dtype=dtype)
    c = torch.randn(v, d, generator=g, device="cuda", dtype=dtype).mul_(3.0 / d**0.5)
    return Problem(e, c, torch.randint(v, (n,), generator=g, device="cuda"))


@pytest.mark.parametrize("form", EXACT)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strips_in_several_chunks(dtype, form, monkeypatch):
    """One megabyte holds the strips of a few tiles."""
    p = problem(300, 72, 6000, dtype)
    options = EXACT[form] | {"softcap": 30.0}
    monkeypatch.setenv("GEMMA_EXT_CCE_WORKSPACE_MB", "1")
    check(ours(p, **options), small_truth(p, **options))


@pytest.mark.card
@pytest.mark.parametrize("form", ["fused", "kept"])
def test_more_than_two_to_the_31_logits(form):
    need_memory(20)
    p = on_card(16403, 64, 262147, torch.bfloat16)
    p.targets[-1] = 262146
    options = {"reduction": "sum", "softcap": 30.0} | EXACT[form]
    check(ours(p, **options), truth(p, softcap=30.0))


@pytest.mark.card
def test_more_than_two_to_the_31_weights():
    need_memory(110)
    p = on_card(65, 2304, 940_003, torch.bfloat16)
    p.targets[0], p.targets[-1] = 940_002, 0
    check(ours(p, impl="exact"), truth(p))


@pytest.mark.card
def test_the_head_of_gemma_2():
    """N=8192, D=2304, V=256000 on rows like those of a trained model, exact and sampled."""
    need_memory(60)
    data = head_data("plaw-2.5", 8192, 2304, 256000, device="cuda")
    p = Problem(data.e.bfloat16(), data.c.bfloat16(), data.targets)
    del data
    want = truth(p, softcap=30.0)
    check(ours(p, impl="exact", softcap=30.0), want)
    sampled = ours(p, impl="cce", softcap=30.0)
    for name in ("de", "dc"):
        # twice what "auto" allows
        assert (sampled[name].double() - want[name]).norm() < 2.0**-5 * want[name].norm()


@pytest.mark.card
@pytest.mark.parametrize("form", EXACT)
def test_a_small_workspace_at_a_real_width(form, monkeypatch):
    """64 MB where all strips take 500: the backward goes through eight chunks or more."""
    need_memory(20)
    p = on_card(1000, 2304, 256000, torch.bfloat16)
    monkeypatch.setenv("GEMMA_EXT_CCE_WORKSPACE_MB", "64")
    options = {"reduction": "sum", "softcap": 30.0} | EXACT[form]
    got = ours(p, **options)
    got["loss"] = got["loss"].sum()
    check(got, truth(p, softcap=30.0))
