"""Folders of recursive models: what is in them, and that they come back."""

import json

import pytest
import torch
from recursive_models import KINDS, assert_same_model, logits, tiny, tokens
from safetensors.torch import load_file, save_file
from test_recursive import relaxed
from torch import nn

from gemma_ext.nn.recursive import (
    DepthLinear,
    ExitHead,
    Plan,
    add_prefixes,
    decoder_layers,
    files,
    load,
    make_recursive,
    merged,
    parts,
    save,
)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_comes_back_to_the_bit(kind, tmp_path):
    model = relaxed(kind)
    save(model, tmp_path / "m")
    again = load(tmp_path / "m")
    ids = tokens()
    assert_same_model(again, model, ids)
    assert Plan.of_model(again) == Plan.of_model(model)
    _, layers = decoder_layers(again)
    one, two = (dict(layers[d].named_parameters()) for d in (1, 4))
    assert all((one[n] is two[n]) == (".lora_" not in n) for n in one)
    assert not again.training
    assert not list((tmp_path / "m").rglob("*.tmp"))


def test_stored_layers_are_there_once(tmp_path):
    model = relaxed("gemma2", plan=Plan.of(6, 2, "middle-cycle", ranks={"mlp.up_proj": 3}))
    save(model, tmp_path)
    found = load_file(tmp_path / "model.safetensors")
    layers = {int(key.split(".")[2]) for key in found if key.startswith("model.layers.")}
    assert layers == {0, 1, 2, 3}
    assert "lm_head.weight" not in found
    assert not any("lora" in key for key in found)
    adapter = load_file(tmp_path / "depth_lora" / "adapter_model.safetensors")
    start = "base_model.model.model.layers"
    expected = {f"{start}.{d}.mlp.up_proj.lora_{f}.weight" for d in range(1, 5) for f in "AB"}
    assert set(adapter) == expected
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["num_hidden_layers"] == 6
    assert config["recursive"]["stored"] == 2
    assert config["recursive"]["stored_of_depth"] == [0, 1, 2, 1, 2, 3]


@pytest.mark.parametrize("kind", ["gemma2", "qwen2", "pythia"])
def test_peft_reads_the_matrices_at_scale_one(kind, tmp_path):
    peft = pytest.importorskip("peft")
    names = {"gemma2": ("q_proj", "down_proj"), "qwen2": ("k_proj", "o_proj")}
    parts = names.get(kind, ("query_key_value", "dense_4h_to_h"))
    whole = tiny(kind)
    linears = [n for n, _ in decoder_layers(whole)[1][0].named_modules() if n.endswith(parts)]
    plan = Plan.of(6, 2, ranks=dict(zip(linears, (2, 5), strict=True)), lora_from_loop=1)
    model = relaxed(kind, plan=plan)
    save(model, tmp_path)
    record = json.loads((tmp_path / "depth_lora" / "adapter_config.json").read_text())
    assert record["lora_alpha"] == record["r"] == 5
    assert record["alpha_pattern"] == record["rank_pattern"] == dict(plan.ranks)
    assert record["lora_dropout"] == 0
    base = make_recursive(tiny(kind), Plan.of(6, 2))
    ids = tokens()
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "depth_lora").eval()
    for module in adapted.modules():
        if hasattr(module, "scaling") and isinstance(module.scaling, dict):
            assert set(module.scaling.values()) == {1.0}
    torch.testing.assert_close(logits(adapted, ids), logits(model, ids), rtol=0, atol=2e-6)


def test_training_a_loaded_model_moves_all_depths_of_a_weight(tmp_path):
    save(relaxed("llama"), tmp_path)
    model = load(tmp_path)
    before = model.model.layers[4].mlp.up_proj.weight.clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = tokens()
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    one, two = (model.model.layers[d].mlp.up_proj.weight for d in (1, 4))
    assert not torch.equal(two, before)
    assert torch.equal(one, two)
    states = len([p for g in optimizer.param_groups for p in g["params"]])
    assert states == len({p.data_ptr() for p in model.parameters()})


def test_other_dtypes_and_shards(tmp_path):
    model = relaxed("qwen3")
    save(model, tmp_path)
    half = load(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert isinstance(half.model.layers[0].self_attn.q_proj, DepthLinear)
    whole = load_file(tmp_path / "model.safetensors")
    names = sorted(whole)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, keys in parts.items():
        save_file({key: whole[key] for key in keys}, tmp_path / file)
    weight_map = {key: file for file, keys in parts.items() for key in keys}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "model.safetensors").unlink()
    assert_same_model(load(tmp_path), model, tokens())


