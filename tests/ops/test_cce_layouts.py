"""Strided, transposed, broadcast, misaligned and very large operands."""

from __future__ import annotations

import pytest
import torch
from cce_impls import KERNELS
from cce_oracle import Problem, assert_close, check, expected, problem, run

N, D, V = 18, 40, 517


def transposed(t: torch.Tensor) -> torch.Tensor:
    return t.mT.contiguous().mT


def every_other_column(t: torch.Tensor) -> torch.Tensor:
    wide = torch.full((*t.shape[:-1], 2 * t.shape[-1]), float("nan"), dtype=t.dtype)
    wide[..., ::2] = t
    return wide[..., ::2]


def padded_rows(t: torch.Tensor) -> torch.Tensor:
    wide = torch.full((*t.shape[:-1], t.shape[-1] + 3), float("nan"), dtype=t.dtype)
    wide[..., : t.shape[-1]] = t
    return wide[..., : t.shape[-1]]


def misaligned(t: torch.Tensor) -> torch.Tensor:
    flat = torch.full((t.numel() + 1,), float("nan"), dtype=t.dtype)
    flat[1:] = t.reshape(-1)
    return flat[1:].view(t.shape)


def reversed_rows(t: torch.Tensor) -> torch.Tensor:
    """Rows of a larger tensor, taken with a stride of three."""
    tall = torch.full((3 * t.shape[0], *t.shape[1:]), float("nan"), dtype=t.dtype)
    tall[::3] = t
    return tall[::3]


LAYOUTS = [transposed, every_other_column, padded_rows, misaligned, reversed_rows]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("operand", ["e", "c", "both"])
def test_layout(impl, operand, layout, dtype):
    p = problem(N, D, V, ignored=0.2, dtype=dtype, seed=1)
    want = expected(p, softcap=5.0)
    moved = {n: layout(getattr(p, n)) for n in ("e", "c") if operand in (n, "both")}
    q = Problem(moved.get("e", p.e), moved.get("c", p.c), p.targets, p.bias)
    assert torch.equal(q.e, p.e)
    assert torch.equal(q.c, p.c)
    check(run(impl.loss, q, softcap=5.0), want)


def test_sequence_first_hidden_states(impl):
    """[T, B, D] storage seen as [B, T, D], the layout of Megatron."""
    p = problem((3, 6), D, V, seed=2)
    want = expected(p, shift=1)
    p.e = p.e.transpose(0, 1).contiguous().transpose(0, 1)
    p.targets = p.targets.T.contiguous().T
    check(run(impl.loss, p, shift=1), want)


def test_strided_labels_bias_and_weights(impl):
    p = problem(N, D, V, ignored=0.2, seed=3)
    w = torch.rand(V, generator=torch.Generator().manual_seed(1))
    tw = torch.rand(N, generator=torch.Generator().manual_seed(2))
    options = {"weight": w, "token_weights": tw}
    want = expected(p, **options)
    strided = {k: torch.stack((v, -v), 1)[:, 0] for k, v in options.items()}
    p.targets = torch.stack((p.targets, torch.full_like(p.targets, -5)), 1)[:, 0]
    p.bias = torch.stack((p.bias, -p.bias), 1)[:, 0]
    check(run(impl.loss, p, **strided), want)


def test_expanded_operands(impl):
    """Stride 0: one hidden state for all rows, one weight row for all words."""
    g = torch.Generator().manual_seed(4)
    e = torch.randn(1, D, generator=g).expand(N, D)
    c = torch.randn(V, D, generator=g) / 6
    y = torch.randint(0, V, (N,), generator=g)
    check(run(impl.loss, Problem(e, c, y)), expected(Problem(e, c, y)))
    p = Problem(torch.randn(N, D, generator=g), c[:1].expand(V, D), y, torch.randn(V, generator=g))
    check(run(impl.loss, p), expected(p), floor=1e-7)  # dE cancels: sum_v G_v is 0


