"""What users rely on around the loss: the contract of `labels`, counts, shapes and (un)patching."""

from __future__ import annotations

import copy
import inspect
import sys
import warnings

import pytest
import torch
from tiny_models import (
    VOCAB,
    assert_same_training,
    batch,
    build,
    clone,
    gemma2,
    loss_and_gradients,
)
from transformers import Gemma2ForCausalLM, GemmaForCausalLM

from gemma_ext.integrations.transformers import patch, unpatch
from gemma_ext.nn import _deferred_logits


@pytest.fixture
def pair(impl):
    """A Gemma-2 as it is and its patched copy."""
    model = gemma2()
    return model, patch(clone(model), impl=impl)


def test_without_labels_nothing_changes(pair):
    eager, patched = pair
    ids = batch()["input_ids"]
    torch.testing.assert_close(patched(ids).logits, eager(ids).logits, rtol=0, atol=0)
    kept = patched(ids, logits_to_keep=3)
    assert kept.loss is None
    assert kept.logits.shape == (2, 3, VOCAB)
    generated = patched.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(generated, eager.generate(ids, max_new_tokens=4, do_sample=False))


def test_with_labels_there_are_no_logits(pair):
    output = pair[1](**batch(), output_hidden_states=True)
    assert output.logits is None
    assert "logits" not in output
    assert len(output.hidden_states) == 3


@pytest.mark.parametrize(
    "count", [7, torch.tensor(7), torch.tensor(7.0)], ids=["int", "i64", "f32"]
)
def test_num_items_in_batch(pair, count):
    eager, patched = pair
    expected = loss_and_gradients(eager, **batch(), num_items_in_batch=count)
    assert_same_training(loss_and_gradients(patched, **batch(), num_items_in_batch=count), expected)


def test_gradient_accumulation_equals_one_batch(pair):
    eager, patched = pair
    whole = batch(rows=4)
    count = (whole["labels"][:, 1:] != -100).sum()
    expected = loss_and_gradients(eager, **whole)
    patched.zero_grad()
    total = 0.0
    for part in range(4):
        piece = {name: value[part : part + 1] for name, value in whole.items()}
        loss = patched(**piece, num_items_in_batch=count).loss
        loss.backward()
        total = total + loss.detach()
    gradients = {name: p.grad for name, p in patched.named_parameters()}
    assert_same_training((total, gradients), expected)


def test_shift_labels_are_taken_as_aligned(pair):
    eager, patched = pair
    inputs = batch()
    aligned = torch.roll(inputs["labels"], -2, dims=1)
    expected = loss_and_gradients(eager, **inputs, shift_labels=aligned)
    assert_same_training(loss_and_gradients(patched, **inputs, shift_labels=aligned), expected)


def test_logits_to_keep_with_labels(pair):
    eager, patched = pair
    inputs = batch()
    inputs["labels"] = inputs["labels"][:, -5:]
    for keep in (5, torch.arange(8, 13)):
        expected = loss_and_gradients(eager, **inputs, logits_to_keep=keep)
        assert_same_training(loss_and_gradients(patched, **inputs, logits_to_keep=keep), expected)
    with pytest.raises(ValueError, match="expected targets"):
        patched(**inputs, logits_to_keep=4)


def test_return_dict_false_keeps_the_loss_first(pair):
    eager, patched = pair
    expected = eager(**batch(), return_dict=False, output_hidden_states=True)
    output = patched(**batch(), return_dict=False, output_hidden_states=True)
    assert isinstance(output, tuple)
    torch.testing.assert_close(output[0], expected[0])
    assert len(output) == len(expected) - 1
    torch.testing.assert_close(output[-1], expected[-1])


def test_positional_labels(pair):
    eager, patched = pair
    inputs = batch()
    names = list(inspect.signature(eager.forward).parameters)
    args = [inputs.get(name) for name in names[: names.index("labels") + 1]]
    output = patched(*args)
    assert output.logits is None
    torch.testing.assert_close(output.loss, eager(*args).loss)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(pair, reentrant):
    eager, patched = pair
    expected = loss_and_gradients(eager.train(), **batch())
    patched.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same_training(loss_and_gradients(patched.train(), **batch()), expected)


