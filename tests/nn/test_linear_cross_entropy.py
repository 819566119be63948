"""LinearCrossEntropy: the function with its options bound, and the state it carries."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch

import gemma_ext
from gemma_ext import LinearCrossEntropy, VocabState, linear_cross_entropy
from gemma_ext.testing import assert_close, difference

IMPLS = ("reference", "exact", "cce")


def zipf_problem(rows=192, width=64, vocab=4096, seed=0):
    """Rows that mix four ids, log-uniform in a shuffled order: few columns matter to many rows."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randperm(vocab, generator=torch.Generator().manual_seed(9))
    c = torch.randn(vocab, width, generator=torch.Generator().manual_seed(8))
    c /= c.norm(dim=1, keepdim=True)
    rank = (vocab ** torch.rand(rows, 4, generator=g) ** 2).long().clamp(max=vocab - 1)
    e = (c[ids[rank]] * torch.tensor([18.0, 15.0, 14.0, 13.0])[:, None]).sum(1)
    targets = ids[rank[:, 0]]
    targets[::7] = -100
    return e, c, targets


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"softcap": 9.0, "shift": True, "reduction": "sum"},
        {"label_smoothing": 0.1, "z_loss": 1e-3, "temperature": 0.8, "logit_scale": 0.5},
        {"reduction": "none", "return_lse": True},
    ],
    ids=["plain", "capped", "smoothed", "rows"],
)
def test_equals_the_function(impl, options):
    e, c, targets = zipf_problem(rows=48)
    e, targets = e.reshape(4, 12, -1), targets.reshape(4, 12)
    bias = torch.linspace(-1, 1, c.shape[0])
    weights = torch.rand(4, 12, generator=torch.Generator().manual_seed(1))
    module = LinearCrossEntropy(impl=impl, **options)
    got = module(e, c, targets, bias, token_weights=weights)
    want = linear_cross_entropy(
        e, c, targets, bias=bias, token_weights=weights, impl=impl, **options
    )
    if options.get("return_lse"):
        assert torch.equal(got.lse, want.lse)
        got, want = got.loss, want.loss
    assert torch.equal(got, want)
    assert not module.state_dict()


def test_number_of_items_divides_the_sum():
    e, c, targets = zipf_problem(rows=20)
    total = LinearCrossEntropy(reduction="sum", impl="exact")(e, c, targets)
    for items in (13, torch.tensor(13)):
        mean = LinearCrossEntropy(impl="exact")(e, c, targets, num_items_in_batch=items)
        assert_close(mean, total / 13, rel=1e-6)


def test_unknown_option_is_refused_when_built():
    with pytest.raises(TypeError, match=r"options among .*softcap.*got 'soft_cap'"):
        LinearCrossEntropy(soft_cap=30.0)


def test_options_show():
    text = repr(LinearCrossEntropy(softcap=30.0, shift=True, stateful=True, vocab_size=5))
    assert "softcap=30.0, shift=True, stateful=True" in text


def gradients(loss_fn, e, c, targets):
    e, c = e.clone().requires_grad_(), c.clone().requires_grad_()
    out = loss_fn(e, c, targets)
    return out.stats, torch.autograd.grad(out.loss, (e, c))


def train(module, calls=4):
    module.state = VocabState(4096, refresh_every=1, decay=0.8)
    for seed in range(1, calls + 1):
        gradients(module, *zipf_problem(seed=seed))


def test_learned_order_keeps_less():
    options = {"filter_eps": 2.0**-8, "impl": "cce", "return_stats": True}
    stateful = LinearCrossEntropy(stateful=True, **options)
    train(stateful, calls=12)
    e, c, targets = zipf_problem(seed=99)
    want = gradients(LinearCrossEntropy(impl="exact", return_stats=True), e, c, targets)[1]
    plain, plain_grads = gradients(LinearCrossEntropy(**options), e, c, targets)
    stats, grads = gradients(stateful, e, c, targets)
    assert stats.kept_fraction < 0.85 * plain.kept_fraction
    assert stats.dropped_mass < plain.dropped_mass
    for got, without, truth in zip(grads, plain_grads, want, strict=True):
        assert_close(got, truth, rel=1.05 * difference(without, truth).rel)


def test_state_travels_with_the_state_dict():
    options = {"filter_eps": 2.0**-8, "impl": "cce", "return_stats": True, "stateful": True}
    trained = LinearCrossEntropy(**options)
    train(trained)
    saved = copy.deepcopy(trained.state_dict())
    names = ("order", "count", "prob", "steps", "flat")
    assert set(saved) == {f"state.{name}" for name in names}
    assert sorted(saved["state.order"].tolist()) == list(range(4096))
    assert not torch.equal(saved["state.order"], torch.arange(4096))

    for fresh in (LinearCrossEntropy(**options), LinearCrossEntropy(vocab_size=4096, **options)):
        fresh.load_state_dict(saved)
        e, c, targets = zipf_problem(seed=50)
        got = gradients(fresh, e, c, targets)[1]
        resumed = LinearCrossEntropy(**options)
        resumed.load_state_dict(saved)
        for x, y in zip(got, gradients(resumed, e, c, targets)[1], strict=True):
            assert torch.equal(x, y)


def test_stateless_module_refuses_a_saved_state():
    trained = LinearCrossEntropy(stateful=True, vocab_size=30)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        LinearCrossEntropy().load_state_dict(trained.state_dict())


def test_state_of_another_vocabulary_is_refused():
    e, c, targets = zipf_problem(rows=8)
    with pytest.raises(ValueError, match="expected state for 4096 ids, got 4095"):
        LinearCrossEntropy(stateful=True, vocab_size=4095)(e, c, targets)


def test_evaluation_leaves_the_state_alone():
    module = LinearCrossEntropy(stateful=True, vocab_size=4096)
    with torch.no_grad():
        module(*zipf_problem())
    assert torch.equal(module.state.order, torch.arange(4096))


def test_state_changes_no_value():
    e, c, targets = zipf_problem(seed=3)
    module = LinearCrossEntropy(stateful=True, return_lse=True, return_entropy=True)
    with torch.no_grad():
        plain = LinearCrossEntropy(return_lse=True, return_entropy=True)(e, c, targets)
    module(e.requires_grad_(), c, targets)
    ordered = module(e, c, targets)
    assert not torch.equal(module.state.order, torch.arange(4096))
    for got, want in zip(ordered[:3], plain[:3], strict=True):
        assert_close(got, want, rel=2e-5)  # an entropy is the difference of numbers 20 times it


def test_public_names():
    assert set(gemma_ext.__all__) == {
        "LinearCrossEntropy",
        "LinearCrossEntropyOutput",
        "VocabState",
        "__version__",
        "linear_cross_entropy",
        "linear_logprobs",
    }
    for name in ("linear_cross_entropy", "linear_logprobs"):
        signature = inspect.signature(getattr(gemma_ext, name))
        kinds = [p.kind for p in signature.parameters.values()]
        assert kinds[:3] == [inspect.Parameter.POSITIONAL_OR_KEYWORD] * 3
        assert set(kinds[3:]) == {inspect.Parameter.KEYWORD_ONLY}
    assert isinstance(VocabState(7).order, torch.Tensor)
