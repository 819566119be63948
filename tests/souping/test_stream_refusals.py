"""What a merge cannot do ends in one sentence, before a byte is written."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from stream_models import Deltas, Linear, load, rising, save, save_models, tensors

from gemma_ext.souping.engine.files import shards
from gemma_ext.souping.engine.files.checkpoint import open_checkpoint
from gemma_ext.souping.engine.files.sources import Source
from gemma_ext.souping.engine.plan import Target, check_models
from gemma_ext.souping.engine.stream import merge_files, write_checkpoint
from gemma_ext.souping.method import TensorInfo


def merge(models, out, method=None, base=None, **options):
    return merge_files(method or Linear(), models, base, rising(len(models)), out, **options)


@pytest.fixture
def models(tmp_path):
    return save_models(tmp_path, 2)[0]


@pytest.fixture
def nothing_written(tmp_path, models):
    """The files are the same after the test as before."""
    before = sorted(tmp_path.rglob("*"))
    yield
    assert sorted(tmp_path.rglob("*")) == before


def shard(folder: Path, count: int = 3) -> dict:
    """Cuts a model into files with an index, which it returns."""
    weights = load(folder)
    (folder / "model.safetensors").unlink()
    places = {}
    for i in range(count):
        names = sorted(weights)[i::count]
        file = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        save(folder, {name: weights[name] for name in names}, file)
        places |= dict.fromkeys(names, file)
    return write_index(folder, places)


def write_index(folder: Path, places: object) -> dict:
    index = {"weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


@pytest.mark.usefixtures("nothing_written")
class TestSources:
    def test_missing_folder(self, models, tmp_path):
        with pytest.raises(ValueError, match=r"folder, got .*nowhere, which is not there"):
            merge([models[0], tmp_path / "nowhere"], tmp_path / "out")

    def test_folder_without_weights(self, models, tmp_path):
        with pytest.raises(ValueError, match=r"an index of shards in .*, got neither"):
            merge([models[0], tmp_path], tmp_path / "out")

    def test_missing_base(self, models, tmp_path):
        with pytest.raises(ValueError, match="test_deltas: expected a base model, got none"):
            merge(models, tmp_path / "out", Deltas())


@pytest.mark.parametrize(
    ("places", "sentence"),
    [
        ({"w": "../model0/model.safetensors"}, r"expected files beside the index, got '\.\./"),
        ({"w": "/etc/passwd"}, "expected files beside the index, got '/etc/passwd'"),
        ({"w": 3}, "expected files beside the index, got 3"),
        ({"w": "a.safetensors"}, "missing shard a.safetensors, which holds 1 tensors"),
        ([], "expected a weight_map of tensor names to files"),
        (None, "expected a weight_map of tensor names to files"),
        ({"w": [1]}, "expected a weight_map of tensor names to files"),
    ],
)
def test_index_that_does_not_fit(places, sentence, models, tmp_path):
    (models[1] / "model.safetensors").unlink()
    write_index(models[1], places)
    with pytest.raises(ValueError, match=sentence):
        merge(models, tmp_path / "out")


def test_index_that_is_no_json(models):
    (models[1] / "model.safetensors").unlink()
    (models[1] / "model.safetensors.index.json").write_text("{")
    with pytest.raises(ValueError, match="expected a weight_map"):
        open_checkpoint(models[1])


def test_missing_shard(models, tmp_path):
    shard(models[1])
    (models[1] / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match=r"missing shard model-00002-of-00003\.safetensors, which"):
        merge(models, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tensor_that_its_shard_has_not(models, tmp_path):
    places = shard(models[1])["weight_map"]
    write_index(models[1], {**places, "more": "model-00001-of-00003.safetensors"})
    with pytest.raises(ValueError, match="expected tensor 'more' in model-00001"):
        merge(models, tmp_path / "out")


def test_shards_without_an_index(models):
    shard(models[1])
    (models[1] / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match=r"got model-00001-of-00003\.safetensors, model-00002"):
        open_checkpoint(models[1])


def test_only_safetensors_file_of_a_folder_is_its_model(models):
    (models[1] / "model.safetensors").rename(models[1] / "other.safetensors")
    assert set(open_checkpoint(models[1]).tensors) == set(load(models[0]))


@pytest.mark.parametrize("kind", ["truncated", "code", "list", "text"])
def test_bin_that_is_not_plain_weights(kind, models, tmp_path):
    path = tmp_path / "other.bin"
    if kind == "text":
        path.write_bytes(b"no weights at all")
    else:
        torch.save({"code": {"w": Path}, "list": [torch.zeros(2)]}.get(kind, tensors(1)), path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(ValueError, match=r"other.bin: expected (a file of plain|names and)"):
        merge([models[0], path], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_tensor_is_named_with_its_file(models, tmp_path):
    weights = load(models[1])
    del weights["model.norm.weight"]
    save(models[1], weights)
    with pytest.raises(ValueError) as caught:
        merge(models, tmp_path / "out")
    assert str(caught.value) == (
        f"{models[1]}: expected tensor 'model.norm.weight', which {models[0]} has, got none"
    )


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.norm.weight", (13,)),
        ("model.norm.weight", (12, 1)),
        ("model.layers.0.mlp.up_proj.weight", (12, 31)),
        ("model.embed_tokens.weight", (53, 13)),
        ("model.embed_tokens.weight", (53,)),
        ("model.scale", (1,)),
    ],
)
def test_differing_shapes_are_named(name, shape, models, tmp_path):
    weights = load(models[1])
    expected = list(weights[name].shape)
    save(models[1], {**weights, name: torch.zeros(shape).bfloat16()})
    with pytest.raises(ValueError) as caught:
        merge(models, tmp_path / "out")
    assert str(caught.value) == (
        f"{models[1]}: expected tensor {name!r} to be {expected} as in {models[0]}, "
        f"got {list(shape)}"
    )


def test_differing_kinds_are_named(models, tmp_path):
    save(models[1], {**load(models[1]), "model.norm.weight": torch.zeros(12, dtype=torch.int32)})
    with pytest.raises(ValueError, match=r"of a kind with torch.bfloat16, got torch.int32"):
        merge(models, tmp_path / "out")


@pytest.mark.parametrize(
    ("bounds", "count", "sentence"),
    [
        ((2, None), 1, "test_linear: expected 2 or more models, got 1"),
        ((2, 2), 3, "test_linear: expected 2 models, got 3"),
        ((1, 2), 3, "test_linear: expected 1 to 2 models, got 3"),
    ],
)
def test_number_of_models(bounds, count, sentence):
    method = Linear()
    method.models = bounds
    with pytest.raises(ValueError) as caught:
        check_models(method, count, has_base=False)
    assert str(caught.value) == sentence
    check_models(method, 2, has_base=False)


def target_of(models, shape, **options):
    stored = open_checkpoint(models[0]).tensors[options.pop("name", "model.norm.weight")]
    values = rising(1)(TensorInfo("x", shape))
    return Target(TensorInfo("x", shape), torch.bfloat16, [Source(stored)], values=values)


@pytest.mark.parametrize("shape", [(13,), (12, 1), ()])
def test_target_beyond_its_source(shape, models):
    with pytest.raises(ValueError, match=r"model.safetensors: expected 'x' to be .*, got \[12\]"):
        target_of(models, shape)
    assert target_of(models, (11,)).info.numel == 11


def test_target_of_integers(models):
    with pytest.raises(ValueError, match=r"expected 'x' to be floating-point, got torch.int64"):
        target_of(models, (9,), name="model.positions")


def test_two_targets_of_one_name(models, tmp_path):
    targets = [target_of(models, (12,)), target_of(models, (11,))]
    with pytest.raises(ValueError, match="targets: expected every name once, got 'x' 2 times"):
        write_checkpoint(targets, Linear(), tmp_path / "out")


@pytest.mark.usefixtures("nothing_written")
class TestOptions:
    def test_dtype(self, models, tmp_path):
        with pytest.raises(ValueError, match=r"dtype: expected a merge into .*, got torch.int8"):
            merge(models, tmp_path / "out", dtype=torch.int8)

    @pytest.mark.parametrize("name", ["chunk_bytes", "shard_bytes", "memory_bytes", "threads"])
    def test_numbers(self, name, models, tmp_path):
        with pytest.raises(ValueError, match=f"{name}: expected a number >= 1, got 0"):
            merge(models, tmp_path / "out", **{name: 0})


def test_output_that_is_taken(models, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").touch()
    with pytest.raises(ValueError, match=r"empty or not there yet, got .*out"):
        merge(models, tmp_path / "out")
    with pytest.raises(ValueError, match=r"expected a folder, got the file .*x"):
        merge(models, tmp_path / "out" / "x")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["x"]


def test_output_that_is_empty_or_deep_below(models, tmp_path):
    (tmp_path / "out").mkdir()
    assert load(merge(models, tmp_path / "out"))
    assert load(merge(models, tmp_path / "a" / "b" / "out"))


def test_output_inside_a_source(models, tmp_path):
    (models[1] / "config.json").write_text("{}")
    before = sorted(models[1].iterdir())
    for out in (models[1] / "out", models[1] / "deep" / "out"):
        with pytest.raises(ValueError, match="expected a folder outside of the sources, got"):
            merge(models, out)
    link = tmp_path / "link"
    link.symlink_to(models[1])
    with pytest.raises(ValueError, match="outside of the sources"):
        merge(models, link / "out")
    assert sorted(models[1].iterdir()) == before


def test_read_only_target(models, tmp_path, monkeypatch):
    def refuse(path, *args, **options):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(OSError, match=f"out: cannot write to {tmp_path}: Permission denied"):
        merge(models, tmp_path / "out")


def test_full_disk_is_seen_up_front(models, tmp_path, monkeypatch):
    full = namedtuple("statvfs", "f_bavail f_frsize")(1, 512)
    monkeypatch.setattr(shards.os, "statvfs", lambda path: full)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(OSError, match=r"GB of free disk for the merge, got 0.000") as caught:
        merge(models, tmp_path / "out")
    assert caught.value.errno == errno.ENOSPC
    assert sorted(tmp_path.iterdir()) == before


# what a full disk does to a process, without one: files may not grow beyond a size
LIMITED = """
import resource, signal, sys
from stream_models import Linear, rising
from gemma_ext.souping.engine.stream import merge_files, write_checkpoint

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
try:
    merge_files(Linear(), sys.argv[1:3], None, rising(2), sys.argv[3])
