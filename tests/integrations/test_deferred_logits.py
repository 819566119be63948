"""The algebra of deferred logits: every allowed step equals the same step on real logits."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_outputs import CausalLMOutput

from gemma_ext.integrations._labelled_forward import resolve_logits
from gemma_ext.integrations.trl import per_token
from gemma_ext.nn._defer_head import defer_head, prepare_head, release_head
from gemma_ext.nn._deferred_logits import (
    DeferredLogits,
    DeferredLogitsError,
    LossOptions,
)

B, T, D, V = 2, 5, 7, 11
OPTIONS = LossOptions("Toy", impl="reference")
BIAS = torch.linspace(-2, 3, V)

STEPS = {
    "nothing": lambda x: x,
    "scale": lambda x: 3 * (x * 0.5) / 4,
    "softcap": lambda x: torch.tanh(x / 2.5) * 2.5,
    "softcap as a function": lambda x: 2.0 * F.tanh(x.float() / 2.0),
    "scaled softcap": lambda x: torch.mul((x * 0.25 / 1.5).tanh() * 1.5, 2),
    "tensor scale": lambda x: torch.tensor(0.3) * x * torch.tensor([0.5]),
    "bias": lambda x: x + BIAS,
    "bias of one row": lambda x: BIAS.view(1, V) + x,
    "bias, scaled": lambda x: (x + BIAS) * 3.0 / torch.tensor(2.0),
    "scaled, then bias": lambda x: torch.add(0.25 * x, BIAS) + 2 * BIAS.view(1, 1, V),
    "bias inside a cap": lambda x: torch.tanh((x + BIAS) / 2.5) * 2.5,
    "scaled bias inside a scaled cap": lambda x: ((x * 0.5 + BIAS) * 2.0 / 3.0).tanh() * 3.0 * 0.5,
    "bias of a shorter vocabulary": lambda x: x[..., :6] + BIAS[:6],
    "bias of another dtype": lambda x: x + BIAS.double(),
    "methods": lambda x: x.mul(0.5).div(2).add(BIAS),
    "functions with keywords": lambda x: torch.div(input=torch.multiply(x, other=3), other=2.0),
    "tensor scale of a cap": lambda x: x.tanh() * torch.tensor(3.0),
    "casts": lambda x: x.to(torch.float32).to("cpu").contiguous().type_as(torch.zeros(1)),
    "shift": lambda x: x[..., :-1, :],
    "last positions": lambda x: x[:, -3:, :].contiguous(),
    "row": lambda x: x[1],
    "positions": lambda x: x[:, torch.tensor([0, 3]), :],
    "mask": lambda x: x[torch.arange(B * T).view(B, T) % 3 == 0],
    "leading ellipsis": lambda x: x[1, ...],
    "padded vocabulary": lambda x: x[..., :6],
    "flatten": lambda x: x.flatten(0, 1),
    "reshape": lambda x: torch.reshape(x, (T, B, V)),
    "view": lambda x: x.view(B * T, -1),
    "view of positions": lambda x: x.view(-1, 1, V),
}


def toy(bias: bool) -> tuple[torch.Tensor, nn.Linear]:
    torch.manual_seed(0)
    return torch.randn(B, T, D, requires_grad=True), nn.Linear(D, V, bias=bias)


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("step", STEPS)
def test_step_equals_the_step_on_logits(step, bias):
    hidden, head = toy(bias)
    true = STEPS[step](head(hidden))
    with defer_head(head, OPTIONS):
        deferred = STEPS[step](head(hidden))
    assert isinstance(deferred, DeferredLogits)
    assert deferred.shape == true.shape
    assert deferred.ndim == deferred.dim() == true.ndim
    assert deferred.size(-1) == true.size(-1)
    assert len(deferred) == len(true)
    assert (deferred.dtype, deferred.device) == (true.dtype, true.device)
    torch.testing.assert_close(deferred.materialize(), true)

    flat = true.float().reshape(-1, true.shape[-1])
    labels = torch.arange(flat.shape[0]) % flat.shape[1]
    parameters = (hidden, *head.parameters())
    expected = F.cross_entropy(flat, labels)
    loss = F.cross_entropy(deferred.view(-1, true.shape[-1]), labels)
    torch.testing.assert_close(loss, expected)
    gradients = torch.autograd.grad(loss, parameters)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, parameters))
    torch.testing.assert_close(torch.logsumexp(deferred, -1), true.float().logsumexp(-1))


def test_dividing_by_a_cap_and_multiplying_again_is_exact():
    hidden, head = toy(False)
    for cap in (30.0, 49.0, 0.1, 7.3):
        with defer_head(head, OPTIONS):
            arguments = (torch.tanh(head(hidden) / cap) * cap).head()
        assert arguments["logit_scale"] == 1.0
        assert arguments["softcap"] == cap
        assert arguments["c"] is head.weight


def test_trained_scale_gets_its_gradient():
    hidden, head = toy(True)
    scale = torch.tensor(0.7, requires_grad=True)
    labels = torch.arange(B * T)
    expected = torch.autograd.grad(
        F.cross_entropy((head(hidden) * scale).view(-1, V), labels), scale
    )
    with defer_head(head, OPTIONS):
        loss = nn.CrossEntropyLoss()((head(hidden) * scale).view(-1, V), labels)
    torch.testing.assert_close(torch.autograd.grad(loss, scale), expected)


@pytest.mark.parametrize("softcap", [None, 2.5], ids=["plain", "capped"])
def test_trained_bias_gets_its_gradient(softcap):
    hidden, head = toy(True)
    row = BIAS.clone().requires_grad_()
    labels = torch.arange(B * T)

    def loss(logits):
        logits = (logits * 0.5 + row) * 3.0
        logits = logits if softcap is None else torch.tanh(logits / softcap) * softcap
        return F.cross_entropy(logits.view(-1, V), labels)

    parameters = (row, hidden, *head.parameters())
    expected = torch.autograd.grad(loss(head(hidden)), parameters)
    with defer_head(head, OPTIONS):
        got = loss(head(hidden))
    torch.testing.assert_close(torch.autograd.grad(got, parameters), expected)


def assign(logits):
    logits[..., 3] = -1e9


REFUSED = {
    "addition": [
        lambda x: x + 1,
        lambda x: 1 + x,
        lambda x: x + torch.zeros(T, V),
        lambda x: x + torch.zeros(B, T, V),
        lambda x: x + torch.zeros(1),
        lambda x: x + torch.zeros(1, 1, 1, V),
        lambda x: x + torch.zeros(V, dtype=torch.int64),
        lambda x: x.tanh() + BIAS,
        lambda x: sum([x, x]),
    ],
    "add with alpha": [lambda x: torch.add(x, BIAS, alpha=2), lambda x: x.add(BIAS, alpha=2)],
    "multiplication": [lambda x: x * torch.ones(V), lambda x: x * x, lambda x: x * True],
    "division": [lambda x: x / BIAS],
    "div with rounding_mode": [lambda x: torch.div(x, 2, rounding_mode="floor")],
    "a reciprocal": [lambda x: 1 / x],
    r"\w*div": [lambda x: torch.ones(1) / x, lambda x: torch.div(torch.ones(1), x)],
    "subtraction": [lambda x: x - 1.0, lambda x: 1.0 - x, lambda x: x - BIAS],
    r"\w*sub\w*": [lambda x: BIAS - x],
    "negation": [lambda x: -x],
    "an absolute value": [lambda x: abs(x)],
    "a power": [lambda x: x**2, lambda x: 2**x],
    "a remainder": [lambda x: x % 2],
    "floor division": [lambda x: x // 2],
    "a matrix product": [lambda x: x @ torch.ones(V, 2)],
    "a comparison": [lambda x: x > 0, lambda x: x == 0, lambda x: x != 0, lambda x: x >= 0],
    "a bitwise operation": [lambda x: x & 1, lambda x: ~x],
    "item assignment": [assign],
    "conversion to a number": [bool, float, int],
    "conversion to an array": [np.asarray],
    "cat": [lambda x: torch.cat([x, x]), lambda x: torch.cat(tensors=(torch.ones(B, T, V), x))],
    "stack": [lambda x: torch.stack([x, x])],
    "a second tanh": [lambda x: x.tanh().tanh()],
    r"view\(-1\)": [lambda x: x.view(-1)],
    "indexing of the vocabulary": [lambda x: x[..., 0]],
    "softmax": [lambda x: torch.softmax(x, -1), lambda x: F.softmax(x, dim=-1)],
    "where": [lambda x: torch.where(torch.ones(B, T, V, dtype=torch.bool), x, 0.0)],
    "add_": [lambda x: torch.zeros(B, T, V).add_(x)],
    "logsumexp over dim 0": [lambda x: x.logsumexp(0)],
    "cross_entropy": [
        lambda x: F.cross_entropy(x, torch.zeros(B, V, dtype=torch.long)),
        lambda x: F.cross_entropy(x[0], torch.rand(T, V)),
        lambda x: F.cross_entropy(torch.ones(T, V), x[0]),
    ],
    r"flatten\(0, -1\)": [lambda x: x.flatten()],
    r"Tensor\.sort": [lambda x: x.sort()],
    r"Tensor\.masked_fill_": [lambda x: x.masked_fill_(x, 0)],
}


@pytest.mark.parametrize(
    ("name", "step"),
    [(name, step) for name, steps in REFUSED.items() for step in steps],
)
def test_other_steps_are_refused_by_name(name, step):
    hidden, head = toy(False)
    message = (
        f"^Toy or its head applies {name}.* to its logits, which has no fused form; "
        "unpatch the model to train it with materialised logits$"
    )
    with defer_head(head, OPTIONS):
        deferred = head(hidden)
    with pytest.raises(DeferredLogitsError, match=message):
        step(deferred)


def test_unknown_attributes_are_refused():
    hidden, head = toy(False)
    with defer_head(head, OPTIONS):
        deferred = head(hidden)
    assert not hasattr(deferred, "sort")
    assert getattr(deferred, "is_sparse", None) is None
    with pytest.raises(AttributeError, match=r"^no_such_thing$"):
        deferred.no_such_thing  # noqa: B018


def test_only_the_head_is_deferred():
    hidden, head = toy(False)
    other = nn.Linear(D, V)
    with defer_head(head, OPTIONS):
        assert isinstance(head(hidden), DeferredLogits)
        assert isinstance(other(hidden), torch.Tensor)
    assert isinstance(head(hidden), torch.Tensor)
    with defer_head(head, OPTIONS):
        assert isinstance(head(hidden), DeferredLogits)
    assert len(head._forward_hooks) == len(head._forward_pre_hooks) == 1
    release_head(head)
    assert not head._forward_hooks
    assert not head._forward_pre_hooks
    assert not head._forward_hooks_always_called


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["before", "inside", "after"])
@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
def test_an_interrupted_head_leaves_nothing_behind(error, place, first):
    hidden, head = toy(False)
    prepare_head(head)

    def fail(*args):
        raise error

    if place == "before":
        head.register_forward_pre_hook(fail, prepend=first)
    elif place == "after":
        head.register_forward_hook(fail, prepend=first)
    else:
        head.forward = fail
    with pytest.raises(error), defer_head(head, OPTIONS):
        head(hidden)
    assert type(nn.Linear(D, V)(hidden)) is torch.Tensor
    release_head(head)
    head._forward_pre_hooks.clear()
    head._forward_hooks.clear()
    vars(head).pop("forward", None)
    assert type(head(hidden)) is torch.Tensor
    with defer_head(head, OPTIONS):
        assert isinstance(head(hidden), DeferredLogits)


def test_a_thread_defers_for_itself():
    hidden, head = toy(False)
    inside, done = threading.Event(), threading.Event()
    found = {}

    def score():
        inside.wait(10)
        found["head"], found["other"] = type(head(hidden)), type(nn.Linear(D, V)(hidden))
        done.set()

    def pause(module, args):
        if threading.current_thread() is threading.main_thread():
            inside.set()
            done.wait(10)

    thread = threading.Thread(target=score)
    thread.start()
    prepare_head(head)
    head.register_forward_pre_hook(pause)
    with defer_head(head, OPTIONS):
        assert isinstance(head(hidden), DeferredLogits)
    thread.join()
    assert found == {"head": torch.Tensor, "other": torch.Tensor}


def test_blocks_may_be_nested():
    hidden, head = toy(False)
    other = nn.Linear(D, V)
    with defer_head(head, OPTIONS):
        with defer_head(other, OPTIONS):
            assert isinstance(other(hidden), DeferredLogits)
            assert type(head(hidden)) is torch.Tensor
        assert isinstance(head(hidden), DeferredLogits)
        assert type(other(hidden)) is torch.Tensor


def test_precision_is_that_of_the_head_not_of_the_loss():
    hidden, head = toy(True)
    labels = torch.arange(B * T)
    with torch.autocast("cpu", torch.bfloat16), defer_head(head, OPTIONS):
        low = head(hidden).view(-1, V)
        with torch.autocast("cpu", enabled=False):
            full = head(hidden).view(-1, V)
        assert (low.dtype, full.dtype) == (torch.bfloat16, torch.float32)
        precise = F.cross_entropy(full, labels)
        rounded = F.cross_entropy(low, labels)
    expected = F.cross_entropy(head(hidden).view(-1, V), labels)
    torch.testing.assert_close(precise, expected, rtol=1e-6, atol=0)
    assert abs(rounded - expected) > 1e-5
    torch.testing.assert_close(full.materialize(), head(hidden).view(-1, V))
    torch.testing.assert_close(F.cross_entropy(low.in_float32(), labels), expected)


def test_outputs_within_outputs_hold_no_deferred_logits():
    hidden, head = toy(True)
    with defer_head(head, OPTIONS):
        deferred = head(hidden)
    inner = CausalLMOutput(loss=torch.ones(()), logits=deferred, hidden_states=(hidden,))
    output = {"inner": inner, "both": (deferred, hidden, None), "rows": [deferred]}
    kept = resolve_logits(output, drop=False)
    true = head(hidden)
    for logits in (kept["inner"].logits, kept["both"][0], kept["rows"][0]):
        torch.testing.assert_close(logits, true)
    dropped = resolve_logits(output, drop=True)
    assert type(dropped["inner"]) is CausalLMOutput
    assert dropped["inner"].logits is None
    assert dropped["inner"].hidden_states[0] is hidden
    assert dropped["both"] == (hidden, None)
    assert dropped["rows"] == []


def test_per_token_fields_of_trl():
    hidden, head = toy(True)
    temperature = 0.7
    logits = torch.tanh(head(hidden) / 2.0) * 2.0 / temperature
    labels = torch.arange(B * T).view(B, T) % V
    labels[0, 0] = -100
    keep = labels != -100
    logp = logits.log_softmax(-1)
    target = labels.clamp(min=0)[..., None]
    expected = {
        "log_probs": logp.gather(-1, target)[..., 0],
        "entropy": -(logp.exp() * logp).sum(-1),
        "is_top1": logits.argmax(-1) == labels,
        "log_sum_sq_probs": logp.exp().square().sum(-1).log(),
        "mean_logits": logits.mean(-1),
    }
    with defer_head(head, OPTIONS):
        deferred = torch.tanh(head(hidden) / 2.0) * 2.0 / temperature
    fields = per_token(deferred, labels, tuple(expected))
    assert fields.keys() == expected.keys()
    for name, value in expected.items():
        assert fields[name].shape == labels.shape
        torch.testing.assert_close(fields[name], value.masked_fill(~keep, 0))
