"""What `linear_divergence` takes, returns and refuses."""

from __future__ import annotations

import pytest
import torch
from cce_impls import DEVICES
from cce_oracle import IGNORE
from divergence_oracle import KINDS, divergence, problem
from torch import Tensor
from torch._subclasses import FakeTensorMode

import gemma_ext
from gemma_ext.ops.cce.divergence import Divergence, divergence_rows

IMPLS = ["reference", "exact", "auto"]
B, T, D, V, TEACHER_D = 3, 7, 16, 300, 24


def batch(seed: int = 0, **options):
    """(e, c, teacher_e, teacher_c, targets, per-row divergence and nll [B, T])."""
    x = problem(B * T, D, V, TEACHER_D, seed=seed, **options)
    s, t = x.scores()
    label = x.targets.clamp(min=0)[:, None]
    nll = -torch.log_softmax(s, -1).gather(1, label)[:, 0]
    shaped = [v.view(B, T, *v.shape[1:]) for v in (x.e, x.teacher_e, x.targets)]
    values = [v.view(B, T) for v in (divergence(s, t, "forward_kl"), nll)]
    return shaped[0], x.c, shaped[1], x.teacher_c, shaped[2], *values


@pytest.fixture(params=DEVICES)
def loss(request):
    """`linear_divergence` on every device there is, its result on the CPU."""

    def call(*args, **options):
        moved = [x.to(request.param) if isinstance(x, Tensor) else x for x in args]
        there = {k: v.to(request.param) if isinstance(v, Tensor) else v for k, v in options.items()}
        out = gemma_ext.linear_divergence(*moved, **there)
        if isinstance(out, Tensor):
            return out.cpu()
        return type(out)(*(v.cpu() if isinstance(v, Tensor) else v for v in out))

    return call