def test_all_positions_ignored(pair):
    inputs = batch()
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    loss, gradients = loss_and_gradients(pair[1], **inputs)
    assert loss == 0
    assert all((gradient == 0).all() for gradient in gradients.values())


def test_autocast(pair):
    eager, patched = pair
    with torch.autocast("cpu", torch.bfloat16):
        expected = loss_and_gradients(eager, **batch())
        assert_same_training(loss_and_gradients(patched, **batch()), expected, tolerance=3e-2)


@pytest.mark.parametrize("impl", ["exact", "auto"])
def test_compiles_into_one_graph(impl):
    model = gemma2(num_hidden_layers=1)
    expected = loss_and_gradients(clone(model), **batch())
    patched = patch(model, impl=impl)
    torch._dynamo.reset()
    compiled = torch.compile(patched, backend="aot_eager", fullgraph=True)
    compiled(**batch())
    with torch.compiler.set_stance("fail_on_recompile"):
        loss = compiled(**batch()).loss
    patched.zero_grad()
    loss.backward()
    got = {name: p.grad for name, p in patched.named_parameters()}
    assert_same_training((loss.detach(), got), expected)


def test_own_loss_function_sees_the_logits(pair):
    eager, patched = pair
    weights = torch.rand(VOCAB) + 0.5

    def weighted(logits, labels, vocab_size, **kwargs):
        flat = logits[:, :-1, :].float().reshape(-1, vocab_size)
        return torch.nn.functional.cross_entropy(
            flat, labels[:, 1:].reshape(-1), weight=weights, label_smoothing=0.1
        )

    eager.loss_function = weighted
    patched.loss_function = weighted
    assert_same_training(
        loss_and_gradients(patched, **batch()), loss_and_gradients(eager, **batch())
    )


def test_unknown_logits_processing_is_refused(pair):
    patched = pair[1]
    patched.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.softmax(-1).sum()
    with pytest.raises(AttributeError, match=r"its head applies Tensor\.softmax to"):
        patched(**batch())
    patched.loss_function = lambda logits, labels, vocab_size, **kwargs: torch.relu(logits).sum()
    with pytest.raises(NotImplementedError, match="applies relu to its logits"):
        patched(**batch())
    assert unpatch(patched)(**batch()).logits is not None


def test_train_only(impl):
    model = patch(gemma2(), impl=impl, train_only=True)
    assert model(**batch()).logits.shape == (2, 13, VOCAB)
    assert model.train()(**batch()).logits is None


def test_an_evaluation_without_logits_warns_once(impl):
    model = patch(gemma2(), impl=impl)
    with torch.no_grad(), pytest.warns(UserWarning, match=r"patch\(model, train_only=True\) keeps"):
        model(**batch())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.inference_mode():
            assert model(**batch()).logits is None
        assert model(**batch()).logits is None
        for train_only in (False, True):
            patch(model, impl=impl, train_only=train_only)
            with torch.no_grad():
                assert (model(**batch()).logits is None) != train_only
        patch(model, impl=impl).train()
        with torch.no_grad():
            model(**batch())


def test_a_compiled_evaluation_without_logits_warns(impl):
    model = patch(gemma2(num_hidden_layers=1), impl=impl)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad(), pytest.warns(UserWarning, match=r"patch\(model, train_only=True\) keeps"):
        assert compiled(**batch()).logits is None


