"""Loss and every gradient against float64 over the shapes where indexing goes wrong."""

from __future__ import annotations

import pytest
import torch
from cce_oracle import check, expected, problem, run, scores

# 1 and 2: degenerate; 255, 256, 257: around one vocabulary tile; 1000: several and a ragged one.
VOCABS = [1, 2, 255, 256, 257, 1000]
# 7, 64, 257: odd, aligned, one beyond a block; 2304 is Gemma 2's width, where a per-chunk mistake
# (a bias added once per 256 columns) shows.
WIDTHS = [1, 7, 64, 257, 2304]
# 0: empty; 14, 15: around a vector of rows less one; 129: one beyond a row block.
ROWS = [0, 1, 7, 14, 15, 129]


@pytest.mark.parametrize("n", ROWS)
@pytest.mark.parametrize("v", VOCABS)
@pytest.mark.parametrize("d", WIDTHS)
def test_capped_with_bias(impl, d, v, n):
    p = problem(n, d, v, ignored=0.2)
    options = {"softcap": 5.0, "reduction": "sum"}
    check(run(impl.loss, p, **options), expected(p, **options))


@pytest.mark.parametrize("n", [1, 15, 129])
@pytest.mark.parametrize("v", [2, 257, 1000])
@pytest.mark.parametrize("d", [7, 257, 2304])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_plain(impl, reduction, d, v, n):
    p = problem(n, d, v, bias=False, ignored=0.3, seed=1)
    p.targets[0] = v - 1
    check(run(impl.loss, p, reduction=reduction), expected(p, reduction=reduction))


@pytest.mark.parametrize("bias", [False, True], ids=["nobias", "bias"])
@pytest.mark.parametrize("d", [257, 2304])
def test_logits_far_beyond_the_cap(impl, d, bias):
    """|a| up to several caps: an accurate tanh, the bias inside it, its derivative in G."""
    p = problem(33, d, 777, spread=40.0, bias=bias, seed=2)
    assert scores(p.e, p.c, p.bias).abs().max() > 120
    # fp32 logits of size 100 carry errors of 1e-5, which the softmax passes on as they are.
    check(run(impl.loss, p, softcap=30.0), expected(p, softcap=30.0), scale=5)


@pytest.mark.parametrize("shape", [(), (3,), (2, 5), (2, 3, 4), (2, 0), (1, 1)])
def test_leading_shapes(impl, shape):
    p = problem(shape, 16, 300)
    for reduction in ("none", "sum"):
        got = run(impl.loss, p, reduction=reduction)
        check(got, expected(p, reduction=reduction))
        assert got[0].shape == (shape if reduction == "none" else ())
        assert got[1]["e"].shape == (*shape, 16)


def test_loss_is_float32_whatever_the_inputs(impl):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        p = problem(3, 8, 20, dtype=dtype)
        loss, grads = run(impl.loss, p)
        assert loss.dtype == torch.float32
        assert {g.dtype for g in grads.values()} == {dtype}


# More rows than one step of the fused form (512) and more strips than one batch of the filtered
# one (4 MiB); wide and narrow, so that 16-bit dC is written at once and through a running sum.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("d", "v"), [(17, 2000), (1030, 300)])
@pytest.mark.parametrize("n", [513, 1100])
def test_several_steps(impl, n, d, v, dtype):
    torch.set_num_threads(2)
    p = problem(n, d, v, ignored=0.05, dtype=dtype, seed=4)
    check(run(impl.loss, p, softcap=5.0), expected(p, softcap=5.0))
