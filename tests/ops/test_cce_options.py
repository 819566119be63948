"""Every loss option against float64, alone and together."""

from __future__ import annotations

import pytest
import torch
from cce_impls import KERNELS, Impl
from cce_oracle import IGNORE, Problem, assert_close, check, expected, problem, run

N, D, V = 37, 48, 600


def class_weights() -> torch.Tensor:
    w = torch.rand(V, generator=torch.Generator().manual_seed(5)) + 0.1
    w[::7] = 0
    return w


def token_weights(*shape: int) -> torch.Tensor:
    w = torch.rand(*shape, generator=torch.Generator().manual_seed(6)) * 2
    w.view(-1)[::5] = 0
    return w


SINGLE = {
    "softcap": {"softcap": 4.0},
    "logit_scale": {"logit_scale": 0.37},
    "negative_scale": {"logit_scale": -1.5},
    "temperature": {"temperature": 2.5},
    "cold": {"temperature": 0.3},
    "scale_cap_temperature": {"logit_scale": 1.7, "softcap": 3.0, "temperature": 0.6},
    "smoothing": {"label_smoothing": 0.1},
    "all_smoothing": {"label_smoothing": 1.0},
    "smoothing_capped": {"label_smoothing": 0.2, "softcap": 3.0, "temperature": 0.7},
    "z_loss": {"z_loss": 1e-2},
    "z_loss_capped": {"z_loss": 0.3, "softcap": 3.0, "temperature": 0.7},
    "weight": {"weight": class_weights()},
    "weight_smoothing": {"weight": class_weights(), "label_smoothing": 0.1},
    "weight_smoothing_capped": {
        "weight": class_weights(),
        "label_smoothing": 0.3,
        "softcap": 3.0,
        "logit_scale": 1.3,
        "temperature": 0.8,
    },
    "token_weights": {"token_weights": token_weights(N)},
    "num_items": {"num_items_in_batch": 11},
    "num_items_tensor": {"num_items_in_batch": torch.tensor(11)},
    "both_weights": {"weight": class_weights(), "token_weights": token_weights(N)},
}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", SINGLE)
def test_option(impl, name, reduction):
    options = SINGLE[name] | {"reduction": reduction}
    if "num_items_in_batch" in options and reduction != "mean":
        options.pop("num_items_in_batch")
    p = problem(N, D, V, ignored=0.25)
    check(run(impl.loss, p, **options), expected(p, **options), scale=2)


@pytest.mark.parametrize("bias", [False, True], ids=["nobias", "bias"])
def test_everything_at_once(impl, bias):
    p = problem((3, 13), D, V, bias=bias, ignored=0.2, seed=3)
    options = {
        "softcap": 6.0,
        "logit_scale": 1.4,
        "temperature": 0.8,
        "label_smoothing": 0.05,
        "z_loss": 1e-3,
        "token_weights": token_weights(3, 13),
        "shift": 2,
        "reduction": "sum",
    }
    check(run(impl.loss, p, **options), expected(p, **options), scale=2)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shift", [0, 1, True, 3, 8])
def test_shift(impl, shift, reduction):
    """Position t predicts target t + shift of its own sequence; shift 8 leaves one position."""
    p = problem((3, 9), 16, 300, ignored=0.2, seed=int(shift))
    p.targets[:, -1] = 5
    got = run(impl.loss, p, shift=shift, reduction=reduction)
    check(got, expected(p, shift=int(shift), reduction=reduction))
    assert torch.count_nonzero(got[1]["e"][:, 9 - int(shift) :]) == 0
    if reduction == "none":
        assert got[0].shape == (3, 9 - int(shift))


