"""The algebra of deferred logits: every allowed step equals the same step on real logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gemma_ext.integrations._defer_head import defer_head, release_head
from gemma_ext.integrations._deferred_logits import (
    DeferredLogits,
    DeferredLogitsError,
    LossOptions,
)
from gemma_ext.integrations.trl import per_token

B, T, D, V = 2, 5, 7, 11
OPTIONS = LossOptions("Toy", impl="reference")

STEPS = {
    "nothing": lambda x: x,
    "scale": lambda x: 3 * (x * 0.5) / 4,
    "softcap": lambda x: torch.tanh(x / 2.5) * 2.5,
    "softcap as a function": lambda x: 2.0 * F.tanh(x.float() / 2.0),
    "scaled softcap": lambda x: torch.mul((x * 0.25 / 1.5).tanh() * 1.5, 2),
    "tensor scale": lambda x: torch.tensor(0.3) * x * torch.tensor([0.5]),
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
    assert (deferred.dtype, deferred.device) == (true.dtype, true.device)
    torch.testing.assert_close(deferred.materialize(), true)

    flat = true.reshape(-1, true.shape[-1])
    labels = torch.arange(flat.shape[0]) % flat.shape[1]
    parameters = (hidden, *head.parameters())
    expected = F.cross_entropy(flat, labels)
    loss = F.cross_entropy(deferred.view(-1, true.shape[-1]), labels)
    torch.testing.assert_close(loss, expected)
    gradients = torch.autograd.grad(loss, parameters)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, parameters))
    torch.testing.assert_close(torch.logsumexp(deferred, -1), true.logsumexp(-1))


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


@pytest.mark.parametrize(
    "step",
    [
        lambda x: x + 1,
        lambda x: torch.zeros(V) + x,
        lambda x: x * torch.ones(V),
        lambda x: x.tanh().tanh(),
        lambda x: x.view(-1),
        lambda x: x[..., 0],
        lambda x: torch.softmax(x, -1),
        lambda x: torch.where(torch.ones(B, T, V, dtype=torch.bool), x, 0.0),
        lambda x: x.logsumexp(0),
        lambda x: F.cross_entropy(x, torch.zeros(B, V, dtype=torch.long)),
        lambda x: F.cross_entropy(x[0], torch.rand(T, V)),
        lambda x: x.flatten(),
    ],
)
def test_other_steps_are_refused(step):
    hidden, head = toy(False)
    with (
        defer_head(head, OPTIONS),
        pytest.raises(DeferredLogitsError, match="Toy or its head applies"),
    ):
        step(head(hidden))


def test_unknown_attributes_are_refused():
    hidden, head = toy(False)
    with defer_head(head, OPTIONS):
        deferred = head(hidden)
    with pytest.raises(AttributeError, match=r"applies Tensor\.sort to its logits"):
        deferred.sort()
    assert not hasattr(deferred, "no_such_thing")


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


def test_an_error_inside_the_head_leaves_nothing_behind():
    hidden, head = toy(False)

    def fail(module, args):
        raise KeyError("from another hook")

    before = head.register_forward_pre_hook(fail)
    with pytest.raises(KeyError), defer_head(head, OPTIONS):
        head(hidden)
    before.remove()
    with pytest.raises(TypeError), defer_head(head, OPTIONS):
        head(hidden, hidden)
    assert isinstance(nn.Linear(D, V)(hidden), torch.Tensor)
    assert isinstance(head(hidden), torch.Tensor)


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
