"""The patch stays through pickling, copying and unwrapping, or patching again brings it back."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import threading

import pytest
import torch
from accelerate import Accelerator
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from tiny_models import assert_same_training, batch, build, clone, gemma2, loss_and_gradients
from transformers import Gemma2ForCausalLM

from gemma_ext.integrations.transformers import patch, unpatch


def fused(model) -> bool:
    return model(**batch()).logits is None


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def unwrapped(model):
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    return accelerator.unwrap_model(accelerator.prepare(model), keep_fp32_wrapper=False)


def pickled_while_prepared(model):
    return pickled(Accelerator(cpu=True, mixed_precision="bf16").prepare(model))


WAYS = {
    "pickle": pickled,
    "torch.save": saved,
    "deepcopy": copy.deepcopy,
    "unwrap_model": unwrapped,
    "twice": lambda model: pickled(copy.deepcopy(pickled(model))),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_patch_survives(way, impl):
    model = gemma2()
    expected = loss_and_gradients(clone(model), **batch())
    survivor = WAYS[way](patch(model, impl=impl))
    assert fused(survivor)
    assert_same_training(loss_and_gradients(survivor, **batch()), expected)
    assert fused(patch(survivor, impl=impl))
    assert fused(patch(unpatch(survivor), impl=impl))
    unpatch(survivor)
    assert not fused(survivor)
    assert "forward" not in vars(survivor) or way == "unwrap_model"


def test_options_survive(impl):
    survivor = pickled(patch(gemma2(), impl=impl, train_only=True))
    assert not fused(survivor)
    assert fused(survivor.train())


@pytest.mark.parametrize("way", [*WAYS.values(), pickled_while_prepared])
def test_patching_again_always_fuses(way, impl):
    survivor = way(patch(gemma2(), impl=impl))
    assert fused(patch(survivor, impl=impl))
    again = way(survivor)
    assert fused(patch(unpatch(again), impl=impl))
    assert not fused(unpatch(again))


def test_a_spawned_process_has_the_patch(impl, tmp_path):
    (tmp_path / "model").write_bytes(pickle.dumps(patch(build("Llama"), impl=impl)))
    program = (
        "import pickle, sys, torch; model = pickle.load(open(sys.argv[1], 'rb')); "
        "ids = torch.arange(9)[None]; print(model(ids, labels=ids).logits)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, str(tmp_path / "model")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "None"


@pytest.mark.parametrize("patched_first", [True, False], ids=["patch-prepare", "prepare-patch"])
def test_unwrapping_leaves_the_signature_and_undoes_autocast(patched_first, impl):
    model = gemma2()
    expected = model(**batch()).loss
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    if patched_first:
        survivor = unwrapped(patch(model, impl=impl))
        torch.testing.assert_close(survivor(**batch()).loss, expected)
    else:
        prepared = patch(accelerator.prepare(model), impl=impl)
        survivor = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert fused(survivor)
    assert survivor.generate(batch()["input_ids"], max_new_tokens=2).shape == (2, 15)


def test_wrappers_put_on_and_taken_off_between_patches(impl):
    calls = []

    class Count(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(module)
            return args, kwargs

    model = gemma2()
    expected = model(**batch()).loss
    add_hook_to_module(model, Count())
    patch(model, impl=impl)
    inner = model.forward
    model.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    for _ in range(2):
        assert fused(patch(model, impl=impl))
    torch.testing.assert_close(model(**batch()).loss, expected)
    assert len(calls) == 3
    assert not fused(unpatch(model))
    assert not fused(unpatch(model))
    assert len(calls) == 5
    assert fused(patch(model, impl=impl))
    remove_hook_from_module(model)
    assert not fused(model)
    assert fused(patch(model, impl=impl))


def test_a_forward_put_back_after_unpatching(impl):
    model = patch(gemma2(), impl=impl)
    kept = model.forward
    unpatch(model)
    model.forward = kept
    assert not fused(model)
    assert fused(patch(model, impl=impl))
    assert not fused(unpatch(model))
    assert "forward" not in vars(model)


def test_lower_forward_back_on_top(impl):
    model = gemma2()
    lower = patch(model, impl=impl).forward
    model.forward = lambda *args, **kwargs: lower(*args, **kwargs)
    assert fused(patch(model, impl=impl))
    model.forward = lower
    assert fused(model)
    assert fused(patch(model, impl=impl))
    assert not fused(unpatch(model))
    assert "forward" not in vars(model)


def test_a_class_and_an_instance_of_it_patched(impl):
    forward = Gemma2ForCausalLM.forward
    model = patch(gemma2(), impl=impl, train_only=True)
    patch(Gemma2ForCausalLM, impl=impl)
    try:
        assert not fused(model)
        assert fused(model.train())
        assert fused(gemma2())
        assert fused(unwrapped(gemma2()))
        assert fused(pickled(gemma2()))
        patch(Gemma2ForCausalLM, impl=impl, train_only=True)
        assert not fused(gemma2())
        assert fused(patch(pickled(model), impl=impl, train_only=False))
    finally:
        unpatch(Gemma2ForCausalLM)
    assert Gemma2ForCausalLM.forward is forward
    assert fused(model)
    assert not fused(gemma2())


def test_scoring_while_another_thread_trains(impl):
    model = patch(gemma2(num_hidden_layers=1), impl=impl)
    stop = threading.Event()

    def train():
        while not stop.is_set():
            model(**batch()).loss.backward()

    thread = threading.Thread(target=train)
    thread.start()
    kinds = set()
    with torch.no_grad():
        for _ in range(30):
            kinds.add(type(model(batch()["input_ids"]).logits))
            kinds.add(type(torch.nn.Linear(8, 101)(torch.randn(2, 8))))
    stop.set()
    thread.join()
    assert kinds == {torch.Tensor}


def test_ctrl_c_inside_the_head(impl):
    model = patch(gemma2(), impl=impl)

    def interrupt(*args):
        raise KeyboardInterrupt

    hook = model.lm_head.register_forward_hook(interrupt, prepend=True)
    with pytest.raises(KeyboardInterrupt):
        model(**batch())
    hook.remove()
    assert type(torch.nn.Linear(8, 101)(torch.randn(2, 8))) is torch.Tensor
    assert type(model(batch()["input_ids"]).logits) is torch.Tensor
    assert fused(model)
