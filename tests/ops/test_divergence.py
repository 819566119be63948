"""Values and gradients of the divergence of two heads against float64, on every device there is."""

from __future__ import annotations

import sys

import pytest
import torch
from cce_impls import DEVICES
from cce_oracle import IGNORE
from divergence_oracle import (
    KINDS,
    Problem,
    divergence,
    gradients,
    problem,
    score_gradient,
    walks,
)
from torch import Tensor

from gemma_ext.ops.cce.divergence import divergence_rows

# one of everything; a tile and one more; several tiles, odd sizes; more rows than any block
SHAPES = [(1, 1, 1, 3), (3, 8, 257, 16), (37, 33, 1000, 70), (300, 64, 513, 40)]
MAPS = [
    {},
    {"softcap": 5.0, "temperature": 0.7, "logit_scale": 1.3},
    {"softcap": 4.0, "teacher_softcap": None, "teacher_temperature": 2.0},
]
# tensor cores multiply float32 as split bfloat16
SPLIT = torch.cuda.is_available() or "device_code" in sys.modules
ROUNDING = 2.0**-14 if SPLIT else 64 * 2.0**-24
EPS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def run(x: Problem, kind: str, beta: float = 0.5, *, device: str = "cpu", impl: str = "exact", **o):
    """(rows, (dE, dC, dbias), upstream gradients) of random upstream gradients."""
    moved = [t.to(device) if isinstance(t, Tensor) else t for t in x.tensors()]
    e, c, bias = (None if moved[i] is None else moved[i].requires_grad_() for i in (0, 1, 5))
    moved[0], moved[1], moved[5] = e, c, bias
    rows = divergence_rows(*moved, kind=kind, beta=beta, impl=impl, **x.maps, **o)
    g = torch.Generator().manual_seed(1)
    up = [torch.randn(e.shape[0], generator=g, dtype=torch.float64) for _ in range(3)]
    loss = sum(
        (u.to(device, torch.float32 if impl != "reference" else v.dtype) * v).sum()
        for u, v in zip(up, rows[:3], strict=True)
    )
    wanted = [t for t in (e, c, bias) if t is not None]
    grads = torch.autograd.grad(loss, wanted)
    rows = type(rows)(*(v if v is None else v.detach().cpu() for v in rows))
    return rows, [g.cpu() for g in grads], up


def close(found: Tensor, wanted: Tensor, tolerance: float, floor: float = 1e-30) -> None:
    """Within `tolerance` of the largest number, or of `floor`."""
    assert found.shape == wanted.shape
    error = (found.double() - wanted).abs().max() if found.numel() else torch.tensor(0.0)
    size = wanted.abs().max().clamp(min=floor) if found.numel() else 1.0
    assert error <= tolerance * size, (float(error), float(size))