def test_a_vanilla_folder_is_a_model_of_one_loop(tmp_path):
    model = tiny("llama")
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert_same_model(again, model, tokens())
    assert Plan.of_model(again) == Plan.of(6, 1)
    with pytest.raises(ValueError, match="expected a recursive one, got one without"):
        save(again, tmp_path / "m")


def test_saving_again_leaves_nothing_of_the_model_before(tmp_path):
    first = relaxed("gemma2")
    first.exit_head = ExitHead(first.get_output_embeddings().weight, 2)
    add_prefixes(first, 2)
    save(first, tmp_path)
    ids = tokens()
    again = load(tmp_path)
    assert_same_model(again, first, ids)
    assert torch.equal(again.exit_head.lora_A, first.exit_head.lora_A)
    plain = relaxed("gemma2", 0)
    save(plain, tmp_path)
    assert_same_model(load(tmp_path), plain, ids)
    assert not (tmp_path / "exit_head.safetensors").exists()
    assert not (tmp_path / "depth_prefix.safetensors").exists()


def test_prefixes_that_do_not_fit_their_plan(tmp_path):
    save(add_prefixes(relaxed("llama", 0), 2), tmp_path)
    path = tmp_path / "depth_prefix.safetensors"
    whole = load_file(path)
    save_file({**whole, "1.prefix": torch.zeros(3, 24)}, path)
    with pytest.raises(ValueError, match=r"expected 1.prefix of \(2, 24\), got \(3, 24\)"):
        load(tmp_path)


