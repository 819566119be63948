"""`linear_logprobs` against hand-computed answers, identities and float64."""

from __future__ import annotations

import math

import pytest
import torch
from cce_impls import KERNELS
from cce_oracle import IGNORE, assert_close, gradients
from logprobs_oracle import FIELDS, Policy, policy, truth
from torch import Tensor

import gemma_ext
from gemma_ext.ops.cce.logprobs import KL_KINDS, LinearLogprobsOutput, estimate_kl

EVERYTHING = {"return_moments": True, "return_top1": True}
CAPPED = {"softcap": 4.0, "temperature": 0.8, "logit_scale": 1.3}

# two rows, four tokens, width 2; values to eight digits
H = torch.tensor([[1.0, -0.5], [0.25, 2.0]])
W = torch.tensor([[0.5, 1.0], [-1.0, 0.3], [2.0, -2.0], [0.0, 0.7]])
REF_H = H + torch.tensor([[-0.1, 0.1], [0.2, -0.3]])
REF_W = W + torch.tensor([[0.1, -0.2], [0.05, 0.0], [-0.3, 0.1], [0.0, 0.2]])
TARGETS = torch.tensor([2, 0])
KNOWN = {
    "capped": (
        {"softcap": 1.5, "temperature": 0.8},
        {
            "logprobs": [-0.27744708, -0.72541848],
            "entropy": [0.79500460, 1.05621777],
            "kl": [0.00879046, 0.01053387],
            "ref_logprobs": [-0.34893243, -0.80720983],
        },
    ),
    "plain": (
        {"temperature": 0.8},
        {"logprobs": [-0.04333522, -0.41453406], "entropy": [0.21642208, 0.81994097]},
    ),
}
D_KL = [
    [-0.03877498, -0.00654131, 0.04750490, -0.00218861],
    [0.03449731, 0.03135571, -0.00295871, -0.06289432],
]


