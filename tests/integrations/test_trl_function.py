"""The function with trl's signature: against trl's own, float64, and whole trainers."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from test_trainers import (
    ARGUMENTS,
    assert_same_run,
    run,
    score,
    supervised,
    tokenizer,
    with_fused_head,
)
from tiny_models import assert_same_training, clone, gemma2
from torch import Tensor
from trl.kernels import ChunkedLogProbFunction as Theirs
from trl.trainer import utils

from gemma_ext.integrations import trl
from gemma_ext.integrations._chunked_logprob import OUTPUTS
from gemma_ext.integrations.trl import ChunkedLogProbFunction as Ours

N, H, V = 37, 24, 700
HEADS = {
    "plain": (1.0, None, 1.0),
    "capped": (0.8, 5.0, 1.0),
    "scaled": (1.3, 30.0, 0.4),
}


def problem(dtype: torch.dtype = torch.float32, n: int = N, seed: int = 0) -> list[Tensor]:
    """hidden, weight, bias, targets."""
    g = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (
        torch.randn(*size, generator=g).to(dtype) for size in ((n, H), (V, H), (V,))
    )
    return [hidden, weight * 0.7, bias, torch.randint(0, V, (n,), generator=g)]


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [x.detach().clone().requires_grad_() for x in tensors]


def truth(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, head: tuple):
    """The five fields in float64, differentiable."""
    temperature, cap, scale = head
    s = hidden.double() @ weight.double().T
    if bias is not None:
        s = s + bias.double()
    s = scale * s
    s = (s if cap is None else cap * torch.tanh(s / cap)) / temperature
    log_p = torch.log_softmax(s, -1)
    return (
        log_p.gather(1, targets[:, None])[:, 0],
        -(log_p.exp() * log_p).sum(-1),
        torch.logsumexp(2 * log_p, -1),
        s.mean(-1),
        s.argmax(-1) == targets,
    )


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("name", HEADS)
def test_fields_and_gradients_are_those_of_trl_and_of_float64(name, biased):
    temperature, cap, scale = HEADS[name]
    *tensors, targets = problem()
    tensors = tensors if biased else tensors[:2]
    results = []
    for function in (Ours, Theirs):
        mine = leaves(*tensors)
        bias = mine[2] if len(mine) == 3 else None
        out = function.apply(*mine[:2], bias, targets, temperature, 256, cap, scale, OUTPUTS)
        g = torch.Generator().manual_seed(1)
        u, h = torch.randn(2, N, generator=g)
        results.append((out, torch.autograd.grad((u * out[0] + h * out[1]).sum(), mine)))
    mine = leaves(*(x.double() for x in tensors))
    bias = mine[2] if len(mine) == 3 else None
    want = truth(*mine[:2], bias, targets, HEADS[name])
    grads = torch.autograd.grad((u * want[0] + h * want[1]).sum(), mine)
    for out, found in results:
        for a, b in zip(out[:4], want[:4], strict=True):
            assert a.dtype == torch.float32
            torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=2e-5)
        assert torch.equal(out[4], want[4])
        for a, b in zip(found, grads, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=2e-5)
    for x in results[0][0][2:]:
        assert not x.requires_grad


def test_top1_takes_the_first_of_equals():
    hidden, weight, _, _ = problem()
    weight[[3, 9, 400]] = 10.0 * hidden[0]
    targets = torch.tensor([3, 9, 400])
    for function in (Ours, Theirs):
        out = function.apply(
            hidden[:1].expand(3, H), weight, None, targets, 1.0, 256, None, 1.0, OUTPUTS
        )
        assert out[4].tolist() == [True, False, False]


def test_no_token_at_all():
    *tensors, targets = problem(n=0)
    mine = leaves(*tensors)
    out = Ours.apply(*mine, targets, 0.7, 256, 30.0, 1.0, OUTPUTS)
    assert [x.shape for x in out] == [(0,)] * 5
    (out[0].sum() + out[1].sum()).backward()
    for x in mine:
        assert x.grad.shape == x.shape
        assert not x.grad.any()


@pytest.mark.parametrize("outputs", [(), ("entropy",), ("mean_logits",), ("is_top1",)])
def test_what_is_not_asked_for_is_none(outputs):
    hidden, weight, bias, targets = problem()
    out = Ours.apply(hidden, weight, bias, targets, 1.0, 256, None, 1.0, outputs)
    asked = [True, *(name in outputs for name in OUTPUTS)]
    assert [x is not None for x in out] == asked


def test_defaults_are_those_of_trl():
    args = problem()
    for a, b in zip(Ours.apply(*args, 1.0, 256), Theirs.apply(*args, 1.0, 256), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("which", [0, 1])
def test_one_upstream_gradient_may_be_missing(which):
    *tensors, targets = problem()
    mine, theirs = leaves(*tensors), leaves(*(x.double() for x in tensors))
    out = Ours.apply(*mine, targets, 0.8, 256, 5.0)
    got = torch.autograd.grad(out[which].sum(), mine)
    want = torch.autograd.grad(truth(*theirs, targets, HEADS["capped"])[which].sum(), theirs)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=2e-5)


def test_a_frozen_head_gets_no_gradient():
    hidden, weight, _, targets = problem()
    hidden.requires_grad_()
    out = Ours.apply(hidden, weight, None, targets, 1.0, 256)
    out[0].sum().backward()
    assert weight.grad is None
    assert hidden.grad.any()


def test_nothing_is_kept_without_gradients():
    *tensors, targets = problem()
    mine = leaves(*tensors)
    with torch.no_grad():
        out = Ours.apply(*mine, targets, 1.0, 256)
    assert not any(x.requires_grad for x in out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast_decides_the_dtype(dtype):
    *tensors, targets = problem(dtype)
    mine, low = leaves(*tensors), leaves(*(x.bfloat16() for x in tensors))
    with torch.autocast("cpu", torch.bfloat16):
        out = Ours.apply(*mine, targets, 1.0, 256)
    want = Ours.apply(*low, targets, 1.0, 256)
    for a, b in zip(out, want, strict=True):
        assert torch.equal(a, b)
    grads = torch.autograd.grad(out[0].sum() + out[1].sum(), mine)
    wanted = torch.autograd.grad(want[0].sum() + want[1].sum(), low)
    for a, b in zip(grads, wanted, strict=True):
        assert a.dtype == dtype
        assert torch.equal(a.bfloat16(), b)


def test_a_head_of_another_dtype_than_its_hidden_states():
    hidden, weight, bias, targets = problem()
    low = leaves(hidden.bfloat16(), weight, bias)
    out = Ours.apply(*low, targets, 1.0, 256)
    want = Ours.apply(low[0], weight.bfloat16(), bias.bfloat16(), targets, 1.0, 256)
    assert torch.equal(out[0], want[0])
    out[0].sum().backward()
    assert [x.grad.dtype for x in low] == [torch.bfloat16, torch.float32, torch.float32]


def test_float64_is_computed_in_float32():
    *tensors, targets = problem(torch.float64)
    mine = leaves(*tensors)
    out = Ours.apply(*mine, targets, 0.8, 256, 5.0)
    want = truth(*tensors, targets, HEADS["capped"])
    torch.testing.assert_close(out[0].double(), want[0], rtol=2e-5, atol=2e-5)
    out[0].sum().backward()
    assert all(x.grad.dtype == torch.float64 for x in mine)


def test_ignored_labels_take_no_part():
    hidden, weight, bias, targets = problem()
    targets[::3] = -100
    hidden[::3] = torch.nan
    mine = leaves(hidden, weight, bias)
    out = Ours.apply(*mine, targets, 1.0, 256)
    for x in out:
        assert not x[::3].any()
    (out[0].sum() + out[1].sum()).backward()
    assert all(torch.isfinite(x.grad).all() for x in mine)


def test_a_second_derivative_is_refused():
    hidden, weight, _, targets = problem()
    hidden.requires_grad_()
    out = Ours.apply(hidden, weight, None, targets, 1.0, 256)
    (grad,) = torch.autograd.grad(out[0].sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


def test_labels_outside_the_vocabulary_are_named():
    hidden, weight, _, targets = problem()
    targets[5] = V
    with pytest.raises(ValueError, match=f"got {V} at flat position 5"):
        Ours.apply(hidden, weight, None, targets, 1.0, 256)


def bias_of_rounding(spread: float) -> dict[str, Tensor]:
    """Differences to float64 of the same bfloat16 inputs, of targets drawn from the policy.

    Logits have a standard deviation of `spread` before a cap of 30.
    """
    n, v, width = 512, 4096, 64
    g = torch.Generator().manual_seed(11)
    hidden = torch.randn(n, width, generator=g).bfloat16()
    weight = (torch.randn(v, width, generator=g) * spread / width**0.5).bfloat16()
    s = 30.0 * torch.tanh(hidden.double() @ weight.double().T / 30.0)
    targets = torch.multinomial(torch.softmax(s, -1), 1, generator=g)[:, 0]
    want = torch.log_softmax(s, -1).gather(1, targets[:, None])[:, 0]
    return {
        name: function.apply(hidden, weight, None, targets, 1.0, 4096, 30.0)[0].double() - want
        for name, function in (("ours", Ours), ("theirs", Theirs))
    }


@pytest.mark.parametrize("spread", [4.0, 6.0, 10.0])
def test_logits_are_not_rounded_on_their_way(spread):
    """A logit of 16 to 32 in bfloat16 is a multiple of 1/8: what that does to log-probabilities."""
    error = bias_of_rounding(spread)
    assert float(error["ours"].abs().max()) < 2e-5
    assert float(error["theirs"].abs().mean()) > 5e-3
    assert float(error["theirs"].abs().max()) > 2e-2
    # the same policy, scored both ways: the distance that a sampler's log-probabilities would show
    k2 = (error["theirs"] - error["ours"]).square().mean() / 2
    assert float(k2) > 5e-5
    assert float(error["ours"].square().mean() / 2) < 1e-10


@pytest.fixture
def installed():
    trl.install(impl="exact")
    yield
    trl.uninstall()
    assert utils._ChunkedLogProbFunction is Theirs


def test_install_and_uninstall(installed):
    assert issubclass(utils._ChunkedLogProbFunction, Ours)
    trl.install(impl="exact", memory="lean")
    assert utils._ChunkedLogProbFunction.method.lean
    trl.uninstall()
    assert utils._ChunkedLogProbFunction is Theirs
    trl.uninstall()
    with pytest.raises(ValueError, match="expected impl to be one of"):
        trl.install(impl="fastest")
    assert utils._ChunkedLogProbFunction is Theirs


def test_somebody_elses_function_is_left_alone(installed, monkeypatch):
    class Other(torch.autograd.Function):
        pass

    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", Other)
    trl.uninstall()
    assert utils._ChunkedLogProbFunction is Other


def test_a_trl_without_the_function_is_refused(monkeypatch):
    monkeypatch.delattr(utils, "_ChunkedLogProbFunction")
    with pytest.raises(TypeError, match=r"expected trl >= 1\.16, which scores tokens in"):
        trl.install()


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_a_model_is_scored_as_by_trl(autocast):
    options = {"temperature": 0.7, "outputs": ("log_probs", *OUTPUTS)}
    model = gemma2()

    def scored():
        torch.manual_seed(2)
        return score(with_fused_head(clone(model), **options), autocast)

    expected, gradients = scored()
    trl.install(impl="exact")
    try:
        got, ours = scored()
    finally:
        trl.uninstall()
    # trl rounds its logits where autocast is on
    tolerance = 5e-2 if autocast else 1e-4
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    assert_same_training(ours, gradients, tolerance=tolerance)


def test_a_whole_trainer_takes_the_same_steps(tmp_path):
    model = gemma2()
    expected = run(supervised(clone(model), tmp_path))
    trainer = supervised(clone(model), tmp_path)
    trl.install(impl="exact")
    try:
        got = run(trainer)
    finally:
        trl.uninstall()
    assert_same_run(got, expected)
    for ours, theirs in zip(got.logs, expected.logs, strict=True):
        for name in ("entropy", "mean_token_accuracy"):
            assert float(ours[name]) == pytest.approx(float(theirs[name]), rel=1e-4, abs=1e-4)


def by_groups(kind: str, model, tmp_path):
    """GRPO or RLOO, drawing from the model itself."""
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    settings, trainer = {
        "grpo": (GRPOConfig, GRPOTrainer), "rloo": (RLOOConfig, RLOOTrainer),
    }[kind]  # fmt: skip
    arguments = settings(
        tmp_path, bf16=False, gradient_checkpointing=False, num_generations=4, temperature=0.7,
        max_completion_length=6, beta=0.0, **ARGUMENTS,
    )  # fmt: skip
    return trainer(
        model,
        reward_funcs=lambda completions, **_: [float(len(set(text))) for text in completions],
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": f"w{5 + i} w9"} for i in range(8)]),
        processing_class=tokenizer(),
    )


def by_labels(model, tmp_path):
    from trl import KTOConfig, KTOTrainer

    rows = [
        {"prompt": f"w{5 + i} w9", "completion": f"w{20 + i} w7", "label": i % 2 == 0}
        for i in range(8)
    ]
    arguments = KTOConfig(tmp_path, bf16=False, gradient_checkpointing=False, **ARGUMENTS)
    return KTOTrainer(
        model,
        ref_model=gemma2(seed=1),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
    )


@pytest.mark.parametrize("kind", ["grpo", "rloo", "kto"])
def test_trainers_of_preferences_take_the_same_steps(kind, tmp_path, monkeypatch):
    model = gemma2()
    calls = []
    ours = trl.ChunkedLogProbFunction.apply

    def trainer():
        torch.manual_seed(7)
        if kind == "kto":
            return by_labels(clone(model), tmp_path)
        return by_groups(kind, clone(model), tmp_path)

    expected = run(trainer())
    made = trainer()
    trl.install(impl="exact")
    monkeypatch.setattr(
        utils._ChunkedLogProbFunction, "apply", lambda *args: (calls.append(1), ours(*args))[1]
    )
    try:
        got = run(made)
    finally:
        trl.uninstall()
    assert calls
    assert any(bool(g.abs().max() > 1e-4) for g in expected.gradients.values())
    assert_same_run(got, expected)


@pytest.mark.parametrize(
    "wanted", [(True, False, False), (False, True, False), (False, False, True)]
)
def test_some_of_the_inputs_may_be_frozen(wanted):
    *tensors, targets = problem()
    mine = [x.clone().requires_grad_(w) for x, w in zip(tensors, wanted, strict=True)]
    all_of_them = leaves(*tensors)
    for args in (mine, all_of_them):
        out = Ours.apply(*args, targets, 0.8, 256, 5.0)
        (out[0] - 0.1 * out[1]).sum().backward()
    for x, y, w in zip(mine, all_of_them, wanted, strict=True):
        assert (x.grad is not None) == w
        assert not w or torch.equal(x.grad, y.grad)
