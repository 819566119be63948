"""Which gradients are asked for, with which upstream, how often."""

from __future__ import annotations

import itertools

import pytest
import torch
from cce_oracle import IGNORE, Problem, assert_close, check, evaluate, expected, problem, run

from gemma_ext.reference import cce as reference

SUBSETS = [s for k in (1, 2, 3) for s in itertools.combinations(("e", "c", "bias"), k)]


@pytest.mark.parametrize("wanted", SUBSETS, ids="+".join)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_any_subset_of_leaves(impl, wanted, reduction):
    """A frozen head, frozen hidden states, a bias alone."""
    p = problem(29, 40, 600, ignored=0.2, seed=1)
    _, want = expected(p, softcap=5.0, reduction=reduction)
    leaves = {n: t.requires_grad_(n in wanted) for n, t in p.leaves().items()}
    loss = impl.loss(
        leaves["e"],
        leaves["c"],
        p.targets,
        bias=leaves["bias"],
        softcap=5.0,
        reduction=reduction,
    )
    loss.sum().backward()
    for name, leaf in leaves.items():
        if name in wanted:
            assert_close(leaf.grad, want[name], rtol=2e-5, what=f"d{name}")
        else:
            assert leaf.grad is None


def test_no_grad_and_inference_mode(impl):
    p = problem(29, 40, 600, ignored=0.2, seed=1)
    want, _ = expected(p)
    leaves = p.leaves()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            loss = impl.loss(leaves["e"], leaves["c"], p.targets, bias=leaves["bias"])
        assert not loss.requires_grad
        assert_close(loss, want.loss, rtol=5e-6)
    assert not impl.loss(p.e, p.c, p.targets).requires_grad


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_backward_gives_the_same_gradients(impl, reduction):
    p = problem(29, 40, 600, ignored=0.2, seed=2)
    leaves = p.leaves()
    loss = impl.loss(
        leaves["e"], leaves["c"], p.targets, bias=leaves["bias"], reduction=reduction
    ).sum()
    inputs = list(leaves.values())
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    first = [g.clone() for g in first]
    second = torch.autograd.grad(loss, inputs, retain_graph=True)
    tripled = torch.autograd.grad(loss, inputs, torch.tensor(3.0))
    _, want = expected(p, reduction=reduction)
    for a, b, c, name in zip(first, second, tripled, leaves, strict=True):
        assert torch.equal(a, b)
        assert_close(a, want[name], rtol=2e-5, what=f"d{name}")
        assert_close(c, 3 * want[name], rtol=2e-5, what=f"3 d{name}")


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_retained_graph_accumulates(impl, reduction):
    """Leaf gradients must not share memory with what the graph keeps for its next backward."""
    p = problem(29, 40, 600, ignored=0.2, seed=2)
    leaves = p.leaves()
    loss = impl.loss(
        leaves["e"], leaves["c"], p.targets, bias=leaves["bias"], reduction=reduction
    ).sum()
    _, want = expected(p, reduction=reduction)
    for _ in range(3):
        loss.backward(retain_graph=True)
    for name, leaf in leaves.items():
        assert_close(leaf.grad, 3 * want[name], rtol=2e-5, what=f"3 d{name}")
        leaf.grad.zero_()
    loss.backward()
    for name, leaf in leaves.items():
        assert_close(leaf.grad, want[name], rtol=2e-5, what=f"d{name}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("upstream", [0.37, -2.0, 1e4, 0.0])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_scalar_upstream(impl, reduction, upstream, dtype):
    p = problem(29, 40, 600, ignored=0.2, dtype=dtype, seed=3)
    got = run(impl.loss, p, upstream, reduction=reduction)
    check(got, expected(p, upstream, reduction=reduction))


def test_per_token_upstream(impl):
    """Signed, zero and unequal: advantages of a policy gradient."""
    p = problem(29, 40, 600, ignored=0.2, seed=4)
    u = torch.randn(29, generator=torch.Generator().manual_seed(1))
    u[::6] = 0
    got = run(impl.loss, p, u, reduction="none", softcap=5.0)
    check(got, expected(p, u.double(), reduction="none", softcap=5.0))
    assert torch.count_nonzero(got[1]["e"][::6]) == 0


def test_upstream_of_ignored_rows_is_ignored(impl):
    p = problem(29, 40, 600, ignored=0.4, seed=5)
    u = torch.randn(29, generator=torch.Generator().manual_seed(2))
    _, want = run(impl.loss, p, u, reduction="none")
    u[p.targets == IGNORE] = 1e6
    _, got = run(impl.loss, p, u, reduction="none")
    for name in got:
        assert_close(got[name], want[name].double(), rtol=1e-6, what=name)


def test_upstream_scales_a_row_exactly(impl):
    """g_i = 1e4 on one row: its dE is 1e4 times what it is at g_i = 1."""
    p = problem(29, 40, 600, seed=6)
    u = torch.ones(29)
    _, one = run(impl.loss, p, u, reduction="none")
    u[11] = 1e4
    _, big = run(impl.loss, p, u, reduction="none")
    assert_close(big["e"][11] / 1e4, one["e"][11].double(), rtol=1e-4)
    others = torch.arange(29) != 11
    assert_close(big["e"][others], one["e"][others].double(), rtol=1e-5)


def test_gradients_reach_what_lies_below(impl):
    """Tied embeddings: c is used twice and e is not a leaf."""
    g = torch.Generator().manual_seed(7)
    table = torch.randn(300, 16, generator=g)
    x = torch.randint(0, 300, (21,), generator=g)
    y = torch.randint(0, 300, (21,), generator=g)
    w = torch.randn(16, 16, generator=g) / 4

    def total(fn, dtype):
        t, m = (z.to(dtype).detach().requires_grad_() for z in (table, w))
        out = fn(torch.tanh(t[x] @ m), t, y)
        return torch.autograd.grad(out if isinstance(out, torch.Tensor) else out.loss, (t, m))

    got, want = total(impl.loss, torch.float32), total(evaluate, torch.float64)
    for a, b in zip(got, want, strict=True):
        assert_close(a, b, rtol=2e-5)


def test_accumulates_into_existing_gradients(impl):
    p = problem(10, 8, 300, seed=8)
    leaves = p.leaves()
    for _ in range(2):
        impl.loss(leaves["e"], leaves["c"], p.targets, bias=leaves["bias"]).backward()
    _, want = expected(p)
    for name, leaf in leaves.items():
        assert_close(leaf.grad, 2 * want[name], rtol=2e-5, what=name)


def test_inputs_are_left_as_they_were(impl):
    p = problem(15, 8, 300, ignored=0.3, seed=9)
    before = vars(p).copy()
    copies = {name: t.clone() for name, t in before.items()}
    run(impl.loss, p, softcap=5.0)
    assert all(torch.equal(before[name], copies[name]) for name in copies)


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0, "logit_scale": 1.3, "temperature": 0.7}])
def test_reference_passes_gradcheck(options):
    p = problem(4, 3, 5, ignored=0.3, dtype=torch.float64, seed=10)
    leaves = tuple(p.leaves(torch.float64).values())

    def rows(e, c, bias):
        weight = torch.rand(5).double()
        nll, lse, mean, *_ = reference.rows(
            e, c, p.targets, bias, class_weight=weight, want_entropy=True, **options
        )
        return nll, lse, mean

    def loss(e, c, bias):
        return reference.linear_cross_entropy(
            e, c, p.targets, bias=bias, label_smoothing=0.1, z_loss=0.1, **options
        )

    assert torch.autograd.gradcheck(rows, leaves)
    assert torch.autograd.gradcheck(loss, leaves)