def near(found: Tensor, wanted: object, tolerance: float = 2e-6) -> None:
    wanted = torch.as_tensor(wanted, dtype=torch.float64)
    torch.testing.assert_close(found.detach().double(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", KNOWN)
def test_known_answers(impl, name):
    options, wanted = KNOWN[name]
    out = impl.logprobs(H, W, TARGETS, kl="full", ref_e=REF_H, ref_c=REF_W, **EVERYTHING, **options)
    for field, values in wanted.items():
        near(getattr(out, field), values)
    plain = impl.logprobs(H, W, TARGETS, **options)
    assert isinstance(plain, tuple)
    assert len(plain) == 2
    near(plain[0], wanted["logprobs"])
    near(plain[1], wanted["entropy"])


def test_known_lse_and_gradient_of_the_divergence(impl):
    """Through a bias of zeros, whose gradient is that of the logits before cap and temperature."""
    options = KNOWN["capped"][0]
    near(
        impl.loss(H, W, TARGETS, return_lse=True, reduction="none", **options).lse,
        [2.08499879, 2.39210875],
    )
    z = (H.double() @ W.double().T / 1.5).tanh()
    slope = (1 - z**2) / 0.8
    for row in range(2):
        bias = torch.zeros(4, requires_grad=True)
        heads = {"ref_e": REF_H[row : row + 1], "ref_c": REF_W}
        out = impl.logprobs(
            *(H[row : row + 1], W, TARGETS[row : row + 1]), bias=bias, kl="full", **heads, **options
        )
        (grad,) = torch.autograd.grad(out.kl.sum(), bias)
        near(grad, torch.tensor(D_KL[row], dtype=torch.float64) * slope[row])
        near(grad.double() / slope[row] @ torch.ones(4, dtype=torch.float64), 0.0)


def test_known_divergence_the_other_way(impl):
    heads = {"ref_e": H, "ref_c": W}
    out = impl.logprobs(REF_H, REF_W, TARGETS, kl="full", **heads, **KNOWN["capped"][0])
    near(out.kl, [0.00945079, 0.01053138])


def test_known_estimators():
    log_p, log_r = torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([-1.2, -1.5, -0.5])
    near(estimate_kl(log_p, log_r, "k1"), [0.2, -0.5, 0.0])
    near(estimate_kl(log_p, log_r, "k2"), [0.02, 0.125, 0.0])
    near(estimate_kl(log_p, log_r, "k3"), [0.0187308, 0.1487213, 0.0], 1e-6)
    with pytest.raises(ValueError, match="expected kind to be one of k1, k2, k3, got 'full'"):
        estimate_kl(log_p, log_r, "full")


@pytest.mark.parametrize("kl", KL_KINDS)
@pytest.mark.parametrize("options", [{}, CAPPED], ids=["plain", "capped"])
def test_values_and_gradients_of_every_field(impl, options, kl):
    p = policy(37, 24, 530, ref_d=16, ignored=0.25, seed=1, **options)
    mine, theirs = p.leaves(), p.leaves(torch.float64)
    bias = {"bias": mine["bias"]}
    out = impl.logprobs(
        *(mine["e"], mine["c"], p.targets), **bias, kl=kl, **p.reference(), **EVERYTHING, **options
    )
    want = truth(p, theirs, kl)
    for field in FIELDS:
        value = getattr(out, field)
        assert value.dtype == torch.float32
        assert_close(value, want[field], rtol=2e-5, floor=1e-6, what=field)
        assert not value[p.targets == IGNORE].any()
    assert torch.equal(out.is_top1, want["is_top1"])
    g = torch.Generator().manual_seed(2)
    u = dict(zip(("logprobs", "entropy", "kl"), torch.randn(3, 37, generator=g), strict=True))
    got = gradients(sum((w * getattr(out, name)).sum() for name, w in u.items()), mine)
    expected = gradients(sum((w * want[name]).sum() for name, w in u.items()), theirs)
    for leaf, grad in got.items():
        assert_close(grad, expected[leaf], rtol=6e-5, what=f"d{leaf}")
    for field in ("log_sum_sq_probs", "mean_logits", "is_top1", "ref_logprobs"):
        assert not getattr(out, field).requires_grad


@pytest.mark.parametrize("field", ["logprobs", "entropy", "kl"])
def test_each_field_alone_has_its_gradient(impl, field):
    p = policy(19, 16, 300, seed=3, **CAPPED)
    mine, theirs = p.leaves(), p.leaves(torch.float64)
    bias = {"bias": mine["bias"]}
    out = impl.logprobs(
        mine["e"], mine["c"], p.targets, **bias, kl="full", **p.reference(), **CAPPED
    )
    got = gradients(getattr(out, field).sum(), mine)
    want = gradients(truth(p, theirs)[field].sum(), theirs)
    for leaf, grad in got.items():
        assert_close(grad, want[leaf], rtol=6e-5, floor=1e-6, what=f"d{leaf}")


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.3])
@pytest.mark.parametrize("softcap", [None, 30.0, 50.0])
@pytest.mark.parametrize("biased", [False, True])
def test_gradcheck_of_the_reference(temperature, softcap, biased):
    g = torch.Generator().manual_seed(4)
    e, c, bias, ref_e, ref_c = (
        torch.randn(*size, generator=g, dtype=torch.float64)
        for size in ((5, 3), (7, 3), (7,), (5, 4), (7, 4))
    )
    e, c = e * 2.0, c.requires_grad_()
    targets = torch.tensor([0, 6, IGNORE, 3, 2])
    tensors = (e.requires_grad_(), c, *([bias.requires_grad_()] if biased else []))
    for kl in KL_KINDS:

        def fields(e, c, bias=None, kl=kl):
            out = gemma_ext.linear_logprobs(
                *(e, c, targets), bias=bias, softcap=softcap, temperature=temperature,
                logit_scale=0.3, impl="reference", kl=kl, ref_e=ref_e, ref_c=ref_c,
            )  # fmt: skip
            return out.logprobs, out.entropy, out.kl, out.logprobs - 0.3 * out.entropy + out.kl

        assert torch.autograd.gradcheck(fields, tensors, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_against_float64_of_the_same_inputs(impl, dtype):
    p = policy(41, 64, 1000, dtype=dtype, seed=5, softcap=30.0, temperature=0.7)
    mine, theirs = p.leaves(), p.leaves(torch.float64)
    bias = {"bias": mine["bias"]}
    out = impl.logprobs(
        *(mine["e"], mine["c"], p.targets), **bias, kl="full", **p.reference(), **EVERYTHING,
        **p.options,
    )  # fmt: skip
    want = truth(p, theirs)
    for field in FIELDS:
        assert float((getattr(out, field) - want[field]).detach().abs().max()) < 1e-4, field
    u = torch.randn(3, 41, generator=torch.Generator().manual_seed(6))
    names = ("logprobs", "entropy", "kl")
    got = gradients(sum((w * getattr(out, n)).sum() for n, w in zip(names, u, strict=True)), mine)
    wanted = gradients(sum((w * want[n]).sum() for n, w in zip(names, u, strict=True)), theirs)
    for leaf, grad in got.items():
        assert_close(grad, wanted[leaf], rtol=2e-2, what=f"d{leaf}")


@pytest.mark.parametrize("vocab", [7, 128, 1025])
@pytest.mark.parametrize("n", [0, 1, 17])
def test_sizes(impl, n, vocab):
    p = policy(n, 40, vocab, seed=7)
    if n:
        p.targets[0] = vocab - 1
        p.targets[-1] = 0
    mine = p.leaves()
    bias = {"bias": mine["bias"]}
    out = impl.logprobs(
        mine["e"], mine["c"], p.targets, **bias, kl="full", **p.reference(), **EVERYTHING
    )
    want = truth(p, p.leaves(torch.float64))
    for field in FIELDS:
        assert_close(getattr(out, field), want[field], rtol=2e-5, floor=1e-6, what=field)
    (out.logprobs.sum() + out.entropy.sum() + out.kl.sum()).backward()
    assert all(x.grad is not None and torch.isfinite(x.grad).all() for x in mine.values())
    if not n:
        assert not any(x.grad.any() for x in mine.values())


@pytest.mark.parametrize("impl", KERNELS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "d", "vocab"), [(4096, 64, 130), (19, 2304, 515), (19, 3584, 515)])
def test_many_rows_and_wide_ones(impl, n, d, vocab, dtype):
    """Of small integers, whose products every order and instruction adds up exactly."""
    g = torch.Generator().manual_seed(21)
    e, c, ref_e, ref_c = (
        torch.randint(-2, 3, (rows, d), generator=g).to(dtype) for rows in (n, vocab, n, vocab)
    )
    bias = {"bias": torch.randint(-2, 3, (vocab,), generator=g).to(dtype)}
    targets = torch.randint(vocab, (n,), generator=g)
    options = {"logit_scale": 2.0**-5, "softcap": 4.0, "temperature": 0.5}
    p = Policy(e, c, bias["bias"], ref_e, ref_c, None, targets, options)
    mine, theirs = p.leaves(), p.leaves(torch.float64)
    out = impl.logprobs(
        *(mine["e"], mine["c"], targets), bias=mine["bias"], kl="full", **p.reference(),
        **EVERYTHING, **options,
    )  # fmt: skip
    want = truth(p, theirs)
    for field, tolerance in zip(FIELDS, (2e-5, 1e-4, 1e-4, 2e-5, 1e-4, 2e-5), strict=True):
        error = (getattr(out, field) - want[field]).detach().abs().max()
        assert float(error) < tolerance, field
    assert torch.equal(out.is_top1, want["is_top1"])
    got = gradients((out.logprobs + 0.1 * out.entropy + out.kl).sum(), mine)
    wanted = gradients((want["logprobs"] + 0.1 * want["entropy"] + want["kl"]).sum(), theirs)
    for leaf, grad in got.items():
        assert_close(grad, wanted[leaf], rtol=6e-5 if dtype == torch.float32 else 2e-2, what=leaf)


