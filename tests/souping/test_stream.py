"""A streamed merge gives what the same method gives in memory, whatever it is cut into."""

from __future__ import annotations

import os
import random
import sys

import pytest
import stream_models as small
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from stream_models import (
    Deltas,
    Linear,
    Shrunk,
    load,
    rising,
    same_bits,
    save,
    save_models,
    tensors,
)

from gemma_ext.souping.engine.files.checkpoint import open_checkpoint
from gemma_ext.souping.engine.files.sources import Source
from gemma_ext.souping.engine.loads import cut, held_bytes
from gemma_ext.souping.engine.memory import merge_tensors
from gemma_ext.souping.engine.plan import copied, count_layers, layer_of, merged, plan
from gemma_ext.souping.engine.progress import byte_bar
from gemma_ext.souping.engine.stream import merge_files, write_checkpoint

METHODS = {
    "linear": Linear(),
    "deltas": Deltas(),
    "two surveys": Shrunk(),
    "rows": Shrunk("row"),
    "whole tensors": Shrunk("tensor"),
    "model-wide": Shrunk(model_wide=True),
    "model-wide rows": Shrunk("row", model_wide=True),
}


@pytest.fixture
def restored_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["deltas", "two surveys", "model-wide"])
def test_tensors_that_go_past_the_page_cache(name, tmp_path):
    """Runs of several pages, at all places in a page, held for every survey or read again."""
    method = METHODS[name]
    shapes = {"a": (701, 999), "b.weight": (13,), "c": (1200, 512), "d": (1,), "e": (300_007,)}
    models, base = save_models(tmp_path, 2, shapes=shapes)
    origin = base if method.base == "needed" else None
    expected = merge_tensors(method, [load(m) for m in models], origin and load(origin), rising(2))
    for chunk, memory in ((1 << 20, 64 << 20), (400_000, 1 << 20), (300_000, 12 << 20)):
        for path in (*models, base):
            file = os.open(path / "model.safetensors", os.O_RDONLY)
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)
        out = tmp_path / f"out{chunk}"
        options = {"chunk_bytes": chunk, "memory_bytes": memory}
        assert same_bits(
            load(merge_files(method, models, origin, rising(2), out, **options)), expected
        )


def read_bytes(method, chunk_bytes, memory_bytes, tmp_path):
    seen = []
    options = {"chunk_bytes": chunk_bytes, "memory_bytes": memory_bytes}
    options["progress"] = lambda done, total: seen.append(total)
    out = tmp_path / f"out{memory_bytes}"
    merge_files(method, [tmp_path / "a"], None, rising(1), out, **options)
    return seen[-1]


