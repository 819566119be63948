"""Conversion and export from folder to folder."""

import json

import pytest
import torch
from recursive_models import KINDS, assert_same_model, logits, tiny, tokens
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from gemma_ext.nn.recursive import ExitHead, Plan, add_prefixes, load, merged, save
from gemma_ext.papers.recursive import (
    Recipe,
    convert,
    convert_folder,
    count_pieces,
    export_folder,
    folders,
    streaming,
)


@pytest.fixture
def source(tmp_path):
    def make(kind="gemma2", **options):
        folder = tmp_path / f"source-{kind}"
        tiny(kind, **options).save_pretrained(folder)
        (folder / "tokenizer.json").write_text("{}")
        return folder

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_files_and_memory_give_the_same_model(kind, source, tmp_path):
    folder = source(kind)
    recipe = Recipe(3, "stepwise", rank=3, ranks={"q_proj": 5} if kind != "pythia" else {})
    seen = []
    out = convert_folder(folder, tmp_path / "out", recipe, advance=seen.append)
    made = load(out)
    assert_same_model(made, convert(tiny(kind), recipe), tokens())
    assert sum(seen) == count_pieces(folder, recipe)
    assert (out / "tokenizer.json").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", folder.name]
    files = {p.name for p in out.iterdir()}
    assert {"config.json", "model.safetensors", "depth_lora"} <= files
    plain = AutoModelForCausalLM.from_pretrained(
        export_folder(out, tmp_path / "vanilla"),
        attn_implementation=made.config._attn_implementation,
    )
    assert_same_model(plain, merged(made), tokens())
    torch.testing.assert_close(logits(plain, tokens()), logits(made, tokens()), rtol=0, atol=3e-6)


def test_prefixes_of_both_ways_are_the_same(source, tmp_path):
    recipe = Recipe(2, prefix=3, seed=5)
    made = load(convert_folder(source("qwen3"), tmp_path / "out", recipe))
    assert_same_model(made, convert(tiny("qwen3"), recipe), tokens())
    assert Plan.of_model(made).prefix == 3


def test_shards_and_another_dtype(source, tmp_path):
    folder = source("llama", dtype=torch.float32)
    recipe = Recipe(2, rank=3)
    out = convert_folder(folder, tmp_path / "out", recipe, dtype=torch.bfloat16, shard_bytes=9000)
    assert len(list(out.glob("model-*.safetensors"))) > 2
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    made = load(out)
    assert {p.dtype for p in made.parameters()} == {torch.bfloat16}
    truth = convert(tiny("llama", dtype=torch.float32), recipe).model.layers[4].mlp.up_proj.weight
    assert torch.equal(made.model.layers[4].mlp.up_proj.weight, truth.bfloat16())
    export_folder(out, tmp_path / "vanilla", shard_bytes=9000)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "vanilla")
    assert_same_model(plain, merged(made), tokens())


def test_of_sharded_sources(tmp_path):
    model = tiny("llama")
    model.save_pretrained(tmp_path / "source", max_shard_size="20KB")
    assert len(list((tmp_path / "source").glob("*.safetensors"))) > 2
    made = load(convert_folder(tmp_path / "source", tmp_path / "out", Recipe(2)))
    assert_same_model(made, convert(model, Recipe(2)), tokens())