@pytest.mark.slow
@pytest.mark.parametrize("impl", KERNELS, ids=str)
@pytest.mark.parametrize("vocab", [32000, 256001])
def test_large_vocabularies(impl, vocab):
    p = policy(33, 64, vocab, bias=False, seed=8, softcap=30.0)
    mine, theirs = p.leaves(), p.leaves(torch.float64)
    out = impl.logprobs(
        mine["e"], mine["c"], p.targets, kl="full", **p.reference(), **EVERYTHING, softcap=30.0
    )
    want = truth(p, theirs)
    for field, tolerance in zip(FIELDS, (2e-5, 1e-4, 1e-4, 2e-5, 1e-4, 2e-5), strict=True):
        error = (getattr(out, field) - want[field]).detach().abs().max()
        assert float(error) < tolerance, field
    got = gradients((out.logprobs + 0.1 * out.entropy).sum(), mine)
    wanted = gradients((want["logprobs"] + 0.1 * want["entropy"]).sum(), theirs)
    for leaf, grad in got.items():
        assert_close(grad, wanted[leaf], rtol=6e-5, what=f"d{leaf}")


def test_a_certain_row_has_no_entropy_and_never_less(impl):
    """All mass on one token at the cap: |s| = 60, of which float32 keeps 4e-6."""
    g = torch.Generator().manual_seed(9)
    e, c = torch.randn(64, 8, generator=g), torch.randn(900, 8, generator=g)
    c[17] = 0.0
    e[:, 0], c[:, 0], c[17, 0] = 1e4, -1.0, 1.0
    for label in (17, 3):
        targets = torch.full((64,), label)
        out = impl.logprobs(e, c, targets, softcap=30.0, temperature=0.5, **EVERYTHING)
        assert (out.entropy >= 0).all()
        near(out.entropy, torch.zeros(64), 1e-5)
        near(out.log_sum_sq_probs, torch.zeros(64), 1e-6)
        near(out.logprobs, torch.full((64,), 0.0 if label == 17 else -120.0), 1e-5)
        assert (out.is_top1 == (label == 17)).all()