def test_what_memory_holds_is_read_once(tmp_path):
    """A tensor of eight pieces, surveyed twice: 3 or 1 times its bytes are read, 1 written."""
    weights = {"w": torch.randn(64, 1024).bfloat16()}
    save(tmp_path / "a", weights)
    size = weights["w"].nbytes
    assert read_bytes(Shrunk(), size // 8, 8 << 20, tmp_path) == 2 * size
    assert read_bytes(Shrunk(), size // 8, 2 * size, tmp_path) == 4 * size


def test_a_method_that_skips_its_surveys_holds_no_more_than_pieces(tmp_path):
    class Blind(Shrunk):
        def skips(self, step, state):
            return True

        def survey(self, step, part, state):
            raise AssertionError("nothing to see")

        def merge(self, part, state):
            part.out.copy_(part.sources[0])

    weights = {"w": torch.randn(64, 1024).bfloat16()}
    stored = open_checkpoint(save(tmp_path / "a", weights)).tensors["w"]
    target = merged(small.TensorInfo("w", stored.shape), [Source(stored)], None, rising(1))
    (tasks,) = cut([target], Blind(), (), stored.nbytes // 8, 1 << 30)
    assert len(tasks) == 8
    assert held_bytes(tasks) == tasks[0].load.memory_bytes
    out = merge_files(Blind(), [tmp_path / "a"], None, rising(1), tmp_path / "out")
    assert same_bits(load(out), weights)


@pytest.mark.usefixtures("restored_threads")
@pytest.mark.parametrize("name", METHODS)
def test_any_cut_gives_the_bits_of_the_memory_engine(name, tmp_path):
    method, draw = METHODS[name], random.Random(name)
    models, base = save_models(tmp_path, 3)
    origin = base if method.base == "needed" else None
    expected = merge_tensors(method, [load(m) for m in models], origin and load(origin), rising(3))
    assert len(expected) == len(small.SHAPES) + 1
    for i in range(12):
        options = {
            "chunk_bytes": draw.choice([1, 7, 24, 100, 1000, 1 << 20]),
            "memory_bytes": draw.choice([1, 3000, 20_000, 1 << 20]),
            "shard_bytes": draw.choice([1, 1500, 1 << 20]),
            "threads": draw.choice([1, 2, 5]),
        }
        torch.set_num_threads(1 + i % 2)  # with two, two lanes share the tensors
        out = merge_files(method, models, origin, rising(3), tmp_path / f"out{i}", **options)
        assert torch.get_num_threads() == 1 + i % 2
        assert same_bits(load(out), expected), options
        assert not (tmp_path / f"out{i}.partial").exists()


def test_the_same_merge_gives_the_same_files(tmp_path):
    models, _ = save_models(tmp_path, 2)
    first = merge_files(Linear(), models, None, rising(2), tmp_path / "first", chunk_bytes=50)
    second = merge_files(Linear(), models, None, rising(2), tmp_path / "second", threads=1)
    assert small.files_of(first) == small.files_of(second)


def test_known_answer(tmp_path):
    models, _ = save_models(tmp_path, 2, dtype=torch.float32)
    out = load(merge_files(Linear(), models, None, rising(2), tmp_path / "out"))
    left, right = (load(model) for model in models)
    for name in small.SHAPES:
        third = torch.tensor(1 / 3, dtype=torch.float32).double()
        exact = third * left[name].double() + (1 - third) * right[name].double()
        torch.testing.assert_close(out[name].double(), exact, rtol=1e-6, atol=1e-7)
    assert torch.equal(out["model.positions"], left["model.positions"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_sources_of_several_dtypes(dtype, tmp_path):
    models = [
        save(tmp_path / "a", tensors(0, dtype)),
        save(tmp_path / "b", tensors(1, torch.bfloat16)),
        save(tmp_path / "c", tensors(2, torch.float32)),
    ]
    out = merge_files(Linear(), models, None, rising(3), tmp_path / "out", chunk_bytes=40)
    expected = merge_tensors(Linear(), [load(m) for m in models], None, rising(3))
    assert same_bits(load(out), expected)
    stored = torch.float32 if dtype == torch.float64 else dtype
    assert load(out)["model.norm.weight"].dtype == stored


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_is_widened(dtype, tmp_path):
    weights = {
        "w": torch.arange(256, dtype=torch.uint8).view(dtype),
        "v": torch.randn(5, 3).to(dtype),
    }
    for name in ("a", "b"):
        save(tmp_path / name, weights)
    models = [tmp_path / "a", tmp_path / "b"]
    out = load(merge_files(Linear(), models, None, rising(2), tmp_path / "out", chunk_bytes=16))
    for name in weights:
        assert out[name].dtype == torch.bfloat16
        torch.testing.assert_close(
            out[name].float(), weights[name].float(), rtol=0, atol=0, equal_nan=True
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_output_dtype(dtype, tmp_path):
    models, _ = save_models(tmp_path, 2)
    out = load(merge_files(Linear(), models, None, rising(2), tmp_path / "out", dtype=dtype))
    expected = merge_tensors(Linear(), [load(m) for m in models], None, rising(2), dtype=dtype)
    assert same_bits(out, expected)
    assert {t.dtype for n, t in out.items() if n != "model.positions"} == {dtype}
    assert out["model.positions"].dtype == torch.int64


def test_sharded_sources_and_outputs(tmp_path):
    models, _ = save_models(tmp_path, 2)
    whole = merge_files(Linear(), models, None, rising(2), tmp_path / "whole")
    shards = merge_files(Linear(), models, None, rising(2), tmp_path / "shards", shard_bytes=700)
    names = sorted(path.name for path in shards.glob("*.safetensors"))
    assert len(names) > 2
    assert names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    assert same_bits(load(shards), load(whole))
    index = open_checkpoint(shards)
    assert set(index.tensors) == set(load(whole))
    again = merge_files(Linear(), [shards, whole], None, rising(2), tmp_path / "again")
    assert load(again).keys() == load(whole).keys()


def test_index_states_the_size_of_all_tensors(tmp_path):
    import json

    models, _ = save_models(tmp_path, 2)
    out = merge_files(Linear(), models, None, rising(2), tmp_path / "out", shard_bytes=1)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    sizes = {name: t.numel() * t.element_size() for name, t in load(out).items()}
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert set(index["weight_map"]) == set(sizes)
    for name, shard in index["weight_map"].items():
        with safe_open(out / shard, "pt") as file:
            assert name in file.keys()  # noqa: SIM118


def test_files_are_as_the_formats_own_writer_makes_them(tmp_path):
    models, _ = save_models(tmp_path, 2)
    out = merge_files(Linear(), models, None, rising(2), tmp_path / "out")
    with safe_open(out / "model.safetensors", "pt") as file:
        metadata = file.metadata()
        order = list(file.keys())
    assert metadata["format"] == "pt"
    assert len(metadata["gemma_ext_merge"]) == 64
    save_file(load(out), tmp_path / "theirs.safetensors", metadata=metadata)
    theirs = (tmp_path / "theirs.safetensors").read_bytes()
    ours = (out / "model.safetensors").read_bytes()
    with safe_open(tmp_path / "theirs.safetensors", "pt") as file:
        assert list(file.keys()) == order
    data = sum(t.numel() * t.element_size() for t in load(out).values())
    assert ours[-data:] == theirs[-data:]
    assert (len(ours) - data) % 8 == 0


@pytest.mark.parametrize("shards", [1, 2])
def test_bin_checkpoints(shards, tmp_path):
    import json

    models, _ = save_models(tmp_path, 2)
    weights = load(models[0])
    weights["model.layers.0.mlp.up_proj.weight"] = (
        weights["model.layers.0.mlp.up_proj.weight"].T.contiguous().T
    )
    folder = tmp_path / "bin"
    folder.mkdir()
    if shards == 1:
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        names = sorted(weights)
        places = {n: f"pytorch_model-{i % 2}.bin" for i, n in enumerate(names)}
        for shard in sorted(set(places.values())):
            held = {n: weights[n] for n in names if places[n] == shard}
            torch.save(held, folder / shard)
        index = folder / "pytorch_model.bin.index.json"
        index.write_text(json.dumps({"weight_map": places}))
    safe = merge_files(Linear(), models, None, rising(2), tmp_path / "safe")
    out = merge_files(
        Linear(), [folder, models[1]], None, rising(2), tmp_path / "out", chunk_bytes=60
    )
    assert same_bits(load(out), load(safe))


def test_tied_head_is_the_embedding(tmp_path):
    models, _ = save_models(tmp_path, 2)
    weights = load(models[1])
    weights["lm_head.weight"] = torch.randn(53, 12).bfloat16()
    save(models[1], weights)
    out = load(merge_files(Linear(), models, None, rising(2), tmp_path / "out"))
    tied = load(models[0])
    tied["lm_head.weight"] = tied["model.embed_tokens.weight"].clone()
    expected = merge_tensors(Linear(), [tied, weights], None, rising(2))
    assert same_bits(out, expected)


def test_embeddings_are_cut_to_their_common_rows(tmp_path):
    models, _ = save_models(tmp_path, 2)
    weights = load(models[1])
    longer = torch.cat([weights["model.embed_tokens.weight"], torch.ones(4, 12).bfloat16()])
    save(models[1], {**weights, "model.embed_tokens.weight": longer})
    for order, name in ((models, "shorter first"), (models[::-1], "longer first")):
        out = load(merge_files(Linear(), order, None, rising(2), tmp_path / name, chunk_bytes=100))
        assert out["model.embed_tokens.weight"].shape == (53, 12)
    short = {**weights, "model.embed_tokens.weight": longer[:53]}
    expected = merge_tensors(Linear(), [short, load(models[0])], None, rising(2))
    assert same_bits(
        {n: t for n, t in out.items() if n != "model.positions"},
        {n: t for n, t in expected.items() if n != "model.positions"},
    )


def test_skip_keeps_the_bases(tmp_path):
    models, base = save_models(tmp_path, 2)
    weights = load(models[1])
    del weights["model.norm.weight"]
    weights["model.layers.1.mlp.up_proj.weight"] = torch.ones(30, 12).bfloat16()
    weights["model.extra"] = torch.ones(3)
    save(models[1], weights)
    with pytest.raises(ValueError, match=r"model1: expected tensor .*up_proj.* to be"):
        merge_files(Deltas(), models, base, rising(2), tmp_path / "out")
    out = load(merge_files(Deltas(), models, base, rising(2), tmp_path / "out", skip=True))
    origin = load(base)
    for name in ("model.norm.weight", "model.layers.1.mlp.up_proj.weight"):
        assert torch.equal(out[name], origin[name])
    assert not torch.equal(out["model.embed_tokens.weight"], origin["model.embed_tokens.weight"])
    assert set(out) == set(origin)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float8_e4m3fn])
def test_copied_tensors(dtype, tmp_path):
    """In their own dtype through the kernel, in another one converted; from `.bin` as well."""
    weights = {
        **tensors(3),
        "mask": torch.tensor([True, False]),
        "eight": torch.ones(5).to(torch.float8_e5m2),
    }
    save(tmp_path / "safe", weights)
    (tmp_path / "bin").mkdir()
    torch.save(weights, tmp_path / "bin" / "pytorch_model.bin")
    for kind in ("safe", "bin"):
        source = open_checkpoint(tmp_path / kind)
        targets = [
            copied(small.TensorInfo(name, stored.shape), Source(stored), dtype)
            for name, stored in source.tensors.items()
        ]
        out = load(write_checkpoint(targets, Linear(), tmp_path / f"out {kind}"))
        for name, weight in weights.items():
            floating = weight.is_floating_point()
            expected = weight.to(dtype) if dtype and floating else weight
            assert out[name].dtype == expected.dtype
            assert small.bytes_of(out[name]) == small.bytes_of(expected)


def test_method_that_ignores_the_base_does_not_read_it(tmp_path):
    models, _ = save_models(tmp_path, 2)
    broken = save(tmp_path / "other", {"w": torch.zeros(2)})
    method = Linear()
    method.base = "unused"
    out = merge_files(method, models, broken, rising(2), tmp_path / "out")
    assert "w" not in load(out)


def test_output_loads_in_transformers(tmp_path):
    from integrations.tiny_models import gemma2
    from transformers import Gemma2ForCausalLM

    models = []
    for seed in range(2):
        folder = tmp_path / f"model{seed}"
        gemma2(seed).save_pretrained(folder)
        models.append(folder)
    config = (models[0] / "config.json").read_bytes()
    out = merge_files(
        Linear(),
        models,
        None,
        rising(2),
        tmp_path / "out",
        shard_bytes=20_000,
        finish=lambda folder: (folder / "config.json").write_bytes(config) and None,
    )
    assert len(list(out.glob("model-*.safetensors"))) > 1
    merged = Gemma2ForCausalLM.from_pretrained(out)
    left, right = (Gemma2ForCausalLM.from_pretrained(folder) for folder in models)
    for name, weight in merged.state_dict().items():
        expected = left.state_dict()[name] / 3 + right.state_dict()[name] * (2 / 3)
        torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-6)


def test_progress_ends_at_what_it_announced(tmp_path):
    models, _ = save_models(tmp_path, 3)
    seen = []
    merge_files(
        Shrunk(),
        models,
        None,
        rising(3),
        tmp_path / "out",
        chunk_bytes=100,
        memory_bytes=1,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    floats = [t for t in load(models[0]).values() if t.is_floating_point()]
    size = sum(t.numel() * t.element_size() for t in floats)
    # three passes over three models, one result, and 72 bytes of integers that are copied
    assert {total for _, total in seen} == {3 * 3 * size + size + 72 * 2}
    assert seen[-1][0] == seen[-1][1]


def test_provenance_depends_on_weights_parameters_and_recipe_alone(tmp_path):
    models, _ = save_models(tmp_path, 2)

    def origin(name, sources=models, first=1, **options):
        out = merge_files(Linear(), sources, None, rising(2, first), tmp_path / name, **options)
        with safe_open(next(out.glob("*.safetensors")), "pt") as file:
            return file.metadata()["gemma_ext_merge"]

    first = origin("first")
    moved = [save(tmp_path / f"moved{i}", load(m)) for i, m in enumerate(models)]
    assert origin("again", moved, chunk_bytes=8, shard_bytes=100) == first
    assert origin("swapped", models[::-1]) != first
    assert origin("recipe", recipe="x: 1") != first
    assert origin("other values", first=2) != first
    weights = load(models[0])
    weights["model.norm.weight"][3] += 1
    assert origin("other weights", [save(tmp_path / "changed", weights), models[1]]) != first


def test_layers_are_found_in_names():
    names = ["model.layers.3.mlp.weight", "transformer.h.11.attn.weight", "lm_head.weight"]
    assert [layer_of(name) for name in names] == [3, 11, None]
    assert count_layers(names) == 12
    assert count_layers(["norm.weight"]) == 0


def test_values_are_asked_for_with_name_shape_and_layer(tmp_path):
    models, _ = save_models(tmp_path, 2)
    seen = []

    def values(tensor):
        seen.append(tensor)
        return rising(2)(tensor)

    plan(Linear(), [open_checkpoint(m) for m in models], None, values)
    assert {t.name: t.shape for t in seen} == small.SHAPES
    assert {(t.layer, t.layers) for t in seen} == {(0, 2), (1, 2), (None, 2)}


class Lazy(Shrunk):
    """Looks at tensors of two dimensions alone, and doubles the others."""

    def __init__(self, **options):
        super().__init__(**options)
        self.surveyed = set()

    def skips(self, step, state):
        return len(state["shape"]) < 2

    def survey(self, step, part, state):
        self.surveyed.add(part.name)
        if not self.skips(step, state):
            super().survey(step, part, state)

    def settle(self, step, state):
        if not self.skips(step, state):
            super().settle(step, state)

    def merge(self, part, state):
        if len(state["shape"]) < 2:
            state |= {"scale": 2.0, "largest": 1.0}
        super().merge(part, state)


@pytest.mark.parametrize("model_wide", [False, True])
def test_what_a_method_skips_is_not_read(model_wide, tmp_path):
    models, _ = save_models(tmp_path, 1)
    expected = merge_tensors(Lazy(model_wide=model_wide), [load(models[0])], None, rising(1))
    method, seen = Lazy(model_wide=model_wide), []
    options = {"chunk_bytes": 30, "memory_bytes": 1}
    options["progress"] = lambda done, total: seen.append((done, total))
    out = merge_files(method, models, None, rising(1), tmp_path / "out", **options)
    assert same_bits(load(out), expected)
    names = {name for name, shape in small.SHAPES.items() if len(shape) == 2 and 0 not in shape}
    assert method.surveyed == names
    assert seen[-1][0] == seen[-1][1]


def test_bar_shows_bytes_and_the_time_left(capsys):
    with byte_bar("merging") as update:
        update(500_000, 2_000_000)
        update(2_000_000, 2_000_000)
    shown = capsys.readouterr().err
    assert "merging" in shown
    assert "2.0/2.0 MB" in shown


def test_bar_is_optional(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich", None)
    with pytest.raises(ImportError, match=r"needs rich: pip install 'gemma_ext\[merge\]'"):
        byte_bar("merging").__enter__()
    with byte_bar("merging", show=False) as update:
        update(1, 2)
    assert capsys.readouterr().err == ""