def test_oracle_matches_the_closed_form_gradient():
    """G = p [g((1-a) w_y + a W/V + 2 lambda lse) + h - q(s - m)] - g[(1-a) w_y 1{y} + a w/V]."""
    p = problem(9, 6, 40, dtype=torch.float64, seed=11)
    g = torch.Generator().manual_seed(3)
    u, h, q = (torch.randn(9, generator=g).double() for _ in range(3))
    w = torch.rand(40, generator=g).double()
    cap, kappa, temp, alpha, lam = 3.0, 1.4, 0.7, 0.2, 0.3
    options = {"softcap": cap, "logit_scale": kappa, "temperature": temp}
    leaves = p.leaves()
    out = evaluate(
        targets=p.targets,
        weight=w,
        label_smoothing=alpha,
        z_loss=lam,
        reduction="none",
        **leaves,
        **options,
    )
    total = (u * out.loss + h * out.lse + q * out.entropy).sum()
    got = torch.autograd.grad(total, list(leaves.values()))
    t = torch.tanh((kappa * p.e @ p.c.T + p.bias) / cap)
    s = cap * t / temp
    lse = torch.logsumexp(s, 1, keepdim=True)
    prob = torch.exp(s - lse)
    m = (prob * s).sum(1, keepdim=True)
    hot = torch.nn.functional.one_hot(p.targets, 40).double()
    wy = (1 - alpha) * w[p.targets][:, None]
    coef = u[:, None] * (wy + alpha / 40 * w.sum() + 2 * lam * lse) + h[:, None]
    da = prob * (coef - q[:, None] * (s - m)) - u[:, None] * (wy * hot + alpha / 40 * w)
    da = da * (1 - t**2) / temp
    for a, b in zip(got, (kappa * da @ p.c, kappa * da.T @ p.e, da.sum(0)), strict=True):
        assert_close(a, b, rtol=1e-12)


def test_empty_batch_keeps_the_graph(impl):
    p = Problem(torch.zeros(0, 8), torch.randn(20, 8), torch.zeros(0, dtype=torch.long))
    loss, grads = run(impl.loss, p)
    assert loss.item() == 0
    assert torch.count_nonzero(grads["c"]) == 0
