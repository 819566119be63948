"""LinearCrossEntropy: the function with its options bound."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import gemma_ext
from gemma_ext import LinearCrossEntropy, VocabState, linear_cross_entropy
from gemma_ext.testing import assert_close

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
    assert "softcap=30.0, shift=True" in repr(LinearCrossEntropy(softcap=30.0, shift=True))


def gradients(loss_fn, e, c, targets):
    leaves = e.detach().clone().requires_grad_(), c.detach().clone().requires_grad_()
    loss_fn(leaves[0], leaves[1], targets).backward()
    return [leaf.grad for leaf in leaves]


def test_evaluation_in_inference_mode_leaves_nothing_behind():
    """The module trains after it was evaluated as Lightning does it, and keeps no tensors."""
    e, c, targets = zipf_problem()
    module = LinearCrossEntropy(impl="cce", filter_eps=2.0**-8)
    want = gradients(module, e, c, targets)
    with torch.inference_mode():
        module(e, c, targets)
    assert not module.state_dict()
    for got, before in zip(gradients(module, e, c, targets), want, strict=True):
        assert torch.equal(got, before)


@pytest.mark.parametrize("impl", ["cce", "exact"])
def test_default_dtype_changes_nothing(impl):
    e, c, targets = zipf_problem()
    options = {"impl": impl, "softcap": 10.0, "label_smoothing": 0.1, "z_loss": 0.1}
    module = LinearCrossEntropy(filter_eps=2.0**-8, **options)
    want = module(e, c, targets), *gradients(module, e, c, targets)
    torch.set_default_dtype(torch.float64)
    try:
        got = module(e, c, targets), *gradients(module, e, c, targets)
    finally:
        torch.set_default_dtype(torch.float32)
    for ours, before in zip(got, want, strict=True):
        assert ours.dtype == before.dtype
        assert torch.equal(ours, before)


def test_meta_and_to_empty():
    with torch.device("meta"):
        module = nn.Sequential(LinearCrossEntropy(softcap=30.0))
    module = module.to_empty(device="cpu")
    e, c, targets = zipf_problem()
    want = LinearCrossEntropy(softcap=30.0)(e, c, targets)
    assert torch.equal(module[0](e, c, targets), want)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("options", [{"impl": "exact"}, {"impl": "cce", "filter_eps": 2.0**-8}, {}])
def test_checkpointing(options, reentrant):
    """The recomputation draws as the forward did."""
    e, c, targets = zipf_problem()
    e, c = e.bfloat16(), c.bfloat16()
    module = LinearCrossEntropy(softcap=30.0, **options)

    def checkpointed(*args):
        return checkpoint(module, *args, use_reentrant=reentrant)

    want = gradients(module, e, c, targets)
    for _ in range(3):
        for got, plain in zip(gradients(checkpointed, e, c, targets), want, strict=True):
            assert torch.equal(got, plain)


def test_what_a_state_was_is_ignored_with_a_warning():
    e, c, targets = zipf_problem(rows=20)
    want = LinearCrossEntropy()(e, c, targets)
    with pytest.warns(FutureWarning, match="stateful is ignored"):
        module = LinearCrossEntropy(stateful=True)
    with pytest.warns(FutureWarning, match="vocab_size is ignored"):
        LinearCrossEntropy(vocab_size=5)
    with pytest.warns(FutureWarning, match="VocabState is ignored"):
        state = VocabState(4096, refresh_every=4, decay=0.5, device="cpu")
    assert torch.equal(module(e, c, targets), want)
    assert repr(module) == repr(LinearCrossEntropy())
    with pytest.warns(FutureWarning, match="state is ignored"):
        assert torch.equal(gemma_ext.linear_cross_entropy(e, c, targets, state=state), want)
    with pytest.warns(FutureWarning, match="state is ignored"):
        gemma_ext.linear_logprobs(e, c, targets, state=state)


@pytest.mark.parametrize("prefix", ["", "loss."])
def test_checkpoint_of_a_stateful_module_loads(prefix):
    names = ("order", "count", "prob", "steps", "flat")
    saved = {f"{prefix}state.{name}": torch.zeros(3) for name in names}
    module = LinearCrossEntropy()
    whole = nn.ModuleDict({"loss": module}) if prefix else module
    whole.load_state_dict(saved)
    assert len(saved) == len(names)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        whole.load_state_dict({f"{prefix}other": torch.zeros(3)})


def test_public_names():
    assert set(gemma_ext.__all__) == {
        "LinearCrossEntropy",
        "LinearCrossEntropyOutput",
        "LinearDivergenceOutput",
        "LinearLogprobsOutput",
        "VocabState",
        "__version__",
        "linear_cross_entropy",
        "linear_divergence",
        "linear_logprobs",
    }
    for name in ("linear_cross_entropy", "linear_logprobs"):
        signature = inspect.signature(getattr(gemma_ext, name))
        kinds = [p.kind for p in signature.parameters.values()]
        assert kinds[:3] == [inspect.Parameter.POSITIONAL_OR_KEYWORD] * 3
        assert set(kinds[3:]) == {inspect.Parameter.KEYWORD_ONLY}
