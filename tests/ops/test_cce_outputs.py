"""Returned lse, entropy, argmax, accuracy and log-probabilities: values, shapes, derivatives."""

from __future__ import annotations

import pytest
import torch
from cce_oracle import GRAD_TOL, IGNORE, assert_close, evaluate, expected, gradients, problem, run

OPTIONS = {
    "plain": {},
    "capped": {"softcap": 4.0},
    "all": {"softcap": 4.0, "logit_scale": 1.6, "temperature": 0.7},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("shape", [(41,), (3, 7)])
def test_lse_and_entropy_carry_gradients(impl, name, shape):
    """loss + sum of per-token coefficients times lse and entropy, as RL and z-losses use them."""
    p = problem(shape, 33, 600, ignored=0.25, seed=1)
    g = torch.Generator().manual_seed(2)
    u, h, q = (torch.randn(shape, generator=g) for _ in range(3))

    def total(out):
        return (u * out.loss + h * out.lse + q * out.entropy).sum()

    leaves = p.leaves()
    out = impl.loss(
        leaves["e"],
        leaves["c"],
        p.targets,
        bias=leaves["bias"],
        reduction="none",
        return_lse=True,
        return_entropy=True,
        **OPTIONS[name],
    )
    true_leaves = p.leaves(torch.float64)
    truth = evaluate(targets=p.targets, reduction="none", **true_leaves, **OPTIONS[name])
    for field in ("loss", "lse", "entropy"):
        value = getattr(out, field)
        assert value.dtype == torch.float32
        assert value.shape == shape
        assert_close(value, getattr(truth, field), rtol=2e-5, what=field)
        assert torch.count_nonzero(value[p.targets == IGNORE]) == 0
    want = gradients(total(truth), true_leaves)
    for leaf, grad in gradients(total(out), leaves).items():
        assert_close(grad, want[leaf], rtol=4e-5, what=f"d{leaf}")


@pytest.mark.parametrize("field", ["lse", "entropy"])
def test_one_output_alone(impl, field):
    p = problem(19, 24, 400, ignored=0.2, seed=3)
    leaves, true_leaves = p.leaves(), p.leaves(torch.float64)
    flags = {f"return_{field}": True}
    out = impl.loss(leaves["e"], leaves["c"], p.targets, bias=leaves["bias"], softcap=5.0, **flags)
    truth = evaluate(targets=p.targets, softcap=5.0, **true_leaves)
    got = gradients(getattr(out, field).sum(), leaves)
    want = gradients(getattr(truth, field).sum(), true_leaves)
    for leaf in got:
        assert_close(got[leaf], want[leaf], rtol=4e-5, what=f"d{leaf}")


def test_lse_path_equals_z_loss(impl):
    """lambda * mean(lse^2) through the returned lse is the z_loss option."""
    p = problem(27, 16, 500, ignored=0.3, seed=4)
    _, want = run(impl.loss, p, z_loss=0.1)
    leaves = p.leaves()
    out = impl.loss(leaves["e"], leaves["c"], p.targets, bias=leaves["bias"], return_lse=True)
    count = (p.targets != IGNORE).sum()
    got = gradients(out.loss + 0.1 * (out.lse**2).sum() / count, leaves)
    for leaf in got:
        assert_close(got[leaf], want[leaf].double(), rtol=2 * GRAD_TOL[torch.float32], what=leaf)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_argmax_and_accuracy(impl, options):
    p = problem(200, 12, 700, ignored=0.3, seed=5)
    best = evaluate(p.e.double(), p.c.double(), p.targets, bias=p.bias.double(), **options).argmax
    valid = p.targets != IGNORE
    p.targets[valid & (torch.arange(200) % 3 == 0)] = best[valid & (torch.arange(200) % 3 == 0)]
    out, _ = run(impl.loss, p, return_argmax=True, **options)
    truth, _ = expected(p, **options)
    assert out.argmax.dtype == torch.int64
    assert torch.equal(out.argmax[valid], truth.argmax[valid])
    assert out.accuracy.shape == ()
    assert out.accuracy.item() == pytest.approx(truth.accuracy.item(), abs=1e-6)
    assert 0.2 < out.accuracy.item() < 0.6


def test_argmax_takes_the_lowest_index_on_ties(impl):
    """Ties inside a tile, across tiles, and of a whole row."""
    c = torch.zeros(900, 2)
    c[[3, 4, 255, 256, 800], 0] = 2.0
    c[[299, 600, 899], 1] = 2.0
    e = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [-1.0, 0.0], [-1.0, -1.0]])
    out = impl.loss(e, c, torch.zeros(5, dtype=torch.long), return_argmax=True)
    assert out.argmax.tolist() == [3, 299, 0, 0, 0]


def test_accuracy_of_no_valid_row_is_a_number(impl):
    p = problem(4, 6, 30)
    p.targets.fill_(IGNORE)
    out = impl.loss(p.e, p.c, p.targets, return_argmax=True)
    assert out.accuracy.item() == 0


def test_bare_tensor_without_flags_and_none_for_what_was_not_asked(impl):
    p = problem(4, 6, 30)
    assert isinstance(impl.loss(p.e, p.c, p.targets), torch.Tensor)
    out = impl.loss(p.e, p.c, p.targets, return_lse=True)
    assert out.lse is not None
    others = (out.entropy, out.argmax, out.accuracy, out.stats)
    assert all(field is None for field in others)


@pytest.mark.parametrize("name", OPTIONS)
def test_logprobs(impl, name):
    p = problem((3, 8), 20, 500, ignored=0.25, seed=6)
    g = torch.Generator().manual_seed(7)
    u, q = torch.randn(3, 8, generator=g), torch.randn(3, 8, generator=g)
    leaves, true_leaves = p.leaves(), p.leaves(torch.float64)
    logp, entropy = impl.logprobs(
        leaves["e"], leaves["c"], p.targets, bias=leaves["bias"], **OPTIONS[name]
    )
    truth = evaluate(targets=p.targets, reduction="none", **true_leaves, **OPTIONS[name])
    assert logp.dtype == entropy.dtype == torch.float32
    assert_close(logp, -truth.loss, rtol=2e-5, what="logprobs")
    assert_close(entropy, truth.entropy, rtol=2e-5, what="entropy")
    got = gradients((u * logp + q * entropy).sum(), leaves)
    want = gradients((q * truth.entropy - u * truth.loss).sum(), true_leaves)
    for leaf in got:
        assert_close(got[leaf], want[leaf], rtol=4e-5, what=f"d{leaf}")


def test_logprobs_shift(impl):
    p = problem((2, 6), 20, 300, seed=8)
    logp, entropy = impl.logprobs(p.e, p.c, p.targets, shift=1)
    truth, _ = expected(p.__class__(p.e, p.c, p.targets), shift=1, reduction="none")
    assert logp.shape == entropy.shape == (2, 5)
    assert_close(logp, -truth.loss, rtol=2e-5)
