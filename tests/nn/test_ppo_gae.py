"""Advantages with a critic: hand-computed values, identities, and what must not leak."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gemma_ext.nn.ppo import packed_gae, padded, padded_gae, rows_of, sequence_sum, spread, whiten

R = torch.tensor([-0.01, -0.02, 1.0], dtype=torch.float64)
V = torch.tensor([0.5, 0.6, 0.7], dtype=torch.float64)
WHOLE = torch.tensor([3])


def stepwise(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """The formula of one response, token by token."""
    advantages, after, following = torch.zeros_like(rewards), 0.0, 0.0
    for t in reversed(range(len(rewards))):
        after = rewards[t] + gamma * following - values[t] + gamma * lam * after
        advantages[t], following = after, values[t]
    return advantages, advantages + values


def test_hand_computed():
    advantages, returns = packed_gae(R, V, WHOLE)
    assert advantages.tolist() == pytest.approx([0.43675, 0.365, 0.3], abs=1e-12)
    assert returns.tolist() == pytest.approx([0.93675, 0.965, 1.0], abs=1e-12)


def test_lambda_one_is_monte_carlo_and_lambda_zero_one_step():
    advantages, returns = packed_gae(R, V, WHOLE, lam=1.0)
    monte_carlo = torch.tensor([0.97, 0.98, 1.0], dtype=torch.float64)
    torch.testing.assert_close(returns, monte_carlo)
    torch.testing.assert_close(advantages, monte_carlo - V)
    one_step = R + 0.9 * torch.tensor([0.6, 0.7, 0.0], dtype=torch.float64) - V
    torch.testing.assert_close(packed_gae(R, V, WHOLE, lam=0.0, gamma=0.9)[0], one_step)


@given(
    lengths=st.lists(st.integers(0, 37), max_size=6),
    gamma=st.sampled_from([0.0, 0.9, 1.0]),
    lam=st.sampled_from([0.0, 0.95, 1.0]),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=60)
def test_packed_equals_the_formula(lengths, gamma, lam, seed):
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(2, n, generator=generator, dtype=torch.float64) for n in lengths]
    rewards, values = torch.cat([torch.zeros(2, 0).double(), *parts], 1)
    found = packed_gae(rewards, values, torch.tensor(lengths).long(), gamma=gamma, lam=lam)
    singles = [stepwise(*part, gamma, lam) for part in parts]
    for i in range(2):
        expected = torch.cat([torch.zeros(0).double(), *(single[i] for single in singles)])
        torch.testing.assert_close(found[i], expected, atol=1e-11, rtol=1e-11)


def test_a_response_does_not_see_its_neighbours_nor_the_padding():
    lengths = torch.tensor([5, 1, 9])
    rewards, values = torch.randn(2, 15)
    packed = packed_gae(rewards, values, lengths)
    alone = packed_gae(rewards[5:6], values[5:6], torch.tensor([1]))
    assert torch.equal(packed[0][5:6], alone[0])
    last = packed_gae(rewards[6:], values[6:], torch.tensor([9]))
    assert torch.equal(packed[0][6:], last[0])
    for width in (9, 14):
        mask = torch.arange(width) < lengths[:, None]
        poison = torch.full(mask.shape, float("nan"))
        wide = padded_gae(
            poison.masked_scatter(mask, rewards), poison.masked_scatter(mask, values), mask
        )
        for found, expected in zip(wide, packed, strict=True):
            assert torch.equal(found[mask], expected)
            assert (found[~mask] == 0).all()


def test_an_infinite_value_stays_in_its_response():
    values = torch.tensor([1.0, 2.0, float("inf"), 3.0])
    advantages, _ = packed_gae(torch.zeros(4), values, torch.tensor([2, 2]))
    assert advantages[:2].isfinite().all()


def test_a_masked_tool_answer_is_passed_over():
    mask = torch.tensor([[True, False, False, True, True, False]])
    rewards, values = torch.randn(2, 1, 6)
    found, _ = padded_gae(rewards, values, mask)
    expected, _ = stepwise(rewards[mask], values[mask], 1.0, 0.95)
    torch.testing.assert_close(found[mask], expected)


def test_dtypes_gradients_and_nothing():
    advantages, returns = packed_gae(R.bfloat16(), V.bfloat16().requires_grad_(), WHOLE)
    assert advantages.dtype == returns.dtype == torch.float32
    assert not returns.requires_grad
    empty = packed_gae(torch.zeros(0), torch.zeros(0), torch.tensor([0, 0]))
    assert [x.shape for x in empty] == [(0,), (0,)]
    strided = torch.randn(3, 2)
    torch.testing.assert_close(
        packed_gae(strided[:, 0], strided[:, 1], WHOLE),
        packed_gae(strided[:, 0].contiguous(), strided[:, 1].contiguous(), WHOLE),
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: packed_gae(R, V[:2], WHOLE), r"expected rewards and values to be \[N\]"),
        (lambda: packed_gae(R, V, torch.tensor([2])), r"with sum N = 3, got the sum 2"),
        (lambda: packed_gae(R, V, torch.tensor([4, -1])), r"lengths >= 0 with sum N = 3"),
        (lambda: packed_gae(R, V, torch.tensor([3.0])), r"lengths to be int32 or int64"),
        (lambda: packed_gae(R, V, WHOLE, gamma=1.1), r"expected gamma in \[0, 1\], got 1.1"),
        (lambda: packed_gae(R, V, WHOLE, lam=-1), r"expected lam in \[0, 1\], got -1"),
        (lambda: padded_gae(R, V, R > 0), r"expected rewards, values and mask to be \[B, T\]"),
        (lambda: spread(R, WHOLE), r"expected x to be \[1\], got \[3\]"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_packing():
    lengths = torch.tensor([2, 0, 3], dtype=torch.int32)
    assert rows_of(lengths).tolist() == [0, 0, 2, 2, 2]
    assert spread(torch.tensor([1.0, 2.0, 3.0]), lengths).tolist() == [1, 1, 3, 3, 3]
    x = torch.arange(5.0, requires_grad=True)
    total = sequence_sum(x, lengths)
    assert total.tolist() == [1, 0, 9]
    (total * torch.tensor([1.0, 5.0, 2.0])).sum().backward()
    assert x.grad.tolist() == [1, 1, 2, 2, 2]
    mask = torch.tensor([[True, True, False], [False] * 3, [True] * 3])
    assert padded(x.detach(), mask, fill=-1).tolist() == [[0, 1, -1], [-1, -1, -1], [2, 3, 4]]


def test_whitening_by_hand():
    advantages, _ = packed_gae(R, V, WHOLE)
    for unbiased, expected in (
        (True, [1.0160398, -0.0328934, -0.9831464]),
        (False, [1.2443889, -0.0402860, -1.2041029]),
    ):
        found = whiten(advantages, unbiased=unbiased)
        torch.testing.assert_close(found, torch.tensor(expected).double(), atol=5e-7, rtol=0)


def test_whitening_of_padded_tokens():
    x, mask = torch.randn(4, 7), torch.rand(4, 7) < 0.6
    poisoned = x.masked_fill(~mask, float("nan"))
    found = whiten(poisoned, mask)
    torch.testing.assert_close(found[mask], whiten(x[mask]))
    assert (found[~mask] == 0).all()
    torch.testing.assert_close(found[mask].std(), torch.tensor(1.0))
    kept = whiten(x[mask] + 3, shift_mean=False)
    torch.testing.assert_close(kept.mean(), x[mask].mean() + 3)


def test_whitening_of_little():
    assert whiten(torch.zeros(0)).shape == (0,)
    assert whiten(torch.tensor([2.5])).tolist() == [0]
    with pytest.raises(ValueError, match=r"expected mask to be bool \[3\], got torch.int64 \[3\]"):
        whiten(R, torch.ones(3, dtype=torch.int64))
