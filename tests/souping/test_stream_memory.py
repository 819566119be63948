"""How much memory a streamed merge takes, and merging what is in memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from stream_models import Deltas, Linear, Shrunk, bytes_of, load, rising, same_bits, save, tensors
from torch.utils._python_dispatch import TorchDispatchMode

from gemma_ext.souping.engine.lane import Lane
from gemma_ext.souping.engine.memory import merge_tensors
from gemma_ext.souping.engine.stream import merge_files
from gemma_ext.souping.methods import get
from gemma_ext.souping.parameters import constant

# prints how far the peak of the resident memory rose above where it was, in MB
MEASURED = """
import sys
from pathlib import Path
from stream_models import Linear, Shrunk, rising
from gemma_ext.souping.engine.stream import merge_files


def resident(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(name))) / 1024


def merge(folder, method, out):
    options = {"chunk_bytes": 1 << 18, "memory_bytes": 8 << 20}
    models = [folder / "0", folder / "1", folder / "2.bin"]
    merge_files(method, models, None, rising(3), out, **options)


root = Path(sys.argv[1])
for i, method in enumerate([Linear(), Shrunk(), Shrunk(model_wide=True)]):
    merge(root / "small", method, root / f"warm{i}")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
    before = resident("VmRSS")
    merge(root / "large", method, root / f"out{i}")
    print(resident("VmHWM") - before)
"""


def test_memory_does_not_grow_with_the_model(tmp_path):
    """8 MB of ring and what the ops take for a chunk, where every tensor of the three models has
    16 MB; one of the models is `.bin`."""
    for kind, shape in (("small", (300, 256)), ("large", (2048, 4096))):
        weights = {name: torch.randn(shape).bfloat16() for name in "abc"}
        for m in range(2):
            save(tmp_path / kind / str(m), weights)
        torch.save(weights, tmp_path / kind / "2.bin")
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parents[1])])
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, tmp_path],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rises = [float(line) for line in done.stdout.split()]
    assert len(rises) == 3
    assert max(rises) < 20, rises


class _Reading:
    """A copy to a card that is not over until somebody waits for it."""

    over = 0

    def __init__(self, memory: torch.Tensor) -> None:
        self.memory, self.before = memory, memory.clone()

    def done(self) -> bool:
        return False

    def wait(self) -> int:
        assert torch.equal(self.memory, self.before), "read into while it was being copied"
        _Reading.over += 1
        return 0


@pytest.mark.parametrize("model_wide", [False, True])
def test_memory_is_not_read_into_while_a_card_copies_from_it(tmp_path, monkeypatch, model_wide):
    weights = {name: torch.randn(300, 256) for name in "abcdefgh"}
    models = [save(tmp_path / str(m), weights) for m in range(2)]
    options = {"chunk_bytes": 1 << 15, "memory_bytes": 1 << 18}
    wanted = merge_files(
        Shrunk(model_wide=model_wide), models, None, rising(2), tmp_path / "usual", **options
    )
    given: list[_Reading] = []

    def copies(lane, load):
        given.append(_Reading(load.memory))
        return [(given[-1], load.target.info.name)]

    monkeypatch.setattr(_Reading, "over", 0)
    monkeypatch.setattr(Lane, "_copies", copies)
    found = merge_files(
        Shrunk(model_wide=model_wide), models, None, rising(2), tmp_path / "slow", **options
    )
    assert same_bits(load(found), load(wanted))
    assert len(given) == _Reading.over > 50


def test_results_go_where_they_are_wanted():
    models = [tensors(m) for m in range(2)]
    fresh = merge_tensors(Linear(), models, None, rising(2))
    places = tensors(7)
    addresses = {name: tensor.data_ptr() for name, tensor in places.items()}
    out = merge_tensors(Linear(), models, None, rising(2), places)
    assert out is places
    assert {name: tensor.data_ptr() for name, tensor in out.items()} == addresses
    assert same_bits(out, fresh)


def test_results_may_replace_a_source_or_the_base():
    for kept in range(3):
        models, base = [tensors(m) for m in range(2)], tensors(2)
        fresh = merge_tensors(Deltas(), models, base, rising(2))
        out = [*models, base][kept]
        assert same_bits(merge_tensors(Deltas(), models, base, rising(2), out), fresh)


def test_tied_tensors_are_merged_once():
    """In place, where the second time would find the first one's result among its sources."""
    models = [tensors(m) for m in range(2)]
    fresh = merge_tensors(Linear(), models, None, rising(2))
    for model in models:
        model["lm_head.weight"] = model["model.embed_tokens.weight"]
    out = merge_tensors(Linear(), models, None, rising(2), models[1])
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert bytes_of(out[name]) == bytes_of(fresh["model.embed_tokens.weight"])


