"""Rows without an upstream gradient: not read by the backward, and as if they were not there."""

from __future__ import annotations

import pytest
import torch
from cce_impls import DEVICES
from cce_oracle import IGNORE, problem
from logprobs_oracle import policy
from torch import Tensor

import gemma_ext

MODES = {
    "exact": {"impl": "exact"},
    "auto": {"impl": "auto"},
    "sampled": {"impl": "cce", "filter_eps": 2.0**-7},
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def idle(n: int) -> Tensor:
    """[N] of which rows an upstream gradient is 0: whole blocks of rows, and single ones."""
    rows = torch.arange(n)
    return (rows < n // 3) | (rows % 3 == 0)


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    return request.param


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("share", ["some", "all"])
def test_rows_without_a_gradient_are_not_swept(device, mode, dtype, share):
    """What they hold after the forward is NaN, which any product with it would spread."""
    n, d, v = 300, 40, 700
    p = problem(n, d, v, dtype=dtype, seed=1)
    e, c, bias, y = (x.to(device) for x in (p.e, p.c, p.bias, p.targets))
    leaves = [x.requires_grad_() for x in (e, c, bias)]
    off = (idle(n) if share == "some" else torch.ones(n, dtype=torch.bool)).to(device)
    g = torch.Generator().manual_seed(2)
    u, h = torch.randn(2, n, generator=g).to(device).masked_fill(off, 0.0)

    def backward(poisoned: bool) -> list[Tensor]:
        logp, entropy = gemma_ext.linear_logprobs(e, c, y, bias=bias, softcap=9.0, **MODES[mode])
        total = (u * logp + h * entropy).sum()
        kept = e.detach().clone()
        if poisoned:
            e.data[off] = torch.nan
        grads = torch.autograd.grad(total, leaves)
        e.data.copy_(kept)
        return list(grads)

    clean, poisoned = backward(False), backward(True)
    for a, b in zip(clean, poisoned, strict=True):
        assert torch.isfinite(b).all()
        assert torch.equal(a, b)
    assert not clean[0][off].any()
    assert clean[0].any() == (share == "some")


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_rows_without_a_gradient_are_not_swept_by_two_heads(device, dtype):
    n = 200
    p = policy(n, 24, 600, dtype=dtype, bias=False, seed=3)
    e, c, ref_e, ref_c, y = (x.to(device) for x in (p.e, p.c, p.ref_e, p.ref_c, p.targets))
    leaves, off = [e.requires_grad_(), c.requires_grad_()], idle(n).to(device)
    u = torch.randn(n, generator=torch.Generator().manual_seed(4)).to(device).masked_fill(off, 0.0)
    out = gemma_ext.linear_logprobs(
        e, c, y, kl="full", ref_e=ref_e, ref_c=ref_c, return_entropy=False, impl="exact"
    )
    total = (u * out.kl + u * out.logprobs).sum()
    with torch.no_grad():
        for x in (e, ref_e):
            x.data[off] = torch.nan
    grads = torch.autograd.grad(total, leaves)
    assert all(torch.isfinite(x).all() for x in grads)
    assert not grads[0][off].any()


@pytest.mark.parametrize("mode", MODES)
def test_they_are_as_if_ignored(device, mode):
    """Also to what a sampled backward draws: its threshold does not know how many there are."""
    n = 260
    p = problem(n, 32, 900, dtype=torch.bfloat16, seed=5)
    e, c, y = (x.to(device) for x in (p.e, p.c, p.targets))
    e, c = e.requires_grad_(), c.requires_grad_()
    off = idle(n).to(device)
    u = torch.rand(n, generator=torch.Generator().manual_seed(6)).to(device).masked_fill(off, 0.0)
    options = {"filter_eps": 2.0**-7, **MODES[mode]} if mode == "auto" else MODES[mode]
    found = []
    for targets in (y, y.masked_fill(off, IGNORE)):
        logp, _ = gemma_ext.linear_logprobs(e, c, targets, **options)
        found.append(torch.autograd.grad((u * logp).sum(), (e, c)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-5)
    # a row's draw is its own
    assert torch.equal(found[0][0].any(1), found[1][0].any(1))


def test_the_forward_does_not_know_of_it(device):
    p = problem(50, 24, 300, seed=7)
    e, c, y = (x.to(device) for x in (p.e, p.c, p.targets))
    with torch.no_grad():
        want = gemma_ext.linear_logprobs(e, c, y)
    e.requires_grad_()
    got = gemma_ext.linear_logprobs(e, c, y)
    (0.0 * got[0]).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert not e.grad.any()


def test_a_gradient_that_is_not_a_number_is_no_zero(device):
    p = problem(30, 16, 300, seed=8)
    e, c, y = (x.to(device) for x in (p.e, p.c, p.targets))
    e.requires_grad_()
    u = torch.zeros(30, device=device)
    u[4] = torch.nan
    logp, _ = gemma_ext.linear_logprobs(e, c, y, impl="exact")
    (grad,) = torch.autograd.grad(logp, e, u)
    assert torch.isnan(grad[4]).any()
    assert not grad[5:].any()


def test_a_frozen_head_has_no_gradient_and_none_is_computed(device):
    """As under LoRA of the backbone: the backward is asked for dE alone."""
    p = problem(20, 16, 300, bias=True, seed=9)
    e, c, bias, y = (x.to(device) for x in (p.e, p.c, p.bias, p.targets))
    e.requires_grad_()
    asked: list[tuple[bool, bool, bool]] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "backward" in func.__name__:
                names = [a.name for a in func._schema.arguments]
                given = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
                asked.append(tuple(given[f"need_{x}"] for x in ("e", "c", "bias")))
            return func(*args, **(kwargs or {}))

    out = gemma_ext.linear_logprobs(e, c, y, bias=bias, kl="full", ref_e=e.detach() + 0.1, ref_c=c)
    with Watch():
        (out.logprobs.sum() + out.entropy.sum() + out.kl.sum()).backward()
    assert asked == [(True, False, False)] * 2
    assert c.grad is None
    assert torch.isfinite(e.grad).all()
