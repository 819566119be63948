"""Exits without a head: formulas, hazards against brute force, NaN (oracle 10)."""

from __future__ import annotations

import pytest
import torch
from depth_rows import DEVICES, DTYPES, IDS, IMPLS, randn

from gemma_ext.ops.depth_batching.gates import MODES, gate_exit


def arguments(mode, n=9, width=37, dtype=torch.float32, device="cpu"):
    h, weight = randn(n, width, dtype=dtype), 0.4 * randn(width, seed=1)
    previous = (h.float() + 0.3 * randn(n, width, seed=2)).to(dtype)
    given = {"bias": 0.25, "weight": weight.to(dtype).to(device)}
    if mode == "hazard":
        given["survival"] = torch.rand(n, generator=torch.Generator().manual_seed(4)).to(device)
    if mode in ("cosine", "latent_diff"):
        given = {"previous": previous.to(device)}
    return h.to(device), given


def score_of(mode, h, weight=None, bias=0.0, previous=None, survival=None):
    h = h.cpu().double()
    if mode == "cosine":
        return torch.cosine_similarity(h, previous.cpu().double(), dim=-1)
    if mode == "latent_diff":
        return (h - previous.cpu().double()).norm(dim=-1) / h.norm(dim=-1)
    p = torch.sigmoid(h @ weight.cpu().double() + bias)
    return p if mode == "gate" else 1 - survival.cpu().double() * (1 - p)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("impl", IMPLS)
def test_scores_and_exits(impl, mode, dtype, device):
    for n, width in ((1, 1), (9, 37), (5, 300)):
        h, given = arguments(mode, n, width, dtype, device)
        want = score_of(mode, h, **given)
        below = mode == "latent_diff"
        odd = torch.arange(n) % 2 == 1
        limit = want + torch.where(odd, -1e-3, 1e-3) * (-1 if below else 1)
        got = gate_exit(h, mode, limit.float().to(device), **given, impl=impl)
        torch.testing.assert_close(got.scores.double().cpu(), want, rtol=1e-5, atol=1e-6)
        assert torch.equal(got.exits.cpu(), odd)
        assert (got.survival is not None) == (mode == "hazard")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("device", DEVICES)
def test_hazards_against_brute_force(impl, device):
    """The CDF of leaving by loop j is the sum of lambda_i prod_{k<i} (1 - lambda_k)."""
    n, width, loops = 12, 20, 5
    hs = [randn(n, width, seed=j).to(device) for j in range(loops)]
    weight = 0.3 * randn(width, seed=9).to(device)
    hazard = torch.stack([torch.sigmoid(h.cpu().double() @ weight.cpu().double()) for h in hs])
    survival = torch.ones(n, device=device)
    gone = torch.zeros(n, dtype=torch.bool)
    mass = torch.zeros(n, dtype=torch.float64)
    for j, h in enumerate(hs):
        last = torch.full((n,), j == loops - 1, device=device)
        got = gate_exit(h, "hazard", 0.9, weight=weight, survival=survival, last=last, impl=impl)
        mass = mass + hazard[j] * (1 - hazard[:j]).prod(0)
        torch.testing.assert_close(got.scores.double().cpu(), mass, rtol=1e-5, atol=1e-6)
        assert torch.equal(got.exits.cpu(), (mass >= 0.9) | (j == loops - 1))
        gone |= got.exits.cpu()
        survival = got.survival
    assert bool(gone.all())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("mode", MODES)
def test_nan_never_leaves_but_at_the_last_loop(mode, impl):
    h, given = arguments(mode)
    h[3, 2] = torch.nan
    limit = torch.full((9,), 1e9 if mode == "latent_diff" else -1e9)
    got = gate_exit(h, mode, limit, **given, impl=impl)
    assert got.exits.tolist() == [i != 3 for i in range(9)]
    last = torch.arange(9) == 3
    assert bool(gate_exit(h, mode, limit, **given, last=last, impl=impl).exits.all())


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_of_zeros_do_not_leave(impl):
    zero = torch.zeros(2, 4)
    assert not gate_exit(zero, "cosine", -2.0, previous=zero, impl=impl).exits.any()
    assert not gate_exit(zero, "latent_diff", 9.0, previous=zero, impl=impl).exits.any()