@pytest.mark.parametrize("vocab", [1, 5, 3000])
def test_a_uniform_row(impl, vocab):
    e, c = torch.zeros(3, 6), torch.randn(vocab, 6, generator=torch.Generator().manual_seed(10))
    out = impl.logprobs(e, c, torch.tensor([0, vocab - 1, 0]), **EVERYTHING)
    for field, value in (("logprobs", -1), ("entropy", 1), ("log_sum_sq_probs", -1)):
        near(getattr(out, field), torch.full((3,), value * math.log(vocab)))
    near(out.mean_logits, torch.zeros(3))
    assert out.is_top1.tolist() == [True, vocab == 1, True]


def test_a_policy_is_no_distance_from_itself(impl):
    p = policy(23, 16, 700, bias=False, seed=11, **CAPPED)
    mine = p.leaves()
    itself = {"ref_e": p.e, "ref_c": p.c}
    for kl in KL_KINDS:
        out = impl.logprobs(mine["e"], mine["c"], p.targets, kl=kl, **itself, **CAPPED)
        near(out.kl, torch.zeros(23), 1e-6)
        if kl == "k1":
            continue
        for grad in gradients(out.kl.sum(), mine).values():
            near(grad, torch.zeros_like(grad), 2e-5)


def test_temperature_is_a_scale_where_there_is_no_cap(impl):
    p = policy(29, 16, 400, bias=False, seed=12)
    for temperature in (0.5, 1.3):
        one = impl.logprobs(p.e, p.c, p.targets, temperature=temperature, **EVERYTHING)
        two = impl.logprobs(p.e, p.c / temperature, p.targets, **EVERYTHING)
        for a, b in zip(one, two, strict=True):
            if a is not None:
                torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


def test_estimators_have_the_divergence_as_their_mean(impl):
    """Over all tokens, each as often as the policy would draw it."""
    p = policy(3, 12, 60, seed=13, **CAPPED)
    log_p = torch.log_softmax(
        4.0 * torch.tanh((1.3 * (p.e @ p.c.T) + p.bias) / 4.0) / 0.8, -1
    )  # [3, 60]
    e, ref_e = (x.repeat_interleave(60, 0) for x in (p.e, p.ref_e))
    targets = torch.arange(60).repeat(3)
    heads = {"ref_e": ref_e, "ref_c": p.ref_c, "ref_bias": p.ref_bias}
    of = {
        kl: impl.logprobs(e, p.c, targets, bias=p.bias, kl=kl, **heads, **CAPPED).kl.view(3, 60)
        for kl in KL_KINDS
    }
    for kl in ("k1", "k3"):
        near((log_p.exp() * of[kl]).sum(-1), of["full"][:, 0], 1e-4)
    assert (of["k3"] >= 0).all()
    assert (of["full"] >= 0).all()