def test_state_is_ignored_with_a_warning(impl):
    model = gemma2()
    expected = loss_and_gradients(clone(model), **batch())
    for state in (True, False):
        with pytest.warns(FutureWarning, match="state is ignored"):
            patch(model, impl=impl, state=state)
        assert_same_training(loss_and_gradients(model, **batch()), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patch(model, impl=impl, state=None)


def test_unpatch_restores_the_model(pair):
    eager, patched = pair
    assert unpatch(patched) is patched
    assert "forward" not in vars(patched)
    assert torch.equal(patched(**batch()).logits, eager(**batch()).logits)
    unpatch(patched)


def test_unpatch_below_another_wrapper(pair):
    patched = pair[1]
    inner = patched.forward
    patched.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    unpatch(patched)
    assert patched(**batch()).logits is not None


def test_memory_reaches_the_loss(pair, monkeypatch):
    patched, seen = pair[1], []
    inner = _deferred_logits.linear_cross_entropy

    def spy(*args, **kwargs):
        seen.append(kwargs["memory"])
        return inner(*args, **kwargs)

    monkeypatch.setattr(_deferred_logits, "linear_cross_entropy", spy)
    patched(**batch()).loss.backward()
    patch(patched, memory="lean")
    patched(**batch()).loss.backward()
    assert seen == ["default", "lean"]
    with pytest.raises(ValueError, match="expected memory to be one of default, lean, got 'big'"):
        patch(patched, memory="big")


def test_patching_again_replaces_the_options(pair):
    patched = pair[1]
    with pytest.raises(ValueError, match="expected impl to be one of"):
        patch(patched, impl="fast")
    with pytest.raises(ValueError, match="expected filter_eps"):
        patch(patched, filter_eps=2.0)
    patch(patched, impl="reference", train_only=True)
    assert patched(**batch()).logits is not None
    unpatch(patched)
    assert "forward" not in vars(patched)


@pytest.mark.parametrize("target", [Gemma2ForCausalLM, "Gemma2ForCausalLM", "gemma2"])
def test_patch_a_class(target, impl):
    model = gemma2()
    expected = loss_and_gradients(model, **batch())
    forward = Gemma2ForCausalLM.forward
    patch(target, impl=impl)
    try:
        assert_same_training(loss_and_gradients(model, **batch()), expected)
        assert model(**batch()).logits is None
        assert patch(gemma2(), impl=impl)(**batch()).logits is None
        assert build("Gemma")(**batch()).logits is not None
    finally:
        unpatch(target)
    assert Gemma2ForCausalLM.forward is forward
    assert model(**batch()).logits is not None


def test_signature_is_kept(pair):
    eager, patched = pair
    assert inspect.signature(patched.forward) == inspect.signature(eager.forward)


def test_a_deep_copy_trains_itself(pair):
    patched = pair[1]
    twin = copy.deepcopy(patched)
    twin.zero_grad()
    loss = twin(**batch()).loss
    loss.backward()
    assert all(p.grad is None for p in patched.parameters())
    assert all(p.grad is not None for p in twin.parameters())


def test_checkpoints_hold_the_model_alone(pair, tmp_path):
    eager, patched = pair
    patched(**batch()).loss.backward()
    assert patched.state_dict().keys() == eager.state_dict().keys()
    patched.save_pretrained(tmp_path)
    torch.testing.assert_close(
        Gemma2ForCausalLM.from_pretrained(tmp_path)(**batch()).loss, eager(**batch()).loss
    )


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        ("gemma99", ValueError, "expected the class name or model type"),
        ("GemmaConfig", ValueError, "expected the class name or model type"),
        (3, TypeError, "expected a model, a model class or its name, got int"),
        (torch.nn.Linear(2, 2), TypeError, "expected a language model of transformers, got Linear"),
        (GemmaForCausalLM.__mro__[1], ValueError, "to take labels"),
    ],
)
def test_what_is_no_model_is_refused(target, error, message):
    with pytest.raises(error, match=message):
        patch(target)


def test_a_name_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'gemma_ext\[hf\]'"):
        patch("gemma2")


def test_wrong_label_is_named(pair):
    inputs = batch()
    inputs["labels"][0, 6] = VOCAB
    with pytest.raises(ValueError, match=f"got {VOCAB} at flat position 5"):
        pair[1](**inputs)
