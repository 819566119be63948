"""TRL's own MergeModelCallback over our merges, in a process where nothing of trl is imported."""

import shutil
import subprocess
import sys

import pytest
import torch
from recipe_models import generates, save_models, weights
from safetensors.torch import load_file

from gemma_ext.souping.recipes.trl import MergeConfiguration, MergeOptions, install, run_merge

pytest.importorskip("trl")

METHODS = ("linear", "slerp", "ties", "dare_ties")
SCRIPT = """
import sys
from types import SimpleNamespace
from gemma_ext.souping.recipes import trl
trl.install()
from trl.experimental.merge_model_callback import MergeConfig, MergeModelCallback
folder, target, *methods = sys.argv[1:]
for step, method in enumerate(methods):
    config = MergeConfig(method)
    config.target_model_path = target
    every = step % 2 == 0
    callback = MergeModelCallback(config, merge_at_every_checkpoint=every)
    args, state = SimpleNamespace(output_dir=folder), SimpleNamespace(global_step=step)
    (callback.on_save if every else callback.on_train_end)(args, state, None, model=None)
"""


@pytest.fixture
def two(tmp_path):
    save_models(tmp_path, "policy", "target")
    return tmp_path


@pytest.mark.slow
def test_every_method_that_trl_offers_merges_into_the_checkpoint_itself(two):
    for step in range(len(METHODS)):
        shutil.copytree(two / "policy", two / f"checkpoint-{step}")
    command = [sys.executable, "-c", SCRIPT, str(two), str(two / "target"), *METHODS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    policy, target = weights(two / "policy"), weights(two / "target")
    got = load_file(two / "checkpoint-0" / "merged" / "model.safetensors")
    assert got.keys() == policy.keys()
    for name, tensor in got.items():
        assert tensor.dtype == torch.float16
        expected = (0.5 * policy[name] + 0.5 * target[name]).half()
        torch.testing.assert_close(tensor, expected, rtol=1e-3, atol=1e-7)
    for step in range(len(METHODS)):
        assert generates(two / f"checkpoint-{step}" / "merged")
    assert not list(two.glob(".merge-*"))


def test_what_the_names_take(two):
    data = {
        "merge_method": "linear",
        "slices": None,
        "models": [{"model": str(two / "target"), "parameters": {"weight": 1.0}}],
        "dtype": "float32",
    }
    options = MergeOptions(device="auto", cuda=False, lazy_unpickle=True, write_model_card=False)
    run_merge(MergeConfiguration.model_validate(data), two / "out", options)
    assert not (two / "out" / "README.md").exists()
    inside = two / "target" / "merged"
    inside.mkdir()
    (inside / "taken").write_text("")
    with pytest.raises(ValueError, match="out_path: expected a folder that is empty"):
        run_merge(MergeConfiguration.model_validate(data), inside)


def test_options_by_mergekits_names():
    options = MergeOptions(random_seed=3, out_shard_size=9, allow_crimes=True).run_options()
    assert (options.seed, options.shard_bytes, options.allow_crimes) == (3, 9, True)
    assert MergeOptions(cuda=True).run_options().device in ("cpu", "cuda")


def test_install_does_not_replace_an_imported_mergekit(monkeypatch):
    from types import ModuleType

    for name in ("mergekit", "mergekit.config", "mergekit.merge"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "mergekit", ModuleType("mergekit"))
    with pytest.raises(RuntimeError, match="expected to run before mergekit is imported"):
        install()
    monkeypatch.delitem(sys.modules, "mergekit")
    install()
    install()
    import mergekit.merge

    assert mergekit.merge.run_merge is run_merge