def test_of_pythias_own_files(source, tmp_path):
    """Released checkpoints call the head embed_out and store buffers of their attention."""
    folder = source("pythia")
    model = tiny("pythia")
    path = folder / "model.safetensors"
    state = load_file(path)
    state["embed_out.weight"] = torch.randn(model.lm_head.weight.shape, dtype=torch.float64)
    for depth in range(6):
        name = f"gpt_neox.layers.{depth}.attention"
        state[f"{name}.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool)
        state[f"{name}.masked_bias"] = torch.tensor(-1e9)
    state.pop("lm_head.weight", None)
    save_file(state, path, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    vanilla = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(vanilla.lm_head.weight, state["embed_out.weight"])
    out = convert_folder(folder, tmp_path / "out", Recipe(2, rank=3))
    assert_same_model(load(out), convert(vanilla, Recipe(2, rank=3)), tokens())
    plain = AutoModelForCausalLM.from_pretrained(export_folder(out, tmp_path / "vanilla"))
    assert_same_model(plain, merged(load(out)), tokens())


def test_an_interrupted_conversion_goes_on(source, tmp_path, monkeypatch):
    folder, recipe = source(), Recipe(2, rank=3)
    plain = streaming.stored_layer
    asked = []

    def stops(stored, *args):
        asked.append(stored)
        if stored == 1 and len(asked) == 2:
            raise KeyboardInterrupt
        return plain(stored, *args)

    def lazily(stored, *args):
        yield from stops(stored, *args)

    monkeypatch.setattr(streaming, "stored_layer", lazily)
    with pytest.raises(KeyboardInterrupt):
        convert_folder(folder, tmp_path / "out", recipe)
    assert not (tmp_path / "out").exists()
    seen = []
    convert_folder(folder, tmp_path / "out", recipe, advance=seen.append)
    assert asked == [0, 1, 1, 2]
    assert sum(seen) == count_pieces(folder, recipe)
    assert_same_model(load(tmp_path / "out"), convert(tiny("gemma2"), recipe), tokens())


def test_another_recipe_begins_anew(source, tmp_path, monkeypatch):
    folder = source()
    plain = streaming.stored_layer

    def stops(stored, *args):
        if stored == 2:
            raise KeyboardInterrupt
        yield from plain(stored, *args)

    monkeypatch.setattr(streaming, "stored_layer", stops)
    with pytest.raises(KeyboardInterrupt):
        convert_folder(folder, tmp_path / "out", Recipe(2, rank=3))
    monkeypatch.setattr(streaming, "stored_layer", plain)
    convert_folder(folder, tmp_path / "out", Recipe(2, "lower", rank=3))
    assert_same_model(
        load(tmp_path / "out"), convert(tiny("gemma2"), Recipe(2, "lower", rank=3)), tokens()
    )


def test_sources_and_places_that_are_refused(source, tmp_path):
    folder = source()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(ValueError, match="out: expected a folder that is empty or not there yet"):
        convert_folder(folder, tmp_path / "taken", Recipe(2))
    with pytest.raises(ValueError, match=r"source: expected a model's folder with config.json"):
        convert_folder(tmp_path, tmp_path / "out", Recipe(2))
    with pytest.raises(ValueError, match="loops: expected a divisor"):
        convert_folder(folder, tmp_path / "out", Recipe(4))
    with pytest.raises(ValueError, match="source: expected a recursive model"):
        export_folder(folder, tmp_path / "out")
    made = convert_folder(folder, tmp_path / "made", Recipe(2))
    with pytest.raises(ValueError, match="source: expected a vanilla model, got the recursive one"):
        convert_folder(made, tmp_path / "out", Recipe(2))
    prefixed = save(add_prefixes(load(made), 2), tmp_path / "prefixed")
    with pytest.raises(ValueError, match="expected no prefixes to merge, got 2"):
        export_folder(prefixed, tmp_path / "out")
    assert Plan.of_model(load(prefixed)).prefix == 2
    whole = load_file(folder / "model.safetensors")
    whole.pop("model.layers.4.mlp.up_proj.weight")
    save_file(whole, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"expected the tensor model.layers.4.mlp.up_proj.weight"):
        convert_folder(folder, tmp_path / "out", Recipe(2, rank=2))
    assert not list(tmp_path.glob("out*"))


def test_a_head_for_exits_is_not_exported(source, tmp_path):
    made = load(convert_folder(source(), tmp_path / "made", Recipe(2)))
    made.exit_head = ExitHead(made.get_output_embeddings().weight, 2)
    save(made, tmp_path / "exits")
    with pytest.raises(ValueError, match=r"no head for exits, got .*exit_head.safetensors"):
        export_folder(tmp_path / "exits", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_of_layers_in_two_dtypes(source, tmp_path):
    """The dtype is that of the first depth that runs a stored layer."""
    folder = source("llama", dtype=torch.float32)
    path = folder / "model.safetensors"
    whole = load_file(path)
    half = {k: t.bfloat16() if ".layers.3." in k else t for k, t in whole.items()}
    save_file(half, path, {"format": "pt"})
    out = convert_folder(folder, tmp_path / "out", Recipe(2, rank=3))
    matrices = load_file(out / "depth_lora" / "adapter_model.safetensors")
    assert {t.dtype for t in matrices.values()} == {torch.float32}
    save_file({k: half[k].float() for k in half}, path, {"format": "pt"})
    same = convert_folder(folder, tmp_path / "same", Recipe(2, rank=3))
    assert_same_model(load(out), load(same), tokens())


def test_pieces_of_another_dtype_or_shape_are_not_written(tmp_path):
    layout = {"a": (torch.float32, (2, 3))}
    group = (tmp_path, layout, 10**6)
    for piece in (torch.zeros(2, 3, dtype=torch.float64), torch.zeros(3, 2)):
        with pytest.raises(
            ValueError, match=r"a: expected torch.float32 of \(2, 3\), got torch.fl"
        ):
            folders.fill(tmp_path, [group], [("p", iter([("a", piece)]))], lambda count: None)


def test_a_journal_that_was_cut(source, tmp_path, monkeypatch):
    folder, recipe = source(), Recipe(2, rank=3)
    plain = streaming.stored_layer
    asked = []

    def stops(stored, *args):
        asked.append(stored)
        if asked == [0, 1, 2]:
            raise KeyboardInterrupt
        yield from plain(stored, *args)

    monkeypatch.setattr(streaming, "stored_layer", stops)
    with pytest.raises(KeyboardInterrupt):
        convert_folder(folder, tmp_path / "out", recipe)
    journal = tmp_path / "out.partial" / ".journal"
    text = journal.read_text()
    journal.write_text(text[: text.rindex(" ") + 1])
    seen = []
    convert_folder(folder, tmp_path / "out", recipe, advance=seen.append)
    assert asked == [0, 1, 2, 1, 2]
    assert sum(seen) == count_pieces(folder, recipe)
    assert_same_model(load(tmp_path / "out"), convert(tiny("gemma2"), recipe), tokens())


def test_how_a_model_generates_goes_along(source, tmp_path):
    folder = source()
    record = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(record | {"eos_token_id": [1, 5]}))
    out = convert_folder(folder, tmp_path / "out", Recipe(2))
    assert load(save(load(out), tmp_path / "again")).generation_config.eos_token_id == [1, 5]
