"""torch.compile: one graph, no recompilation per shape."""

from __future__ import annotations

import pytest
import torch
from cce_impls import KERNELS
from cce_oracle import IGNORE, Problem, assert_close, check, expected, problem, run

OPTIONS = {
    "capped": {"softcap": 5.0, "logit_scale": 1.2, "temperature": 0.8},
    "none": {"reduction": "none", "softcap": 5.0},
    "shift": {"shift": 1, "reduction": "sum"},
    "smoothing": {"label_smoothing": 0.1, "z_loss": 0.1},
}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(fn, backend: str = "aot_eager"):
    return torch.compile(fn, fullgraph=True, dynamic=True, backend=backend)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_full_graph(impl, options):
    fn = compiled(lambda e, c, y, bias: impl.loss(e, c, y, bias=bias, **options))

    def call(e, c, targets, *, bias):
        return fn(e, c, targets, bias)

    with torch._dynamo.config.patch(error_on_recompile=True):
        for shape in ((3, 6), (4, 9), (2, 17)):
            p = problem(shape, 24, 300, ignored=0.2, seed=shape[1])
            check(run(call, p), expected(p, **options), scale=2)


def test_full_graph_with_every_output(impl):
    flags = {"return_lse": True, "return_entropy": True, "return_argmax": True}
    fn = compiled(lambda e, c, y, b: impl.loss(e, c, y, bias=b, softcap=5.0, **flags))
    p = problem((3, 6), 24, 300, ignored=0.2, seed=1)
    leaves, eager_leaves = p.leaves(), p.leaves()
    got = fn(leaves["e"], leaves["c"], p.targets, leaves["bias"])
    want = impl.loss(
        eager_leaves["e"],
        eager_leaves["c"],
        p.targets,
        bias=eager_leaves["bias"],
        softcap=5.0,
        **flags,
    )
    for field in ("loss", "lse", "entropy", "accuracy"):
        assert_close(getattr(got, field), getattr(want, field).double(), rtol=1e-6, what=field)
    assert torch.equal(got.argmax, want.argmax)
    (got.loss + got.lse.sum() - got.entropy.sum()).backward()
    (want.loss + want.lse.sum() - want.entropy.sum()).backward()
    for name, leaf in leaves.items():
        assert_close(leaf.grad, eager_leaves[name].grad.double(), rtol=1e-5, what=name)


def test_logprobs_full_graph(impl):
    fn = compiled(lambda e, c, y: impl.logprobs(e, c, y, softcap=5.0))
    p = problem((3, 6), 24, 300, ignored=0.2, bias=False, seed=2)
    leaves = p.leaves()
    logp, entropy = fn(leaves["e"], leaves["c"], p.targets)
    want, _ = expected(p, softcap=5.0, reduction="none")
    assert_close(logp, -want.loss, rtol=2e-5)
    assert_close(entropy, want.entropy, rtol=2e-5)
    (logp + entropy).sum().backward()
    assert leaves["e"].grad.norm() > 0


def test_inside_a_model(impl):
    """The loss in the middle of a compiled step, with a tied head and autocast."""

    def step(table, x, y):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = torch.nn.functional.linear(table[x], mix)
            return impl.loss(hidden, table, y, softcap=5.0, shift=1)

    g = torch.Generator().manual_seed(3)
    mix = torch.randn(16, 16, generator=g) / 4
    x, y = (torch.randint(0, 300, (2, 9), generator=g) for _ in range(2))
    grads = []
    for fn in (step, compiled(step)):
        table = torch.randn(300, 16, generator=torch.Generator().manual_seed(4)).requires_grad_()
        loss = fn(table, x, y)
        loss.backward()
        grads.append(table.grad)
    assert_close(grads[1], grads[0].double(), rtol=1e-2)


@pytest.mark.slow
def test_inductor(impl):
    options = {"softcap": 5.0, "z_loss": 0.1}
    fn = compiled(lambda e, c, y, b: impl.loss(e, c, y, bias=b, **options), backend="inductor")
    p = problem((3, 6), 24, 300, ignored=0.2, seed=5)
    got = run(lambda e, c, y, *, bias: fn(e, c, y, bias), p)
    check(got, expected(p, **options), scale=2)


@pytest.mark.cpu
@pytest.mark.parametrize("impl", KERNELS, ids=str, indirect=True)
def test_bad_label_is_reported_from_compiled_code(impl):
    """By the op itself: a graph holds no check in Python."""
    fn = compiled(lambda e, c, y: impl.loss(e, c, y))
    p = problem(6, 8, 40)
    p.targets[4] = 40
    with pytest.raises(Exception, match=r"(?s)(?=.*\b4\b)(?=.*40)"):
        fn(p.e, p.c, p.targets)


def test_all_ignored_in_compiled_code(impl):
    fn = compiled(lambda e, c, y: impl.loss(e, c, y))
    p = problem(6, 8, 40, bias=False)
    p.targets.fill_(IGNORE)
    loss, grads = run(lambda e, c, y, *, bias: fn(e, c, y), Problem(p.e, p.c, p.targets))
    assert loss.item() == 0
    assert all(torch.count_nonzero(g) == 0 for g in grads.values())
