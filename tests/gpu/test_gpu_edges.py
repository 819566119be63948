"""Inputs at the edge: labels, layouts, extreme logits, nothing at all."""

from __future__ import annotations

import pytest
import torch
from gpu_problem import (
    DEVICE,
    DTYPES,
    FORMS,
    GRADIENT_LIMIT,
    IGNORE,
    Problem,
    check,
    error,
    ours,
    problem,
    truth,
)

every_form = pytest.mark.parametrize("form", FORMS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@every_form
@pytest.mark.parametrize("kind", [torch.int32, torch.int64], ids=str)
def test_labels_at_the_borders_of_tiles(kind, form):
    p = problem(12, 64, 600, ignored=0)
    labels = [0, 1, 127, 128, 255, 256, 257, 511, 512, 599, IGNORE, 300]
    p.targets = torch.tensor(labels, dtype=kind, device=DEVICE)
    check(ours(p, **FORMS[form]), truth(p, **FORMS[form]))


@every_form
@every_dtype
def test_everything_ignored_is_zero(dtype, form):
    p = problem(40, 64, 300, dtype)
    p.targets.fill_(IGNORE)
    for value in ours(p, **({"reduction": "mean"} | FORMS[form])).values():
        assert torch.count_nonzero(value) == 0


@every_form
@every_dtype
def test_ignored_rows_may_hold_nan(dtype, form):
    p = problem(40, 64, 300, dtype)
    p.targets[::4] = IGNORE
    want = truth(p, **FORMS[form])
    p.e[p.targets == IGNORE] = torch.nan
    check(ours(p, **FORMS[form]), want)


@every_form
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_nonfinite_rows_reach_the_loss(value, form):
    p = problem(40, 64, 300, ignored=0)
    p.e[7, 3] = value
    assert not torch.isfinite(ours(p, **FORMS[form])["loss"].sum())


@every_form
@pytest.mark.parametrize("label", [300, -1, 2**31 - 1, -(2**31)])
def test_a_label_out_of_range_gives_nan(label, form):
    """On a device nothing waits for the labels; the loss says that one is wrong."""
    p = problem(40, 64, 300, ignored=0)
    p.targets[5] = label
    loss = ours(p, **FORMS[form])["loss"]
    assert loss.isnan().any()
    if loss.dim():
        assert loss.isnan().nonzero().flatten().tolist() == [5]


@every_form
@every_dtype
def test_logits_far_above_the_cap(dtype, form):
    p = problem(40, 64, 300, dtype, spread=300.0)
    options = FORMS[form] | {"softcap": 30.0}
    check(ours(p, **options), truth(p, **options), scale=4)


@every_form
@every_dtype
def test_uncapped_logits_of_ten_thousand(dtype, form):
    """Nearly one-hot rows; scores of 1e4 in fp32 are known to 1e-3."""
    p = problem(40, 64, 300, dtype, spread=3000.0)
    got, want = ours(p, **FORMS[form]), truth(p, **FORMS[form])
    assert torch.allclose(got["loss"].double(), want["loss"], rtol=1e-5, atol=0.1)
    for name in ("de", "dc"):
        assert torch.isfinite(got[name]).all()


@every_form
@every_dtype
def test_equal_logits(dtype, form):
    """Every class is one vector, so dE is its multiple by sum p - 1: nothing but rounding."""
    p = problem(40, 64, 300, dtype)
    p.c = p.c[:1].expand(300, 64).contiguous()
    got, want = ours(p, **FORMS[form]), truth(p, **FORMS[form])
    de = got.pop("de").double().norm(dim=1)
    assert (de <= GRADIENT_LIMIT[dtype] * p.c[0].double().norm()).all()
    check(got, {name: want[name] for name in got}, scale=2)


@every_form
@every_dtype
def test_certain_rows_have_small_gradients(dtype, form):
    """The label's probability is 1 - 2.5e-4: p - 1 survives any storage but keeps few digits."""
    p = problem(64, 64, 300, dtype, ignored=0)
    p.c = torch.eye(300, 64, device=DEVICE, dtype=dtype) * 4
    p.targets = torch.arange(64, device=DEVICE)
    p.e = torch.eye(64, device=DEVICE, dtype=dtype) * 3.5
    got, want = ours(p, **FORMS[form]), truth(p, **FORMS[form])
    for name in ("de", "dc"):
        assert error(got[name], want[name]) < 8e-3, name


def strided(p: Problem) -> Problem:
    wide_e, wide_c = torch.cat([p.e, p.e], 1), torch.cat([p.c, p.c], 1)
    d = p.e.shape[1]
    return Problem(wide_e[:, :d], wide_c[:, d:], p.targets.repeat_interleave(2)[::2], p.bias)


def transposed(p: Problem) -> Problem:
    return Problem(p.e.T.contiguous().T, p.c.T.contiguous().T, p.targets, p.bias)


def misaligned(p: Problem) -> Problem:
    def shifted(t: torch.Tensor) -> torch.Tensor:
        memory = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)
        return memory[1:].view(t.shape).copy_(t)

    return Problem(shifted(p.e), shifted(p.c), p.targets, shifted(p.bias))


@pytest.mark.parametrize("layout", [strided, transposed, misaligned])
@every_form
@every_dtype
def test_layouts_change_nothing(dtype, form, layout):
    p = problem(40, 64, 300, dtype, bias=True)
    got, want = ours(layout(p), **FORMS[form]), ours(p, **FORMS[form])
    for name in want:
        assert torch.equal(got[name], want[name]), name


@every_form
def test_an_expanded_gradient(form):
    """The upstream of a sum is one number with stride 0."""
    p = problem(40, 64, 300)
    options = FORMS[form] | {"reduction": "none"}
    check(ours(p, **options), truth(p, **options))