@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_given_log_probabilities_stand_for_a_reference(impl, kl):
    p = policy(40, 16, 300, ignored=0.3, seed=14)
    heads = {"bias": p.bias, "kl": kl}
    one = impl.logprobs(p.e, p.c, p.targets, **heads, **p.reference())
    given = torch.where(p.targets == IGNORE, torch.nan, one.ref_logprobs)
    two = impl.logprobs(p.e, p.c, p.targets, **heads, ref_logprobs=given)
    assert torch.equal(one.kl, two.kl)
    assert torch.equal(one.ref_logprobs, two.ref_logprobs)


def test_the_reference_has_a_head_of_its_own(impl):
    p = policy(11, 16, 300, ref_d=24, bias=False, seed=15)
    theirs = {"ref_softcap": None, "ref_logit_scale": 0.5, "ref_temperature": 2.0}
    for kl in ("k1", "full"):
        out = impl.logprobs(
            p.e, p.c, p.targets, kl=kl, softcap=3.0, temperature=0.9, **p.reference(), **theirs
        )
        t = 0.5 * (p.ref_e.double() @ p.ref_c.double().T) / 2.0
        log_r = torch.log_softmax(t, -1).gather(1, p.targets[:, None])[:, 0]
        near(out.ref_logprobs, log_r, 1e-5)


def test_shift_and_leading_dimensions(impl):
    p = policy(3 * 8, 16, 300, ignored=0.2, seed=16)
    e, ref_e, y = (x.view(3, 8, *x.shape[1:]) for x in (p.e, p.ref_e, p.targets))
    heads = {"bias": p.bias, "ref_c": p.ref_c, "ref_bias": p.ref_bias}
    out = impl.logprobs(e, p.c, y, shift=1, kl="full", ref_e=ref_e, **heads, **EVERYTHING)
    want = impl.logprobs(
        e[:, :-1], p.c, y[:, 1:], kl="full", ref_e=ref_e[:, :-1], **heads, **EVERYTHING
    )
    for a, b in zip(out, want, strict=True):
        assert a.shape == (3, 7)
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_two_runs_have_the_same_bits(impl):
    p = policy(150, 40, 900, ignored=0.2, dtype=torch.bfloat16, seed=17)

    def run() -> list[Tensor]:
        mine = p.leaves()
        bias = {"bias": mine["bias"]}
        out = impl.logprobs(
            *(mine["e"], mine["c"], p.targets), **bias, kl="full", **p.reference(), **EVERYTHING
        )
        total = (out.logprobs + 0.1 * out.entropy + out.kl).sum()
        return [*out, *gradients(total, mine).values()]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_what_is_not_asked_for_is_none(impl):
    p = policy(5, 8, 30, seed=18)
    out = impl.logprobs(p.e, p.c, p.targets, return_entropy=False)
    assert isinstance(out, LinearLogprobsOutput)
    assert [x is None for x in out] == [False, *[True] * 6]
    out = impl.logprobs(p.e, p.c, p.targets, return_top1=True)
    assert [x is None for x in out] == [False, False, True, True, False, True, True]
    heads = {"return_entropy": False, "kl": "full", **p.reference()}
    out = impl.logprobs(p.e, p.c, p.targets, **heads)
    assert [x is None for x in out] == [False, True, True, True, True, False, False]