def test_folders_that_do_not_fit_their_plan(tmp_path):
    save(relaxed("llama"), tmp_path)
    path = tmp_path / "model.safetensors"
    whole = load_file(path)
    key = "model.layers.1.mlp.up_proj.weight"
    save_file({k: t for k, t in whole.items() if k != key}, path)
    with pytest.raises(ValueError, match=r"weights: .* got missing ones as .*1.mlp.up_proj"):
        load(tmp_path)
    save_file({**whole, key: torch.zeros(3, 3, dtype=torch.float64)}, path)
    with pytest.raises(ValueError, match="got mismatched ones as"):
        load(tmp_path)
    save_file({**whole, key.replace("1", "5", 1): whole[key].clone()}, path)
    with pytest.raises(ValueError, match=r"weights: expected 3 stored layers, got model.layers.5"):
        load(tmp_path)
    save_file({**whole, "odd": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="got unexpected ones as odd"):
        load(tmp_path)
    save_file(whole, path)
    adapter = tmp_path / "depth_lora" / "adapter_model.safetensors"
    matrices = load_file(adapter)
    last = max(matrices)
    save_file({k: t for k, t in matrices.items() if k != last}, adapter)
    with pytest.raises(ValueError, match=r"adapter_model.safetensors: expected .* got None"):
        load(tmp_path)
    adapter.unlink()
    with pytest.raises(ValueError, match=r"expected the file .* which the plan asks for, got none"):
        load(tmp_path)
    path.unlink()
    with pytest.raises(
        ValueError, match=r"expected model.safetensors or .*index.json, got neither"
    ):
        load(tmp_path)


def test_no_bars_and_settings_stay(tmp_path, capfd):
    from transformers.utils import logging

    save(relaxed("llama"), tmp_path)
    capfd.readouterr()
    level = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load(tmp_path)
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == level


def test_saving_into_a_sharded_folder_replaces_it(tmp_path):
    first, second = relaxed("llama"), relaxed("llama", 0, seed=5)
    save(first, tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    names = sorted(whole)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, keys in parts.items():
        save_file({key: whole[key] for key in keys}, tmp_path / file)
    weight_map = {key: file for file, keys in parts.items() for key in keys}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "tokenizer.json").write_text("{}")
    save(second, tmp_path)
    assert_same_model(load(tmp_path), second, tokens())
    found = {path.name for path in tmp_path.rglob("*")}
    files = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert found == files


def test_an_index_removes_nothing_outside_its_folder(tmp_path):
    (tmp_path / "other").write_text("kept")
    folder = tmp_path / "m"
    save(relaxed("llama", 0), folder)
    index = {"weight_map": {"a": "../other"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    save(relaxed("llama", 0), folder)
    assert (tmp_path / "other").read_text() == "kept"


def test_how_a_model_generates_comes_back(tmp_path):
    model = relaxed("gemma2")
    model.generation_config.eos_token_id = [1, 5]
    model.generation_config.max_new_tokens = 3
    for _ in range(2):
        save(model, tmp_path)
        model = load(tmp_path)
        assert model.generation_config.eos_token_id == [1, 5]
        assert model.generation_config.max_new_tokens == 3
    plain = merged(model).generation_config
    assert plain.eos_token_id == [1, 5]
    assert plain is not model.generation_config
    (tmp_path / "generation_config.json").unlink()
    assert load(tmp_path).generation_config.eos_token_id is None


@pytest.mark.parametrize("held", [False, True])
def test_an_interrupted_save_leaves_no_half_of_a_model(held, tmp_path, monkeypatch):
    before, after = relaxed("llama", 0), relaxed("llama", seed=5)
    if held:
        save(before, tmp_path)
    listed = sorted(tmp_path.rglob("*"))
    plain = files.write_tensors

    def stops(path, tensors):
        if path.name == "adapter_model.safetensors":
            raise KeyboardInterrupt
        plain(path, tensors)

    monkeypatch.setattr(files, "write_tensors", stops)
    with pytest.raises(KeyboardInterrupt):
        save(after, tmp_path)
    assert sorted(tmp_path.rglob("*")) == listed
    if held:
        assert_same_model(load(tmp_path), before, tokens())


def test_the_config_comes_last(tmp_path, monkeypatch):
    seen = []
    plain = parts.os.replace

    def noted(source, target):
        seen.append(target.name)
        plain(source, target)

    monkeypatch.setattr(parts.os, "replace", noted)
    save(relaxed("llama"), tmp_path)
    assert seen[-1] == "config.json"
    assert seen.count("config.json") == 1
    # once beside their places, once there
    assert seen.count("model.safetensors") == seen.count("adapter_config.json") == 2


def test_depths_that_went_apart_are_not_saved(tmp_path):
    model = relaxed("gemma2")
    model.load_state_dict(model.state_dict(), assign=True)
    one, two = (model.model.layers[depth].mlp.up_proj for depth in (1, 4))
    two.weight = nn.Parameter(one.weight.detach().clone())
    again = load(save(model, tmp_path / "same"))
    torch.testing.assert_close(logits(again, tokens()), logits(model, tokens()), rtol=0, atol=2e-6)
    nn.init.zeros_(two.weight)
    with pytest.raises(
        ValueError, match=r"depths \[1, 4\] to share mlp.up_proj.weight, got another at depth 4"
    ):
        save(model, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_a_head_that_is_the_embedding_by_hand(tmp_path):
    model = relaxed("llama")
    assert not model.config.tie_word_embeddings
    model.lm_head.weight = model.model.embed_tokens.weight
    again = load(save(model, tmp_path))
    assert torch.equal(again.lm_head.weight, model.model.embed_tokens.weight)
    torch.testing.assert_close(logits(again, tokens()), logits(model, tokens()), rtol=0, atol=2e-6)


def test_mixed_dtypes_stay_in_memory_and_are_one_when_loaded(tmp_path):
    model = tiny("gemma2", dtype=torch.bfloat16)
    for name, part in model.named_modules():
        if "norm" in name:
            part.float()
    made = make_recursive(model, Plan.of(6, 2, ranks={"mlp.up_proj": 2}))
    kinds = {name: parameter.dtype for name, parameter in made.named_parameters()}
    assert set(kinds.values()) == {torch.bfloat16, torch.float32}
    plain = merged(made)
    assert all(kinds[n] == p.dtype for n, p in plain.named_parameters() if n in kinds)
    assert torch.equal(logits(plain, tokens()), logits(made, tokens()))
    again = load(save(made, tmp_path))
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    assert logits(again, tokens()).isfinite().all()


def test_a_rank_of_zero_is_no_matrix(tmp_path):
    model = relaxed("llama", plan=Plan.of(6, 2, ranks={"mlp.up_proj": 0}))
    assert Plan.of_model(model).ranks == {}
    assert_same_model(load(save(model, tmp_path)), model, tokens())