except OSError as error:
    print(error)
"""


def test_files_that_cannot_be_made_leave_nothing(models, tmp_path):
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parents[1])])
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *models, tmp_path / "out"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert f"{tmp_path}: reserve: File too large" in done.stdout, done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "model0", "model1"]


def test_disk_that_fills_up_on_the_way(models, tmp_path, monkeypatch):
    """The output's file is /dev/full: reserving is left out, and every write fails."""

    def create(folder, laid_out):
        for file in laid_out:
            (folder / file.name).symlink_to("/dev/full")

    with monkeypatch.context() as patch:
        patch.setattr(shards, "create", create)
        with pytest.raises(OSError, match="the disk is full; make room and run the same merge"):
            merge(models, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out.partial" / "model.safetensors").unlink()
    merge(models, tmp_path / "out")
    assert load(tmp_path / "out").keys() == load(models[0]).keys()


def test_source_that_shrinks_while_it_is_read(models, tmp_path, monkeypatch):
    path = models[0] / "model.safetensors"
    create = shards.create

    def create_and_cut(folder, laid_out):
        create(folder, laid_out)
        os.truncate(path, path.stat().st_size - 8)

    monkeypatch.setattr(shards, "create", create_and_cut)
    with pytest.raises(OSError, match=rf"{path}: the file ends early"):
        merge(models, tmp_path / "out", dtype=torch.float32)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("nothing_written")
def test_without_the_host_module(models, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gemma_ext._host", None)
    with pytest.raises(ImportError, match="needs gemma_ext's host module: build with GEMMA_EXT_"):
        merge(models, tmp_path / "out")