def test_shift_outputs_have_the_shifted_shape(impl):
    p = problem((2, 6), 16, 300, seed=9)
    options = {"shift": 2, "reduction": "none"}
    got = run(impl.loss, p, return_lse=True, return_entropy=True, return_argmax=True, **options)
    want = expected(p, **options)
    check(got, want)
    assert torch.equal(got[0].argmax, want[0].argmax)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_weights_agree_with_torch(impl, reduction, smoothing):
    """torch's own conventions for class weights, smoothing and ignored rows."""
    p = problem(N, D, V, ignored=0.25, seed=4)
    leaves = p.leaves(torch.float64)
    logits = leaves["e"] @ leaves["c"].T + leaves["bias"]
    want = torch.nn.functional.cross_entropy(
        logits,
        p.targets,
        weight=class_weights().double(),
        ignore_index=IGNORE,
        reduction=reduction,
        label_smoothing=smoothing,
    )
    got, grads = run(
        impl.loss,
        p,
        weight=class_weights(),
        label_smoothing=smoothing,
        reduction=reduction,
    )
    assert_close(got, want, rtol=1e-5)
    true = torch.autograd.grad(want.sum(), list(leaves.values()))
    for name, grad in zip(leaves, true, strict=True):
        assert_close(grads[name], grad, rtol=4e-5, what=f"d{name}")


def test_shift_never_crosses_a_sequence(impl):
    """Moving a sequence to another place in the batch moves its losses with it."""
    p = problem((4, 7), 16, 300, seed=7)
    order = torch.tensor([2, 0, 3, 1])
    whole = impl.loss(p.e, p.c, p.targets, shift=1, reduction="none")
    moved = impl.loss(p.e[order], p.c, p.targets[order], shift=1, reduction="none")
    assert torch.allclose(whole[order], moved, rtol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shift", [4, 5, 9])
def test_sequence_no_longer_than_the_shift_scores_nothing(impl, shift, reduction):
    p = problem((3, 4), 8, 20)
    loss, grads = run(impl.loss, p, shift=shift, reduction=reduction)
    assert loss.shape == ((3, 0) if reduction == "none" else ())
    assert loss.sum().item() == 0
    assert all(torch.count_nonzero(g) == 0 for g in grads.values())


def test_shift_that_means_nothing_is_refused(impl):
    p = problem(5, 8, 20)
    with pytest.raises(ValueError, match="shift"):
        impl.loss(p.e, p.c, p.targets, shift=-1)
    with pytest.raises(ValueError, match="shift"):
        impl.loss(p.e[0], p.c, p.targets[0], shift=1)
    with pytest.raises(TypeError, match="shift"):
        impl.loss(p.e, p.c, p.targets, shift=1.0)


def test_num_items_matches_gradient_accumulation(impl):
    """Two micro-batches divided by the total count add up to one batch."""
    p = problem(24, D, V, ignored=0.3, seed=8)
    count = int((p.targets != IGNORE).sum())
    whole, grads = run(impl.loss, p)
    halves = [Problem(p.e[i], p.c, p.targets[i], p.bias) for i in (slice(0, 9), slice(9, 24))]
    parts = [run(impl.loss, h, num_items_in_batch=count) for h in halves]
    assert_close(sum(part[0] for part in parts), whole.double(), rtol=1e-6)
    assert_close(parts[0][1]["c"] + parts[1][1]["c"], grads["c"].double(), rtol=1e-5)
    assert_close(torch.cat([part[1]["e"] for part in parts]), grads["e"].double(), rtol=1e-5)


@pytest.mark.parametrize("impl", KERNELS, ids=str, indirect=True)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_lean_values(impl, reduction):
    p = problem(40, 24, 600, ignored=0.1)
    options = {"softcap": 5.0, "reduction": reduction}
    check(run(impl.loss, p, memory="lean", **options), expected(p, **options))


@pytest.mark.cpu
@pytest.mark.parametrize("impl", [*KERNELS, Impl("auto", "auto")], ids=str, indirect=True)
def test_the_cpu_has_one_form_of_memory(impl):
    p = problem(40, 24, 600, dtype=torch.bfloat16, ignored=0.1)
    usual, lean = (run(impl.loss, p, softcap=5.0, memory=memory) for memory in ("default", "lean"))
    assert torch.equal(usual[0], lean[0])
    for name, g in usual[1].items():
        assert torch.equal(g, lean[1][name])


@pytest.mark.parametrize("call", ["loss", "logprobs", "rows"])
def test_an_unknown_memory_is_refused(impl, call):
    p = problem(4, 8, 20)
    sentence = "expected memory to be one of default, lean, got 'small'"
    with pytest.raises(ValueError, match=sentence):
        getattr(impl, call)(p.e, p.c, p.targets, memory="small")