def same(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found.double(), wanted, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_without_targets_every_row_counts(loss, impl):
    *heads, _, values, _ = batch()
    same(loss(*heads, impl=impl), values.mean())
    same(loss(*heads, impl=impl, reduction="sum"), values.sum())
    same(loss(*heads, impl=impl, reduction="none"), values)


@pytest.mark.parametrize("impl", IMPLS)
def test_shift_weights_and_cross_entropy(loss, impl):
    *heads, targets, values, _ = batch()
    targets[1, 3] = targets[2, 6] = IGNORE
    weights = torch.rand(B, T)
    e, c, *_ = heads
    s = (e.double() @ c.double().T)[:, :-1]
    label = targets[:, 1:]
    valid = label != IGNORE
    nll = -torch.log_softmax(s, -1).gather(2, label.clamp(min=0)[..., None])[..., 0]
    t = torch.where(valid, weights[:, 1:].double(), 0.0)
    kd = values[:, :-1]
    options = {"impl": impl, "shift": True, "token_weights": weights, "ce_weight": 0.3}
    out = loss(*heads, targets, return_parts=True, **options)
    same(out.divergence, (t * kd).sum() / t.sum())
    same(out.cross_entropy, (t * nll).sum() / t.sum())
    same(out.loss, (t * (kd + 0.3 * nll)).sum() / t.sum())
    same(loss(*heads, targets, reduction="none", **options), t * (kd + 0.3 * nll))
    same(loss(*heads, targets, num_items_in_batch=5, **options), (t * (kd + 0.3 * nll)).sum() / 5)


@pytest.mark.parametrize("impl", IMPLS)
def test_nll_is_that_of_the_loss(impl):
    e, c, teacher_e, teacher_c, y, *_ = batch()
    flat = (e.flatten(0, 1), c, teacher_e.flatten(0, 1), teacher_c, y.flatten())
    rows = divergence_rows(*flat, softcap=5.0, impl=impl)
    for mine, (x, w) in ((rows.nll, flat[:2]), (rows.teacher_nll, flat[2:4])):
        want = gemma_ext.linear_cross_entropy(
            x, w, flat[4], softcap=5.0, reduction="none", impl="reference"
        )
        torch.testing.assert_close(mine, want, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_ends_of_the_mixture_are_the_two_kl(impl):
    *heads, _, _, _ = batch()
    for beta, kind in ((0.0, "forward_kl"), (1.0, "reverse_kl")):
        found = gemma_ext.linear_divergence(*heads, kind="jsd", beta=beta, impl=impl)
        assert torch.equal(found, gemma_ext.linear_divergence(*heads, kind=kind, impl=impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_bounds_and_symmetry(impl):
    x = problem(40, 16, V, 16, spread=8.0)
    mine, theirs = (x.e, x.c), (x.teacher_e, x.teacher_c)
    for kind, bound in (("jsd", torch.tensor(2.0).log()), ("tvd", torch.tensor(1.0))):
        one = divergence_rows(*mine, *theirs, kind=kind, impl=impl).divergence
        two = divergence_rows(*theirs, *mine, kind=kind, impl=impl).divergence
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
        assert (one <= bound * (1 + 1e-6)).all()
        assert (one >= 0.5 * bound).all()  # as far apart as that


@pytest.mark.parametrize("impl", IMPLS)
def test_the_teacher_gets_no_gradient(impl):
    e, c, teacher_e, teacher_c, *_ = batch()
    for t in (e, c, teacher_e, teacher_c):
        t.requires_grad_()
    gemma_ext.linear_divergence(e, c, teacher_e, teacher_c, impl=impl).backward()
    assert e.grad is not None
    assert c.grad is not None
    assert teacher_e.grad is None
    assert teacher_c.grad is None


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_only_what_is_asked_for(needs):
    e, c, teacher_e, teacher_c, *_ = batch()
    e.requires_grad_(needs[0])
    c.requires_grad_(needs[1])
    gemma_ext.linear_divergence(e, c, teacher_e, teacher_c, impl="exact").backward()
    assert (e.grad is not None, c.grad is not None) == needs


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_backward_and_a_refused_second_derivative(kind):
    e, c, teacher_e, teacher_c, *_ = batch()
    e.requires_grad_()
    value = gemma_ext.linear_divergence(e, c, teacher_e, teacher_c, kind=kind, impl="exact")
    (first,) = torch.autograd.grad(value, e, retain_graph=True)
    (again,) = torch.autograd.grad(value, e, create_graph=True)
    assert torch.equal(first, again)
    with pytest.raises(NotImplementedError, match="linear_divergence with impl='reference'"):
        torch.autograd.grad(again.sum(), e)


def test_forward_mode_is_refused():
    e, c, teacher_e, teacher_c, *_ = batch()
    with pytest.raises(NotImplementedError, match="linear_divergence with impl='reference'"):
        torch.func.jvp(
            lambda x: gemma_ext.linear_divergence(x, c, teacher_e, teacher_c, impl="exact"),
            (e,),
            (torch.ones_like(e),),
        )


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_in_one_graph(kind):
    torch._dynamo.reset()

    def call(e, c, teacher_e, teacher_c, y):
        return gemma_ext.linear_divergence(
            e, c, teacher_e, teacher_c, y, kind=kind, shift=True, softcap=5.0, impl="exact"
        )

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    e, c, teacher_e, teacher_c, y, *_ = batch()
    e.requires_grad_(), c.requires_grad_()
    value, want = compiled(e, c, teacher_e, teacher_c, y), call(e, c, teacher_e, teacher_c, y)
    assert torch.equal(value, want)
    for found, wanted in zip(
        torch.autograd.grad(value, (e, c)), torch.autograd.grad(want, (e, c)), strict=True
    ):
        assert torch.equal(found, wanted)
    torch._dynamo.reset()


def test_autocast():
    e, c, teacher_e, teacher_c, *_ = batch()
    e.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        value = gemma_ext.linear_divergence(e, c, teacher_e.bfloat16(), teacher_c, impl="exact")
    value.backward()
    narrow = [t.detach().bfloat16() for t in (e, c, teacher_e, teacher_c)]
    assert value.dtype == e.grad.dtype == torch.float32
    assert torch.equal(value, gemma_ext.linear_divergence(*narrow, impl="exact"))


def test_fakes_have_the_shapes_of_the_kernels():
    *heads, y, _, _ = batch()
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in (*heads, y)]
        out = gemma_ext.linear_divergence(*fakes, reduction="none", shift=1)
    assert (out.shape, out.dtype) == ((B, T - 1), torch.float32)


def test_flops_are_those_of_the_products():
    from torch.utils.flop_counter import FlopCounterMode

    *heads, _, _, _ = batch()
    heads[0].requires_grad_()
    heads[1].requires_grad_()
    mine, theirs = 2 * B * T * V * D, 2 * B * T * V * TEACHER_D
    for kind, sweeps in (("forward_kl", 1), ("jsd", 2)):
        with FlopCounterMode(display=False) as counter:
            gemma_ext.linear_divergence(*heads, kind=kind, impl="exact").backward()
        assert counter.get_total_flops() == sweeps * (mine + theirs) + 3 * mine + theirs


def changed(**changes):
    e, c, teacher_e, teacher_c, y, *_ = batch()
    args = {"e": e, "c": c, "teacher_e": teacher_e, "teacher_c": teacher_c, "targets": y}
    return args | {k: v(args) if callable(v) else v for k, v in changes.items()}


REFUSED = {
    "expected kind to be one of forward_kl, reverse_kl, jsd, tvd, got 'kl'": {"kind": "kl"},
    "expected beta in [0, 1], got 1.5": {"beta": 1.5},
    "expected beta to be a number, got str": {"beta": "half"},
    "expected ce_weight to be a number, got str": {"ce_weight": "some"},
    "expected targets with ce_weight, got None": {"targets": None, "ce_weight": 1.0},
    "expected targets with shift, got None": {"targets": None, "shift": 1},
    "expected temperature 1 with ce_weight, got 2.0": {"temperature": 2.0, "ce_weight": 1.0},
    "expected temperature to be positive, got 0": {"temperature": 0},
    "expected teacher_temperature to be positive, got -1": {"teacher_temperature": -1},
    "expected teacher_softcap to be positive, got 0.0": {"teacher_softcap": 0.0},
    "expected teacher_softcap to be 'same' or a number, got str": {"teacher_softcap": "none"},
    "expected teacher_logit_scale to be 'same' or a number, got NoneType": {
        "teacher_logit_scale": None
    },
    "expected teacher_e to be a tensor, got list": {"teacher_e": [1.0]},
    "expected teacher_e to be float32, bfloat16 or float16 (float64 with impl='reference'), "
    "got torch.float64": {"teacher_e": lambda a: a["teacher_e"].double()},
    "expected teacher_c to be torch.float32 like teacher_e, got torch.bfloat16": {
        "teacher_c": lambda a: a["teacher_c"].bfloat16()
    },
    f"expected teacher_e to be [{B}, {T}, D], got [{B}, {T - 1}, {TEACHER_D}]": {
        "teacher_e": lambda a: a["teacher_e"][:, 1:]
    },
    f"expected teacher_c to be [V, {TEACHER_D}], got [{V}, {TEACHER_D - 1}]": {
        "teacher_c": lambda a: a["teacher_c"][:, 1:]
    },
    f"expected teacher_c to have the {V} rows of c, got {V - 5}": {
        "teacher_c": lambda a: a["teacher_c"][5:]
    },
    f"expected teacher_bias to be [{V}], got [3]": {"teacher_bias": torch.zeros(3)},
    f"expected targets in [0, {V}) or ignore_index -100, got {V} at flat position 0": {
        "targets": torch.full((B, T), V)
    },
    "expected teacher_e on cpu like e, got meta": {
        "teacher_e": lambda a: a["teacher_e"].to("meta")
    },
}


@pytest.mark.parametrize("impl", ["reference", "auto"])
@pytest.mark.parametrize("sentence", REFUSED)
def test_refusals(sentence, impl):
    if impl == "reference" and "float64" in sentence:
        pytest.skip("which takes float64")
    with pytest.raises((TypeError, ValueError)) as refusal:
        gemma_ext.linear_divergence(**changed(**REFUSED[sentence]), impl=impl)
    assert str(refusal.value).startswith(sentence)


def test_divergence_is_checked_where_it_is_named():
    assert Divergence("jsd", 0.0).proper == "forward_kl"
    with pytest.raises(ValueError, match="expected kind"):
        Divergence("kl")


def test_raw_ops_refuse_what_does_not_fit():
    from divergence_samples import SAMPLES

    forward = list(SAMPLES["cce_divergence_forward"](torch.float32, "bare", False))
    backward = list(SAMPLES["cce_divergence_backward"](torch.float32, "full", False))
    for index, change, name in (
        (4, lambda c: c[:, 1:], "teacher: expected c"),
        (4, lambda c: c[1:], "teacher_c"),
        (3, lambda e: e[1:], "targets"),
        (7, lambda kind: 4, "kind"),
    ):
        bad = [change(v) if i == index else v for i, v in enumerate(forward)]
        with pytest.raises(RuntimeError, match=name):
            torch.ops.gemma_ext.cce_divergence_forward(*bad)
    for index, name in ((9, "state"), (10, "masses"), (11, "summary"), (12, "d_divergence")):
        bad = [v[1:] if i == index else v for i, v in enumerate(backward)]
        with pytest.raises(RuntimeError, match=name):
            torch.ops.gemma_ext.cce_divergence_backward(*bad)