def test_expanded_upstream(impl):
    """sum().backward() hands a stride-0 gradient to a per-token loss."""
    p = problem(N, D, V, seed=5)
    leaves = p.leaves()
    loss = impl.loss(leaves["e"], leaves["c"], p.targets, bias=leaves["bias"], reduction="none")
    loss.backward(torch.tensor(0.5).expand(N))
    _, want = expected(p, 0.5, reduction="none")
    for name, leaf in leaves.items():
        assert_close(leaf.grad, want[name], rtol=2e-5, what=name)


def spread_rows(t: torch.Tensor, stride: int) -> torch.Tensor:
    """Rows of ``t`` laid ``stride`` elements apart in memory that is reserved but never touched."""
    store = torch.empty((t.shape[0] - 1) * stride + t.shape[1], dtype=t.dtype)
    far = store.as_strided(t.shape, (stride, 1))
    return far.copy_(t)


@pytest.mark.parametrize("operand", ["e", "c"])
def test_rows_beyond_two_to_the_31_elements(impl, operand):
    p = problem(300, 24, 300, dtype=torch.bfloat16, seed=6)
    want = expected(p)
    setattr(p, operand, spread_rows(getattr(p, operand), 1 << 23))
    assert getattr(p, operand).stride(0) * 299 > 2**31
    check(run(impl.loss, p), want)


@pytest.mark.slow
@pytest.mark.parametrize("impl", KERNELS[-1:], ids=str, indirect=True)
def test_more_than_two_to_the_31_logits(impl):
    """N * V > 2^31 at D = 2: sixteen distinct rows, each repeated, so the oracle stays small.

    The exact form works on 512 rows at a time and never meets such an offset.
    """
    torch.set_num_threads(2)
    vocab, repeat = 1 << 15, 4100
    p = problem(16, 2, vocab, bias=False, seed=7)
    truth, want = expected(p, reduction="none")
    tall = Problem(p.e.repeat(repeat, 1), p.c, p.targets.repeat(repeat))
    assert tall.e.shape[0] * vocab > 2**31
    loss, grads = run(impl.loss, tall, 1 / repeat, reduction="none")
    assert_close(loss, truth.loss.repeat(repeat), rtol=2e-5)
    assert_close(grads["c"], want["c"], rtol=5e-5)
    assert_close(grads["e"] * repeat, want["e"].repeat(repeat, 1), rtol=5e-5)


@pytest.mark.slow
@pytest.mark.parametrize("impl", KERNELS, ids=str, indirect=True)
def test_classifier_gradient_beyond_two_to_the_31_elements(impl):
    """Overlapping windows of one vector are a [V, D] head of 4 GiB that takes 2 MiB."""
    vocab, width = (1 << 20) + 3, 2048
    g = torch.Generator().manual_seed(8)
    torch.set_num_threads(2)
    base = (torch.randn(vocab + width, generator=g) / 300).bfloat16()
    c = base.as_strided((vocab, width), (1, 1)).requires_grad_()
    e = torch.randn(2, width, generator=g).bfloat16().requires_grad_()
    y = torch.tensor([vocab - 1, 7])
    loss = impl.loss(e, c, y, reduction="sum")
    de, dc = torch.autograd.grad(loss, (e, c))
    # e . (window v of base) for all v at once is a correlation.
    kernel = torch.fft.rfft(e.detach().double(), vocab + width).conj()
    logits = torch.fft.irfft(torch.fft.rfft(base.double()) * kernel, vocab + width)[:, :vocab]
    lse = torch.logsumexp(logits, 1)
    assert_close(loss, (lse - logits[[0, 1], y]).sum(), rtol=1e-5)
    prob = torch.exp(logits - lse[:, None])
    prob[[0, 1], y] -= 1
    rows = torch.tensor([0, 7, vocab // 2, vocab - 2, vocab - 1])
    assert_close(dc[rows], prob[:, rows].T @ e.detach().double(), rtol=4e-3)
    assert_close(
        dc.sum(1, dtype=torch.float32).norm(),
        (prob.T @ e.detach().double().sum(1)).norm(),
        rtol=4e-3,
    )
    assert de.isfinite().all()