def test_autocast_decides_the_dtype(impl):
    p = policy(9, 16, 200, seed=19)
    with torch.autocast("cpu", torch.bfloat16), torch.autocast(impl.device, torch.bfloat16):
        out = impl.logprobs(
            p.e, p.c, p.targets, bias=p.bias, kl="full", **p.reference(), **EVERYTHING
        )
    named = ("e", "c", "bias", "ref_e", "ref_c", "ref_bias")
    low = {name: getattr(p, name).bfloat16() for name in named}
    heads = {name: low[name] for name in named[2:]}
    want = impl.logprobs(low["e"], low["c"], p.targets, kl="full", **heads, **EVERYTHING)
    for a, b in zip(out, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_no_logits_are_held():
    """Not a tensor of N V numbers is made, forward or backward, whatever is asked for."""
    n, v = 64, 20000
    p = policy(n, 16, v, bias=False, seed=20)
    mine = p.leaves()
    sizes: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            outs = out if isinstance(out, (tuple, list)) else [out]
            sizes.extend(x.numel() for x in outs if isinstance(x, Tensor))
            return out

    with Watch():
        out = gemma_ext.linear_logprobs(
            mine["e"], mine["c"], p.targets, kl="full", **p.reference(), **EVERYTHING
        )
        (out.logprobs.sum() + out.entropy.sum() + out.kl.sum()).backward()
    assert max(sizes) == v * 16


P = policy(4, 8, 20, bias=False, seed=21)
BAD = {
    "unknown kl": ({"kl": "k4"}, "expected kl to be None or one of k1, k2, k3, full, got 'k4'"),
    "no kl": ({"ref_e": P.ref_e, "ref_c": P.ref_c}, "expected kl with ref_e, got None"),
    "half a head": ({"kl": "k1", "ref_e": P.ref_e}, "expected ref_e and ref_c together, got ref_e"),
    "full from numbers": (
        {"kl": "full", "ref_logprobs": torch.zeros(4)},
        "expected ref_e and ref_c with kl='full', got none",
    ),
    "nothing": ({"kl": "k1"}, "expected either a head of the reference or ref_logprobs, got neith"),
    "both": (
        {"kl": "k1", "ref_e": P.ref_e, "ref_c": P.ref_c, "ref_logprobs": torch.zeros(4)},
        "expected either a head of the reference or ref_logprobs, got both",
    ),
    "another shape": ({"kl": "k1", "ref_logprobs": torch.zeros(5)}, r"ref_logprobs to be \[4\]"),
    "another device": (
        {"kl": "k1", "ref_logprobs": torch.zeros(4, device="meta")},
        "expected ref_logprobs on cpu like e, got meta",
    ),
    "another vocabulary": (
        {"kl": "full", "ref_e": P.ref_e, "ref_c": P.ref_c[1:]},
        "expected ref_c to have the 20 rows of c, got 19",
    ),
    "another width": (
        {"kl": "k1", "ref_e": P.ref_e[:, 1:], "ref_c": P.ref_c},
        r"expected ref_c to be \[V, 7\]",
    ),
    "no temperature": (
        {"kl": "k1", "ref_e": P.ref_e, "ref_c": P.ref_c, "ref_temperature": 0.0},
        "expected ref_temperature to be positive, got 0.0",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_refused(name):
    options, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        gemma_ext.linear_logprobs(P.e, P.c, P.targets, **options)


def test_what_is_no_tensor_is_refused():
    with pytest.raises(TypeError, match="expected ref_logprobs to be a tensor, got float"):
        gemma_ext.linear_logprobs(P.e, P.c, P.targets, kl="k1", ref_logprobs=0.5)


def test_one_graph_of_a_compiler(impl):
    torch._dynamo.reset()
    p = policy(19, 16, 300, ignored=0.2, bias=False, seed=22)

    def fields(e: Tensor, c: Tensor, y: Tensor, ref_e: Tensor, ref_c: Tensor) -> tuple:
        out = impl.logprobs(e, c, y, kl="full", ref_e=ref_e, ref_c=ref_c, **EVERYTHING, **CAPPED)
        return tuple(out)

    def run(function: object) -> list[Tensor]:
        mine = p.leaves()
        out = function(mine["e"], mine["c"], p.targets, p.ref_e, p.ref_c)
        total = out[0].sum() + out[1].sum() + out[5].sum()
        return [*out, *gradients(total, mine).values()]

    compiled = torch.compile(fields, fullgraph=True, dynamic=True, backend="aot_eager")
    for a, b in zip(run(compiled), run(fields), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