def check(x: Problem, kind: str, beta: float, found, dtype: torch.dtype):
    rows, grads, up = found
    s, t = x.scores()
    valid = x.targets != IGNORE
    zero = torch.zeros((), dtype=torch.float64)
    label = torch.where(valid, x.targets, 0)[:, None]
    wide = dtype == torch.float64
    tolerance = 1e-12 if wide else ROUNDING
    log_q, log_p = torch.log_softmax(s, -1), torch.log_softmax(t, -1)
    expected = [
        divergence(s, t, kind, beta),
        -log_q.gather(1, label)[:, 0],
        torch.logsumexp(s, -1),
        -log_p.gather(1, label)[:, 0],
    ]
    # a divergence is a difference of log-sums: its rounding is theirs
    floor = max(0.1, float(expected[2].abs().max())) if expected[2].numel() else 0.1
    for value, want in zip(rows[:4], expected, strict=True):
        want = torch.where(valid, want, zero)
        close(value, want, tolerance * max(1.0, float(s.abs().max())) / 4, floor=floor)
    wanted = gradients(x, kind, beta, *up)
    # dbias is summed in fp32 and rounded to the dtype of bias
    of_gradient = 1e-12 if wide else 4 * EPS[dtype] + ROUNDING
    sizes = walks(x, kind, beta, *up)
    for value, want, size in zip(grads, wanted, sizes, strict=False):
        close(value, want, of_gradient, floor=float(size.max()) if size.numel() else 1.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("maps", MAPS, ids=str)
def test_reference_is_the_formula(kind, maps):
    x = problem(11, 7, 90, 5, bias=True, ignored=0.3, dtype=torch.float64, **maps)
    check(x, kind, 0.3, run(x, kind, 0.3, impl="reference"), torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_by_hand_is_that_of_autograd(kind):
    g = torch.Generator().manual_seed(2)
    s, t = (torch.randn(6, 50, generator=g, dtype=torch.float64) for _ in range(2))
    s.requires_grad_()
    (found,) = torch.autograd.grad(divergence(s, t, kind, 0.3).sum(), s)
    torch.testing.assert_close(found, score_gradient(s.detach(), t, kind, 0.3))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32(shape, kind, device):
    x = problem(*shape, bias=True, ignored=0.2, seed=sum(shape), softcap=8.0)
    check(x, kind, 0.5, run(x, kind, device=device), torch.float32)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit(dtype, kind, device):
    x = problem(45, 96, 700, 64, bias=True, ignored=0.2, dtype=dtype, softcap=8.0)
    check(x, kind, 0.5, run(x, kind, device=device), dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("maps", MAPS, ids=str)
def test_maps_of_either_head(maps, kind, device):
    x = problem(19, 24, 600, 48, bias=True, ignored=0.2, **maps)
    check(x, kind, 0.5, run(x, kind, device=device), torch.float32)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("beta", [0.02, 0.3, 0.9])
def test_mixtures(beta, device):
    x = problem(21, 16, 400, 16, spread=4.0)
    check(x, "jsd", beta, run(x, "jsd", beta, device=device), torch.float32)


OTHERS = [
    (torch.float32, torch.bfloat16),
    # CUDA computes the teacher in the student's dtype
    pytest.param(torch.bfloat16, torch.float32, marks=pytest.mark.cpu),
    pytest.param(torch.float16, torch.bfloat16, marks=pytest.mark.cpu),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("mine", "theirs"), OTHERS, ids=str)
def test_a_teacher_of_another_dtype(mine, theirs, device):
    if device == "cuda" and mine != torch.float32:
        pytest.skip("what only the CPU promises")
    x, y = (problem(40, 40, 520, 24, dtype=dtype) for dtype in (mine, theirs))
    x.teacher_e, x.teacher_c = y.teacher_e, y.teacher_c
    check(x, "forward_kl", 0.5, run(x, "forward_kl", device=device), mine)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_small_gradients_of_float16(kind, device):
    """Of a student near its teacher, spread over a wide vocabulary."""
    x = problem(20, 32, 3000, 32, dtype=torch.float16, spread=0.5)
    x.c = x.teacher_c.clone()
    x.e = x.teacher_e + 0.02 * x.e
    check(x, kind, 0.5, run(x, kind, device=device), torch.float16)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_strided(kind, device):
    x = problem(30, 20, 300, 28, ignored=0.2)
    wide = problem(60, 41, 600, 57)
    x.e, x.c = wide.e[::2, 1:40:2].contiguous().mT.contiguous().mT, wide.c[::2, :20]
    x.teacher_e, x.teacher_c = wide.teacher_e[1::2, ::2][:, :28], wide.teacher_c[::2, 28:56]
    check(x, kind, 0.5, run(x, kind, device=device), torch.float32)


@pytest.mark.parametrize("device", DEVICES)
def test_narrow_and_strided_labels(device):
    x = problem(30, 16, 300, 16, ignored=0.3)
    want = run(x, "jsd", device=device)
    wide = torch.full((60,), 10**6, dtype=torch.int32)
    wide[::2] = x.targets.int()
    x.targets = wide[::2]
    found = run(x, "jsd", device=device)
    assert all(torch.equal(a, b) for a, b in zip(found[0][:4], want[0][:4], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(found[1], want[1], strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("impl", ["exact", "cce", "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_rows_and_none_that_count(kind, impl, device):
    for n in (0, 5):
        x = problem(n, 8, 300, 12, bias=True, ignored=2.0)
        x.e.fill_(torch.nan)
        x.teacher_e.fill_(torch.inf)
        rows, grads, _ = run(x, kind, impl=impl, device=device)
        assert all(v.shape == (n,) and not v.any() for v in rows[:4])
        assert all(not g.any() for g in grads)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("impl", ["exact", "auto"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_that_is_the_student(kind, impl, dtype, device):
    x = problem(50, 32, 700, 32, bias=True, ignored=0.2, dtype=dtype, softcap=6.0)
    tensors = [t.to(device) for t in (x.e, x.c, x.targets, x.bias)]
    e, c, y, bias = tensors
    e.requires_grad_(), c.requires_grad_(), bias.requires_grad_()
    options = {"kind": kind, "impl": impl, "softcap": 6.0}
    rows = divergence_rows(e, c, e, c, y, bias, bias, **options)
    assert not rows.divergence.any()
    for g in torch.autograd.grad(rows.divergence.sum(), (e, c, bias)):
        assert not g.any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_shifted_logits_diverge_no_more(kind, device):
    """A number common to all of a row's logits says nothing."""
    x = problem(20, 16, 600, 16, bias=True)
    plain, _, _ = run(x, kind, device=device)
    x.teacher_bias = x.teacher_bias + 8.0
    moved, _, _ = run(x, kind, device=device)
    torch.testing.assert_close(plain.divergence, moved.divergence, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("impl", ["exact", "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_columns_that_both_mask_take_no_part(kind, impl, device):
    x = problem(9, 16, 600, 16, bias=True)
    mask = torch.zeros(600).index_fill_(0, torch.arange(100, 400), -torch.inf)
    mask[x.targets] = 0.0
    open_columns = mask == 0
    masked = Problem(*x.tensors()[:5], x.bias + mask, x.teacher_bias + mask)
    rows, grads, _ = run(masked, kind, impl=impl, device=device)
    kept = open_columns.nonzero()[:, 0]
    cut = Problem(
        x.e.detach(),
        x.c.detach()[kept],
        x.teacher_e,
        x.teacher_c[kept],
        torch.searchsorted(kept, x.targets),
        x.bias[kept],
        x.teacher_bias[kept],
    )
    want, wanted, _ = run(cut, kind, impl=impl, device=device)
    torch.testing.assert_close(rows.divergence, want.divergence, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grads[0], wanted[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grads[1][kept], wanted[1], rtol=1e-4, atol=1e-5)
    assert not grads[1][~open_columns].any()


@pytest.mark.parametrize("device", DEVICES)
def test_a_column_that_one_masks(device):
    x = problem(6, 8, 300, 8, bias=True)
    gone = (int(x.targets[0]) + 1) % 300
    x.targets[:] = x.targets[0]
    x.teacher_bias[gone] = -torch.inf
    assert torch.isinf(run(x, "reverse_kl", device=device)[0].divergence).all()
    for kind in ("forward_kl", "jsd", "tvd"):
        rows, grads, _ = run(x, kind, device=device)
        s, t = x.scores()
        p, q = torch.softmax(t, -1), torch.softmax(s, -1)
        assert torch.isfinite(rows.divergence).all()
        assert all(torch.isfinite(g).all() for g in grads)
        if kind == "tvd":
            close(rows.divergence, (p - q).abs().sum(-1) / 2, 1e-5)
    x.teacher_bias[gone], x.bias = 0.0, x.bias.detach().clone()
    x.bias[gone] = -torch.inf
    assert torch.isinf(run(x, "forward_kl", device=device)[0].divergence).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_nan_reaches_its_own_row_alone(kind, device):
    x = problem(8, 16, 300, 16)
    x.e[3, 2] = torch.nan
    rows, _, _ = run(x, kind, device=device)
    assert torch.isnan(rows.divergence[3])
    assert torch.isfinite(rows.divergence[[0, 1, 2, 4, 5, 6, 7]]).all()
    x = problem(8, 16, 300, 16)
    x.teacher_e[4, 2] = torch.nan
    rows, _, _ = run(x, kind, device=device)
    assert torch.isnan(rows.divergence).tolist() == [i == 4 for i in range(8)]
    assert torch.isfinite(rows.nll).all()
