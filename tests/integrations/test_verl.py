"""verl's fused head: the softcap, its signatures, and where it is put."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch import Tensor

import gemma_ext
from gemma_ext.integrations import verl

N, D, V = 23, 16, 400


def problem(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(N, D, generator=g), torch.randn(V, D, generator=g)
    return hidden, weight, torch.randint(0, V, (N,), generator=g)


def truth(hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float, cap: float | None):
    s = hidden.double() @ weight.double().T
    s = (s if cap is None else cap * torch.tanh(s / cap)) / temperature
    log_p = torch.log_softmax(s, -1)
    return log_p.gather(-1, labels[..., None])[..., 0], -(log_p.exp() * log_p).sum(-1)


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found.double(), wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("cap", [None, 5.0])
def test_values_and_gradients(cap):
    hidden, weight, labels = problem()
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    u, h = torch.randn(2, N, generator=torch.Generator().manual_seed(1))
    log_probs, entropy = verl.linear_cross_entropy(*leaves, labels, 0.7, "none", None, softcap=cap)
    want = truth(*wide, labels, 0.7, cap)
    close(log_probs, want[0])
    close(entropy, want[1])
    got = torch.autograd.grad((u * log_probs + h * entropy).sum(), leaves)
    expected = torch.autograd.grad((u * want[0] + h * want[1]).sum(), wide)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=2e-5)


def test_reductions_are_of_the_log_probabilities():
    args = problem()
    each, entropy = verl.linear_cross_entropy(*args)
    for reduction, want in (("sum", each.sum()), ("mean", each.mean())):
        got = verl.linear_cross_entropy(*args, 1.0, reduction)
        torch.testing.assert_close(got[0], want)
        assert torch.equal(got[1], entropy)
    with pytest.raises(ValueError, match="expected reduction to be one of none, sum, mean, got"):
        verl.linear_cross_entropy(*args, 1.0, "max")


def test_module_takes_batches():
    hidden, weight, labels = problem()
    head = verl.FusedLinearForPPO(chunk_size=8, softcap=5.0)
    log_probs, entropy = head(hidden[None], weight, labels[None], temperature=0.9)
    want = truth(hidden, weight, labels, 0.9, 5.0)
    assert log_probs.shape == entropy.shape == (1, N)
    close(log_probs[0], want[0])
    close(entropy[0], want[1])


def test_states_of_megatron_come_time_first():
    hidden, weight, labels = problem()
    log_probs, entropy = verl.linear_cross_entropy(hidden[:, None], weight, labels[None], 0.9)
    want = truth(hidden, weight, labels, 0.9, None)
    assert log_probs.shape == entropy.shape == (1, N)
    close(log_probs[0], want[0])
    close(entropy[0], want[1])


@pytest.fixture
def package(monkeypatch):
    """Modules with verl's names, which are not installed here, and what a forward of it does."""
    theirs = {}
    for place in ("verl", "verl.utils", "verl.utils.experimental", "verl.utils.kernel"):
        monkeypatch.setitem(sys.modules, place, types.ModuleType(place))
    for name, place in verl._PLACES.items():
        module = types.ModuleType(place)
        theirs[name] = object()
        setattr(module, name, theirs[name])
        monkeypatch.setitem(sys.modules, place, module)
    yield theirs
    verl.uninstall()


def found() -> dict[str, object]:
    return {name: getattr(sys.modules[place], name) for name, place in verl._PLACES.items()}


@pytest.mark.parametrize("nested", [False, True])
def test_install_takes_the_cap_of_the_config(package, nested):
    text = types.SimpleNamespace(final_logit_softcapping=5.0, logit_scale=0.5)
    config = types.SimpleNamespace(get_text_config=lambda: text) if nested else text
    verl.install(config)
    hidden, weight, labels = problem()
    want = truth(0.5 * hidden, weight, labels, 0.8, 5.0)
    ours = found()
    module = ours["FusedLinearForPPO"]()
    for got in (
        module(hidden, weight, labels, temperature=0.8),
        ours["linear_cross_entropy"](hidden, weight, labels, 0.8, "none"),
    ):
        close(got[0], want[0])
        close(got[1], want[1])
    verl.install(softcap=None)
    close(
        found()["linear_cross_entropy"](hidden, weight, labels)[0], truth(*problem(), 1.0, None)[0]
    )
    verl.uninstall()
    assert found() == package


def test_options_come_before_the_config(package):
    verl.install(types.SimpleNamespace(final_logit_softcapping=5.0), softcap=9.0, impl="exact")
    args = problem()
    want = gemma_ext.linear_logprobs(*args, softcap=9.0, impl="exact")
    assert torch.equal(found()["linear_cross_entropy"](*args)[0], want[0])


def test_a_module_that_has_imported_a_head_already_gets_ours(package, monkeypatch):
    name = "linear_cross_entropy"
    forward = types.ModuleType("verl.models.mcore.model_forward_fused")
    setattr(forward, name, package[name])
    other = types.ModuleType("of_somebody_else")
    setattr(other, name, package[name])
    for module in (forward, other):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    verl.install(softcap=5.0)
    assert getattr(forward, name) is found()[name]
    verl.install(softcap=6.0)
    assert getattr(forward, name) is found()[name]
    assert getattr(forward, name).keywords == {"softcap": 6.0}
    assert getattr(other, name) is package[name]
    verl.uninstall()
    assert getattr(forward, name) is package[name]


def test_a_missing_verl_is_named():
    with pytest.raises(ImportError, match=r"expected verl with verl\.utils"):
        verl.install()


def test_a_verl_without_the_function_is_named(package, monkeypatch):
    monkeypatch.delattr(sys.modules[verl._PLACES["FusedLinearForPPO"]], "FusedLinearForPPO")
    with pytest.raises(ImportError, match="got a module without it"):
        verl.install()
    assert found_or_none("linear_cross_entropy") is package["linear_cross_entropy"]


def found_or_none(name: str) -> object:
    return getattr(sys.modules[verl._PLACES[name]], name, None)
