"""Ignored rows cost nothing and leak nothing; a label outside the vocabulary is never read."""

from __future__ import annotations

import pytest
import torch
from cce_oracle import IGNORE, Problem, check, expected, problem, run

EXTRAS = {
    "plain": {},
    "capped": {"softcap": 5.0},
    "z_loss": {"z_loss": 0.1},
    "smoothing": {"label_smoothing": 0.1},
    "weighted": {"weight": torch.linspace(0.1, 1, 400)},
}


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("options", EXTRAS.values(), ids=EXTRAS)
def test_ignored_rows_may_hold_anything(impl, options, poison):
    """0 * NaN is NaN: an ignored row must not enter any product."""
    clean = problem(65, 24, 400, ignored=0.4, seed=1)
    dirty = Problem(clean.e.clone(), clean.c, clean.targets, clean.bias)
    dirty.e[clean.targets == IGNORE] = poison
    got = run(impl.loss, dirty, **options)
    check(got, expected(clean, **options), scale=2)
    assert torch.count_nonzero(got[1]["e"][clean.targets == IGNORE]) == 0


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_ignored_rows_with_every_output(impl, reduction):
    p = problem(33, 24, 400, ignored=0.4, seed=2)
    want = expected(p, reduction=reduction)
    p.e[p.targets == IGNORE] = float("nan")
    p.targets[0] = IGNORE
    p.e[0] = float("nan")
    want = expected(p, reduction=reduction)
    flags = {"return_lse": True, "return_entropy": True, "return_argmax": True}
    check(run(impl.loss, p, reduction=reduction, **flags), want)


@pytest.mark.parametrize("options", EXTRAS.values(), ids=EXTRAS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(6,), (0,), (2, 3)])
def test_no_valid_row(impl, shape, reduction, options):
    """The loss is a zero that autograd can walk, so data-parallel ranks do not wait for it."""
    p = problem(shape, 24, 400)
    p.targets.fill_(IGNORE)
    p.e.fill_(float("nan"))
    loss, grads = run(impl.loss, p, reduction=reduction, **options)
    assert loss.requires_grad
    assert loss.shape == (shape if reduction == "none" else ())
    assert torch.equal(loss, torch.zeros_like(loss))
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads.values())
    assert grads.keys() == {"e", "c", "bias"}


def test_no_valid_row_reaches_every_leaf(impl):
    """``unused`` parameters hang DDP: each leaf receives a gradient tensor, not None."""
    p = problem(5, 8, 300)
    p.targets.fill_(IGNORE)
    leaves = p.leaves()
    impl.loss(leaves["e"], leaves["c"], p.targets, bias=leaves["bias"]).backward()
    assert all(leaf.grad is not None for leaf in leaves.values())


@pytest.mark.parametrize("ignore_index", [0, 2, 256, 399])
def test_ignore_index_inside_the_vocabulary(impl, ignore_index):
    p = problem(50, 24, 400, seed=3)
    p.targets[::3] = ignore_index
    p.e[::3] = float("nan")
    options = {"ignore_index": ignore_index}
    check(run(impl.loss, p, **options), expected(p, **options))


def test_ignore_index_beyond_the_vocabulary(impl):
    p = problem(20, 24, 400, seed=4)
    p.targets[::4] = 1 << 40
    check(run(impl.loss, p, ignore_index=1 << 40), expected(p, ignore_index=1 << 40))


@pytest.mark.cpu
@pytest.mark.parametrize("value", [400, 401, -1, -99, 2**31, -(2**40)])
@pytest.mark.parametrize("position", [0, 7, 19])
def test_label_outside_the_vocabulary(impl, value, position):
    p = problem(20, 24, 400, seed=5)
    p.targets[position] = value
    with pytest.raises(ValueError, match=rf"(?s)(?=.*\b{position}\b)(?=.*{value})"):
        run(impl.loss, p)


@pytest.mark.cpu
def test_first_offending_label_is_named(impl):
    p = problem((4, 5), 24, 400, seed=5)
    p.targets[1, 2], p.targets[3, 1] = 4242, -7
    with pytest.raises(ValueError, match=r"(?s)(?=.*\b7\b)(?=.*4242)"):
        impl.loss(p.e, p.c, p.targets)


@pytest.mark.cpu
def test_bad_label_under_a_shift_is_named_where_the_caller_put_it(impl):
    p = problem((2, 6), 24, 400, seed=5)
    p.targets[:, 0] = -3  # no position predicts the first label of a sequence
    impl.loss(p.e, p.c, p.targets, shift=1)
    p.targets[1, 3] = 4242
    with pytest.raises(ValueError, match=r"(?s)(?=.*4242)(?=.*\b9\b)"):
        impl.loss(p.e, p.c, p.targets, shift=1)


@pytest.mark.cpu
def test_default_ignore_label_is_an_error_once_another_is_chosen(impl):
    p = problem(6, 8, 40)
    p.targets[2] = IGNORE
    with pytest.raises(ValueError, match="-100"):
        impl.loss(p.e, p.c, p.targets, ignore_index=-1)


@pytest.mark.cpu
def test_bad_label_among_ignored_rows(impl):
    p = problem(20, 24, 400, ignored=0.5, seed=6)
    p.targets[13] = 400
    with pytest.raises(ValueError, match=r"(?s)(?=.*\b13\b)(?=.*400)"):
        impl.loss(p.e, p.c, p.targets)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_label_dtypes(impl, dtype):
    p = problem((3, 7), 24, 400, ignored=0.3, seed=7)
    want = expected(p, shift=1)
    p.targets = p.targets.to(dtype)
    check(run(impl.loss, p, shift=1), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int16, torch.bool, torch.uint8])
def test_other_label_dtypes_are_refused(impl, dtype):
    p = problem(4, 8, 40)
    with pytest.raises(TypeError, match="targets"):
        impl.loss(p.e, p.c, p.targets.clamp(0, 1).to(dtype))