@pytest.mark.parametrize("impl", IMPLS)
def test_at_the_threshold(impl):
    h = torch.tensor([[3.0, 4.0]])
    for mode, limit, given, by_default in (
        ("gate", 0.5, {"weight": torch.zeros(2)}, True),
        ("hazard", 0.5, {"weight": torch.zeros(2), "survival": torch.ones(1)}, True),
        ("cosine", 1.0, {"previous": h}, False),
        ("latent_diff", 0.0, {"previous": h}, False),
    ):
        for strict, leaves in ((None, by_default), (True, False), (False, True)):
            got = gate_exit(h, mode, limit, **given, strict=strict, impl=impl)
            assert got.exits.item() == leaves, (mode, strict)


@pytest.mark.parametrize("impl", IMPLS)
def test_large_scores_saturate(impl):
    h = torch.tensor([[1.0], [-1.0]])
    got = gate_exit(h, "gate", 0.5, weight=torch.tensor([1e4]), impl=impl)
    assert got.scores.tolist() == pytest.approx([1.0, 0.0])
    kept = gate_exit(
        h, "hazard", 0.5, weight=torch.tensor([20.0]), survival=torch.ones(2), impl=impl
    )
    assert kept.survival[0].item() == pytest.approx(2.0611537e-09, rel=1e-5)


def test_strided_rows_and_none():
    h, given = arguments("gate", 8, 40)
    for x in (h[::2], h.T.contiguous().T[::2]):
        assert torch.equal(
            gate_exit(x, "gate", 0.5, **given).scores,
            gate_exit(h, "gate", 0.5, **given).scores[::2],
        )
    assert gate_exit(h[:0], "gate", 0.5, **given).exits.shape == (0,)


H, W = torch.randn(2, 8), torch.randn(8)
LAST = torch.ones(2, dtype=torch.bool)
MESSAGES = {
    "expected h to be [n, D], got [8]": lambda: gate_exit(H[0], "gate", 0.5, weight=W),
    "expected mode to be gate, hazard, cosine or latent_diff, got 'kl'": lambda: gate_exit(
        H, "kl", 0.5
    ),
    "expected a threshold with mode='gate', got None": lambda: gate_exit(H, "gate", None, weight=W),
    "expected a weight with mode='gate', got None": lambda: gate_exit(H, "gate", 0.5),
    "expected no weight with mode='cosine', got one": lambda: gate_exit(
        H, "cosine", 0.5, weight=W, previous=H
    ),
    "expected a previous with mode='cosine', got None": lambda: gate_exit(H, "cosine", 0.5),
    "expected a survival with mode='hazard', got None": lambda: gate_exit(
        H, "hazard", 0.5, weight=W
    ),
    "expected no survival with mode='gate', got one": lambda: gate_exit(
        H, "gate", 0.5, weight=W, survival=torch.ones(2)
    ),
    "expected no bias with mode='cosine', got one": lambda: gate_exit(
        H, "cosine", 0.5, previous=H, bias=0.1
    ),
    "expected weight to be [8], got [7]": lambda: gate_exit(H, "gate", 0.5, weight=W[1:]),
    "expected previous to be [2, 8], got [1, 8]": lambda: gate_exit(
        H, "cosine", 0.5, previous=H[:1]
    ),
    "expected last to be [2], got [1]": lambda: gate_exit(H, "gate", 0.5, weight=W, last=LAST[:1]),
    "expected impl to be 'auto' or 'reference', got 'x'": lambda: gate_exit(
        H, "gate", 0.5, weight=W, impl="x"
    ),
}


@pytest.mark.parametrize("message", MESSAGES)
def test_what_does_not_fit(message):
    with pytest.raises(ValueError) as caught:
        MESSAGES[message]()
    assert message in str(caught.value)


def test_types_that_do_not_fit():
    with pytest.raises(TypeError, match=r"expected weight in torch\.float32"):
        gate_exit(H, "gate", 0.5, weight=W.half())
    with pytest.raises(TypeError, match=r"expected last in torch\.bool"):
        gate_exit(H, "gate", 0.5, weight=W, last=LAST.int())


def test_no_derivatives():
    with pytest.raises(NotImplementedError, match="has no derivative"):
        gate_exit(H.clone().requires_grad_(), "gate", 0.5, weight=W).scores.sum().backward()
    wide, w = H.double().requires_grad_(), W.double()
    assert torch.autograd.gradcheck(lambda h: gate_exit(h, "gate", 0.5, weight=w).scores, (wide,))
