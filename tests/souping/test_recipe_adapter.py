"""LoRA adapters added while weights are read, against peft's own merge."""

import json

import pytest
import torch
import transformers

from gemma_ext.souping.lora.folder import is_adapter
from gemma_ext.souping.recipes.adapted import read_adapter

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def model(kind="Gemma2"):
    torch.manual_seed(0)
    if kind == "GPT2":
        config = transformers.GPT2Config(
            vocab_size=31, n_positions=16, n_embd=8, n_layer=2, n_head=2
        )
        return transformers.GPT2LMHeadModel(config).eval()
    config = transformers.Gemma2Config(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    return transformers.Gemma2ForCausalLM(config).eval()


def adapted(folder, kind="Gemma2", **options):
    """Saves a random adapter and returns the weights before and after peft's merge."""
    before = {name: tensor.clone() for name, tensor in model(kind).state_dict().items()}
    wrapped = peft.get_peft_model(model(kind), peft.LoraConfig(**options))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.normal_(std=0.3)
    wrapped.save_pretrained(folder)
    return before, wrapped.merge_and_unload().state_dict()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Gemma2", {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"]}),
        ("Gemma2", {"r": 4, "target_modules": "all-linear", "use_rslora": True}),
        (
            "Gemma2",
            {
                "r": 2,
                "lora_alpha": 4,
                "target_modules": ["q_proj", "v_proj", "up_proj"],
                "rank_pattern": {"q_proj": 5, "layers.1.mlp.up_proj": 1},
                "alpha_pattern": {"v_proj": 9, "layers.0.self_attn.q_proj": 3},
            },
        ),
        ("Gemma2", {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["norm"]}),
        ("Gemma2", {"r": 2, "target_modules": ["embed_tokens", "k_proj"]}),
        ("GPT2", {"r": 2, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    ],
)
def test_every_weight_is_as_peft_merges_it(tmp_path, kind, options):
    before, after = adapted(tmp_path, kind, **options)
    assert is_adapter(tmp_path)
    assert not is_adapter(tmp_path.parent)
    shapes = {name: tuple(tensor.shape) for name, tensor in before.items()}
    adapter = read_adapter(tmp_path, shapes)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    tied = {"lm_head.weight"} if "embed_tokens" in options["target_modules"] else set()
    assert changed - tied == adapter.deltas.keys() | adapter.replaced.keys()
    for name, delta in adapter.deltas.items():
        base = adapter.replaced.get(name, before[name])
        whole = delta(base, 0)
        assert whole.dtype == torch.float32
        torch.testing.assert_close(whole, after[name], rtol=1e-5, atol=1e-5)
        middle = len(base) // 2
        pieces = [delta(base[:middle], 0), delta(base[middle:], middle)]
        torch.testing.assert_close(torch.cat(pieces), whole, rtol=1e-6, atol=1e-6)
    for name in adapter.replaced.keys() - adapter.deltas.keys():
        assert torch.equal(adapter.replaced[name], after[name])


def test_weights_are_rounded_to_a_dtype_on_demand(tmp_path):
    before, _ = adapted(tmp_path, r=2, target_modules=["q_proj"])
    shapes = {name: tuple(tensor.shape) for name, tensor in before.items()}
    delta = next(iter(read_adapter(tmp_path, shapes, torch.bfloat16).deltas.items()))
    assert delta[1](before[delta[0]], 0).dtype == torch.bfloat16


def change(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_adapters_that_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected an adapter_config\.json of peft, got none"):
        read_adapter(tmp_path, {})
    before, _ = adapted(tmp_path, r=2, target_modules=["q_proj"])
    shapes = {name: tuple(tensor.shape) for name, tensor in before.items()}
    q = "model.layers.0.self_attn.q_proj.weight"
    with pytest.raises(ValueError, match=f"the model has no tensor {q}, which the adapter changes"):
        read_adapter(tmp_path, {name: s for name, s in shapes.items() if name != q})
    with pytest.raises(ValueError, match=rf"expected factors of {q} for \[9, 16\], got \[16, 16\]"):
        read_adapter(tmp_path, {**shapes, q: (9, 16)})
    change(tmp_path, use_dora=True, bias="all")
    with pytest.raises(ValueError, match=r"use_dora, bias: expected W \+ s B A alone"):
        read_adapter(tmp_path, shapes)
    change(tmp_path, peft_type="IA3")
    with pytest.raises(ValueError, match="expected a LoRA adapter, got IA3"):
        read_adapter(tmp_path, shapes)


def test_a_lost_factor_and_lost_weights(tmp_path):
    from safetensors.torch import load_file, save_file

    before, _ = adapted(tmp_path, r=2, target_modules=["q_proj"])
    shapes = {name: tuple(tensor.shape) for name, tensor in before.items()}
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    lost = next(name for name in tensors if "layers.1.self_attn.q_proj.lora_A" in name)
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, path)
    with pytest.raises(ValueError, match=r"expected two matrices A and B of model\.layers\.1"):
        read_adapter(tmp_path, shapes)
    path.unlink()
    with pytest.raises(ValueError, match=r"adapter_model\.bin, got neither"):
        read_adapter(tmp_path, shapes)
    torch.save(tensors, tmp_path / "adapter_model.bin")
    assert len(read_adapter(tmp_path, shapes).deltas) == 2
