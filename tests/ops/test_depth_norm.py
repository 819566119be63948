"""RMS norms of rows of the hidden bank."""

from __future__ import annotations

import pytest
import torch
from depth_rows import DEVICES, DTYPES, IDS, IMPLS, UNIT, randn

from gemma_ext.ops.depth_batching.norm import gather_rms_norm, scatter_rms_norm

EPS = 1e-6


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def by_hand(x, weight, *, plus_one=False, eps=EPS):
    x, w = x.double(), weight.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * (1 + w if plus_one else w)


def close(got, want, scale=1.0):
    bound = UNIT[got.dtype] * 1.01 * want.abs() + 2e-6 * want.abs() + 1e-7 * scale
    assert bool(((got.double().cpu() - want).abs() <= bound).all())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("width", [1, 15, 16, 64, 100, 2304])
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("bank_dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("impl", IMPLS)
def test_gather(impl, bank_dtype, dtype, width, device):
    bank = 3 * randn(9, width, dtype=bank_dtype).to(device)
    weight = randn(width, seed=1, dtype=dtype).to(device)
    slots = ints(4, 0, -1, 8, 4).to(device)
    for plus_one in (False, True):
        got = gather_rms_norm(bank, slots, weight, eps=EPS, plus_one=plus_one, impl=impl)
        assert got.dtype == dtype
        close(got[[0, 1, 3, 4]], by_hand(bank[[4, 0, 8, 4]].cpu(), weight.cpu(), plus_one=plus_one))
        assert bool((got[2] == 0).all())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("bank_dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("impl", IMPLS)
def test_scatter(impl, bank_dtype, dtype, device):
    width = 37
    before = randn(7, width, dtype=bank_dtype)
    y = randn(4, width, seed=2, dtype=dtype)
    weight, after = (randn(width, seed=s, dtype=dtype) for s in (3, 4))
    slots = ints(5, -1, 0, 2)
    own = [0, 2, 3]
    for given, plus_one in ((None, False), (weight, True), (weight, False)):
        bank = before.clone().to(device)
        step = y.double() if given is None else by_hand(y, given, plus_one=plus_one)
        got = scatter_rms_norm(
            bank,
            slots.to(device),
            y.to(device),
            None if given is None else given.to(device),
            next_weight=after.to(device),
            eps=EPS,
            plus_one=plus_one,
            impl=impl,
        )
        at = slots[own].long()
        close(bank.cpu()[at], before[at].double() + step[own], scale=20)
        untouched = [1, 3, 4, 6]
        assert torch.equal(bank.cpu()[untouched], before[untouched])
        want = gather_rms_norm(
            bank, slots.to(device), after.to(device), eps=EPS, plus_one=plus_one, impl=impl
        )
        assert torch.equal(got, want)
        assert bool((got[1] == 0).all())


def test_scatter_alone_returns_nothing():
    bank = torch.zeros(3, 4)
    assert scatter_rms_norm(bank, ints(1), torch.ones(1, 4)) is None
    assert torch.equal(bank, torch.tensor([[0.0], [1.0], [0.0]]).expand(3, 4))


def test_rows_of_a_larger_tensor():
    bank, wide = torch.zeros(3, 10), randn(4, 25)
    scatter_rms_norm(bank, ints(2, 0), wide[::2, 5:15])
    assert torch.equal(bank[[2, 0]], wide[::2, 5:15])
    columns = randn(10, 2).T
    scatter_rms_norm(bank.zero_(), ints(2, 0), columns)
    assert torch.equal(bank[[2, 0]], columns)
    strided = randn(6, 20)[::2, ::2]
    want = gather_rms_norm(strided.contiguous(), ints(1), torch.ones(10))
    assert torch.equal(gather_rms_norm(strided, ints(1), torch.ones(10)), want)


def test_a_row_has_its_bits_alone():
    bank, weight = randn(200, 333), randn(333, seed=1)
    slots = torch.randperm(200).int()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(gather_rms_norm(bank, slots, weight))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    for i in (0, 7, 199):
        assert torch.equal(gather_rms_norm(bank, slots[i : i + 1], weight)[0], results[0][i])


def test_no_rows():
    bank = torch.randn(3, 5)
    assert gather_rms_norm(bank, ints(), torch.ones(5)).shape == (0, 5)
    got = scatter_rms_norm(bank, ints(), torch.empty(0, 5), next_weight=torch.ones(5))
    assert got.shape == (0, 5)


BANK, W = torch.randn(3, 5), torch.ones(5)
MESSAGES = {
    "expected bank to be [S, D], got [5]": lambda: gather_rms_norm(BANK[0], ints(0), W),
    "expected slots to be [2], got [2, 1]": lambda: gather_rms_norm(
        BANK, ints(0, 1).unsqueeze(1), W
    ),
    "expected weight to be [5], got [4]": lambda: gather_rms_norm(BANK, ints(0), W[1:]),
    "expected y to be [1, 5], got [2, 5]": lambda: scatter_rms_norm(
        BANK.clone(), ints(0), torch.ones(2, 5)
    ),
    "expected next_weight to be [5], got [1]": lambda: scatter_rms_norm(
        BANK.clone(), ints(0), torch.ones(1, 5), next_weight=W[:1]
    ),
    "expected bank to be contiguous: it is written in place": lambda: scatter_rms_norm(
        torch.zeros(5, 3).T, ints(0), torch.ones(1, 5)
    ),
    "expected slots on cpu, got it on meta": lambda: gather_rms_norm(BANK, ints(0).to("meta"), W),
    "expected impl to be 'auto' or 'reference', got 'x'": lambda: gather_rms_norm(
        BANK, ints(0), W, impl="x"
    ),
}


@pytest.mark.parametrize("message", MESSAGES)
def test_what_does_not_fit(message):
    with pytest.raises(ValueError) as caught:
        MESSAGES[message]()
    assert message in str(caught.value)


def test_types_that_do_not_fit():
    with pytest.raises(TypeError, match=r"expected bank to be float32, .* got torch\.int64"):
        gather_rms_norm(BANK.long(), ints(0), W)
    with pytest.raises(TypeError, match=r"expected slots in torch\.int32"):
        gather_rms_norm(BANK, ints(0).long(), W)
    with pytest.raises(TypeError, match=r"expected weight to be float32, .* got torch\.float64"):
        gather_rms_norm(BANK, ints(0), W.double())


@pytest.mark.cpu
def test_slots_that_do_not_fit():
    with pytest.raises(RuntimeError, match=r"expected slots in \[-2147483648, 3\), got 3 at 1"):
        gather_rms_norm(BANK, ints(0, 3), W)
    with pytest.raises(RuntimeError, match=r"expected slots that differ .* got 2 at 1"):
        scatter_rms_norm(BANK.clone(), ints(2, 2), torch.ones(2, 5))


def test_no_derivatives():
    weight = W.clone().requires_grad_()
    with pytest.raises(NotImplementedError, match="has no derivative"):
        gather_rms_norm(BANK, ints(0), weight).sum().backward()
    wide = torch.ones(5, dtype=torch.float64, requires_grad=True)
    bank = BANK.double()
    assert torch.autograd.gradcheck(lambda w: gather_rms_norm(bank, ints(0, 2), w), (wide,))
