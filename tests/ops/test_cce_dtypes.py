"""bf16 and fp16 storage with fp32 arithmetic, and autocast."""

from __future__ import annotations

import pytest
import torch
from cce_oracle import GRAD_TOL, Problem, assert_close, check, expected, problem, run

HALVES = [torch.bfloat16, torch.float16]
IDS = ["bf16", "fp16"]


def eager(e, c, targets, bias=None, *, softcap=None, **_):
    """What a training loop does without this package: logits in the storage dtype, loss in fp32."""
    logits = e @ c.T
    if bias is not None:
        logits = logits + bias
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.nn.functional.cross_entropy(logits.float(), targets)


@pytest.mark.parametrize("dtype", HALVES, ids=IDS)
@pytest.mark.parametrize("d", [7, 64, 2304])
@pytest.mark.parametrize("v", [257, 1000])
@pytest.mark.parametrize("n", [1, 129])
def test_one_rounding(impl, dtype, d, v, n):
    """Against float64 on the same rounded inputs: fp32 inside, one rounding of each gradient."""
    p = problem(n, d, v, ignored=0.2, dtype=dtype, seed=1)
    options = {"softcap": 5.0, "reduction": "sum"}
    check(run(impl.loss, p, **options), expected(p, **options))


@pytest.mark.parametrize("dtype", HALVES, ids=IDS)
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_never_worse_than_eager(impl, dtype, softcap):
    p = problem(256, 512, 1024, spread=6.0, dtype=dtype, seed=2)
    truth, want = expected(p, softcap=softcap)
    loss, ours = run(impl.loss, p, softcap=softcap)
    eager_loss, theirs = run(eager, p, softcap=softcap)
    assert abs(loss - truth.loss) <= abs(eager_loss - truth.loss) + 1e-5
    for name in ours:
        error, bar = (
            (g[name].double() - want[name]).norm() / want[name].norm() for g in (ours, theirs)
        )
        assert error <= bar, f"d{name}: {error:.2e} against eager's {bar:.2e}"


def test_loss_scaling_keeps_fp16_gradients(impl):
    """p / N of a flat row is below fp16's smallest normal: the scale must come before rounding."""
    p = problem(1500, 32, 8000, spread=0.1, dtype=torch.float16, bias=False, seed=3)
    _, got = run(impl.loss, p, 4096.0)
    _, want = expected(p, 4096.0)
    for name in got:
        assert_close(got[name], want[name], rtol=GRAD_TOL[torch.float16], what=name)


@pytest.mark.parametrize("dtype", HALVES, ids=IDS)
def test_bias_dtype_may_differ(impl, dtype):
    """A head kept in half precision with its bias in fp32."""
    p = problem(20, 32, 300, dtype=dtype, seed=4)
    p.bias = torch.randn(300, generator=torch.Generator().manual_seed(1))
    (loss, got), (truth, want) = run(impl.loss, p), expected(p)
    assert_close(loss, truth.loss, rtol=5e-6)
    assert got["bias"].dtype == torch.float32
    for name in got:
        # The gradient of the logits may be rounded to the dtype of e and c on its way to all three.
        assert_close(got[name], want[name], rtol=GRAD_TOL[dtype], what=f"d{name}")


@pytest.mark.parametrize("dtype", HALVES, ids=IDS)
@pytest.mark.parametrize("mixed", [False, True], ids=["fp32", "hidden-in-half"])
def test_autocast(impl, dtype, mixed):
    """fp32 parameters under autocast: half arithmetic at worst, gradients in each leaf's dtype."""
    p = problem(40, 64, 600, ignored=0.2, seed=5)
    truth, want = expected(p, softcap=5.0)
    leaves = p.leaves()
    hidden = leaves["e"].to(dtype) if mixed else leaves["e"]
    with torch.autocast(impl.device, dtype=dtype):
        loss = impl.loss(hidden, leaves["c"], p.targets, bias=leaves["bias"], softcap=5.0)
    assert loss.dtype == torch.float32
    loss.backward()
    assert_close(loss, truth.loss, rtol=1e-3)
    for name, leaf in leaves.items():
        assert leaf.grad.dtype == torch.float32
        assert_close(leaf.grad, want[name], rtol=3e-2, what=f"d{name}")


def test_mixed_dtypes_without_autocast_are_refused(impl):
    p = problem(4, 8, 40)
    with pytest.raises(TypeError, match="c to be"):
        impl.loss(p.e.bfloat16(), p.c, p.targets)


def test_many_partial_sums_do_not_stagnate(impl):
    """A bf16 accumulator loses addends below 2^-9 of the sum; dE here sums 4000 of one sign."""
    g = torch.Generator().manual_seed(6)
    c = (1 + 0.1 * torch.randn(4000, 32, generator=g)).bfloat16()
    e = (0.01 * torch.randn(600, 32, generator=g) + 0.05).bfloat16()
    p = Problem(e, c, torch.randint(0, 4000, (600,), generator=g))
    _, got = run(impl.loss, p, reduction="sum", z_loss=0.1)
    _, want = expected(p, reduction="sum", z_loss=0.1)
    for name in got:
        assert_close(got[name], want[name], rtol=4e-3, what=name)