def test_strided_and_trained_tensors():
    models = [tensors(m, torch.float32) for m in range(2)]
    expected = merge_tensors(Linear(), models, None, rising(2))
    name = "model.layers.0.mlp.up_proj.weight"
    models[0][name] = models[0][name].T.contiguous().T
    models[1][name] = torch.nn.Parameter(models[1][name])
    out = merge_tensors(Linear(), models, None, rising(2))
    assert same_bits(out, expected)
    assert not out[name].requires_grad


@pytest.mark.parametrize("method", [Shrunk(), Shrunk("row"), Shrunk(model_wide=True)])
def test_surveys(method):
    model = tensors(0, torch.float32)
    out = merge_tensors(method, [model], None, rising(1))
    floats = {name: t for name, t in model.items() if t.is_floating_point() and t.numel()}
    largest = max(float(t.abs().max()) for t in floats.values())
    for name, tensor in floats.items():
        bound = largest if method.model_wide else float(tensor.abs().max())
        torch.testing.assert_close(out[name], tensor * (3.0 / bound))


ONE_CALL = {  # parameters, and the op that has to be called once
    "linear": ({"weight": [0.5, 0.3]}, "soup_"),
    "task_arithmetic": ({"weight": [0.5, 0.3]}, "soup_"),
    "dare_linear": ({"weight": [0.5, 0.3], "density": [0.4, 0.7]}, "soup_merge_"),
    "dare_ties": ({"weight": [0.5, 0.3], "density": [0.4, 0.7]}, "soup_merge_"),
}


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.__name__.split(".")[0])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ONE_CALL)
def test_one_call_merges_the_whole_model(name):
    """With the bits of a call for every tensor; weights and densities differ between tensors."""
    own, op = ONE_CALL[name]
    models, base = [tensors(m) for m in range(2)], tensors(2)
    origin = None if name == "linear" else base

    def values(tensor):
        found = constant(get(name), 2, **own)(tensor)
        if tensor.name.endswith("norm.weight"):
            for model in found.models:
                model["weight"] *= 2
            found.models[0]["density"] = 1.0
        return found

    with Calls() as calls:
        together = merge_tensors(get(name)(), models, origin, values)
    assert calls.names.count(op) == 1

    class Alone(get(name)):
        def merge_all(self, parts, states):
            for part, state in zip(parts, states, strict=True):
                super().merge_all([part], [state])

    with Calls() as calls:
        alone = merge_tensors(Alone(), models, origin, values)
    assert calls.names.count(op) > 5
    assert same_bits(together, alone)


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties"])
def test_tensors_with_draws_and_without_are_two_calls(name):
    models, base = [tensors(m) for m in range(2)], tensors(2)

    def values(tensor):
        density = 1.0 if "embed" in tensor.name else 0.5
        return constant(get(name), 2, weight=0.5, density=density)(tensor)

    with Calls() as calls:
        together = merge_tensors(get(name)(), models, base, values)
    assert calls.names.count("soup_merge_") == 2
    for key in base:
        one = merge_tensors(get(name)(), [{key: m[key]} for m in models], {key: base[key]}, values)
        assert bytes_of(one[key]) == bytes_of(together[key])


def test_dtype_of_new_tensors():
    models = [tensors(0, torch.float8_e4m3fn), tensors(1)]
    out = merge_tensors(Linear(), models, None, rising(2))
    assert out["model.norm.weight"].dtype == torch.bfloat16
    out = merge_tensors(Linear(), models, None, rising(2), dtype=torch.float32)
    assert out["model.norm.weight"].dtype == torch.float32
    assert bytes_of(out["model.positions"]) == bytes_of(models[0]["model.positions"])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda m: m.pop("model.norm.weight"), r"models\[1\]: expected tensor 'model.norm.weight'"),
        (lambda m: m.update(more=torch.ones(1)), r"models\[1\]: expected .* alone, got 'more'"),
        (
            lambda m: m.update({"model.norm.weight": torch.ones(3)}),
            r"models\[1\]: expected 'model.norm.weight' to be \[12\], got \[3\]",
        ),
    ],
)
def test_models_that_differ(change, sentence):
    models = [tensors(0), tensors(1)]
    change(models[1])
    with pytest.raises(ValueError, match=sentence):
        merge_tensors(Linear(), models, None, rising(2))


def test_outputs_and_bases_that_do_not_fit():
    models = [tensors(0), tensors(1)]
    with pytest.raises(ValueError, match=r"out: expected tensor 'model.embed_tokens.weight', got"):
        merge_tensors(Linear(), models, None, rising(2), {})
    with pytest.raises(ValueError, match="test_deltas: expected a base model, got none"):
        merge_tensors(Deltas(), models, None, rising(2))
