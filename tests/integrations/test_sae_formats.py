"""Dictionaries of other libraries: read, written and computed as those libraries do."""

import json

import foreign_dictionaries as foreign
import pytest
import torch
from foreign_dictionaries import DICTIONARY_LEARNING, D, F, K, M, N, close
from safetensors.torch import load_file, save_file

from gemma_ext import files
from gemma_ext.integrations.crosscoder_files import load_crosscoder, save_crosscoder
from gemma_ext.integrations.dictionary_learning import (
    load_dictionary_learning,
    save_dictionary_learning,
)
from gemma_ext.integrations.gemma_scope import load_gemma_scope, save_gemma_scope
from gemma_ext.integrations.openai_sae import load_openai, save_openai
from gemma_ext.integrations.sae_files import FORMATS, load_dictionary, save_dictionary
from gemma_ext.integrations.saelens import load_saelens, save_saelens
from gemma_ext.integrations.sparsify import load_sparsify, save_sparsify
from gemma_ext.nn.sparse_autoencoder import (
    AbsTopK,
    BatchTopK,
    GroupMax,
    JumpReLU,
    ReLU,
    SparseAutoencoder,
    TopK,
)

SAELENS = (
    ("standard", {}),
    ("standard", {"apply_b_dec_to_input": False}),
    ("standard", {"normalize_activations": "layer_norm"}),
    ("jumprelu", {"normalize_activations": "constant_norm_rescale"}),
    ("jumprelu", {}),
    ("gated", {}),
    ("gated", {"apply_b_dec_to_input": False}),
    ("topk", {}),
    ("topk", {"rescale_acts_by_decoder_norm": True}),
    ("topk", {"normalize_activations": "layer_norm"}),
    ("abstopk", {}),
    ("transcoder", {}),
    ("skip_transcoder", {}),
    ("jumprelu_transcoder", {}),
    ("jumprelu_skip_transcoder", {}),
)


@pytest.fixture
def x(generator):
    return foreign.draw(generator, N, D)


def check(sae, x, latents, out):
    """Latents and reconstruction are those of dense formulas."""
    codes = sae.encode(x).dense()
    close(codes, latents)
    close(sae(x), out)


@pytest.mark.parametrize(("architecture", "config"), SAELENS)
def test_saelens(architecture, config, generator, x, tmp_path):
    config, tensors = foreign.saelens(architecture, generator, **config)
    foreign.write_saelens(tmp_path / "theirs", config, tensors)
    sae = load_saelens(tmp_path / "theirs")
    latents, out = foreign.saelens_forward(config, tensors, x)
    if config.get("rescale_acts_by_decoder_norm"):
        latents = latents / tensors["W_dec"].norm(dim=-1)  # ours are p, theirs p times the norm
    check(sae, x, latents, out)
    assert sae.metadata["hook_name"] == "blocks.1.hook_resid_post"
    save_saelens(sae, tmp_path / "ours")
    again, written = foreign.read_saelens(tmp_path / "ours")
    assert {k: again[k] for k in config} == config
    assert set(written) == set(tensors)
    for name, value in tensors.items():
        assert torch.equal(written[name], value), name


def test_saelens_batch_topk_is_saved_as_jumprelu(generator, x, tmp_path):
    config, tensors = foreign.saelens("batchtopk", generator, k=4.5)
    del config["rescale_acts_by_decoder_norm"]
    tensors["topk_threshold"] = torch.tensor(2.5, dtype=torch.float64)
    foreign.write_saelens(tmp_path / "theirs", config, tensors)
    sae = load_saelens(tmp_path / "theirs")
    assert (sae.activation, sae.score_norm) == (BatchTopK(4.5), "joint")
    p = (x - tensors["b_dec"]) @ tensors["W_enc"] + tensors["b_enc"]
    latents = p.relu() * (p * tensors["W_dec"].norm(dim=-1) > 2.5)
    assert latents.any()
    check(sae, x, latents, latents @ tensors["W_dec"] + tensors["b_dec"])
    save_saelens(sae, tmp_path / "ours", sparsity=torch.rand(F))
    again, written = foreign.read_saelens(tmp_path / "ours")
    assert again["architecture"] == "jumprelu"
    assert torch.allclose(written["W_dec"].norm(dim=-1), torch.ones(F))
    assert torch.equal(written["threshold"], torch.full((F,), 2.5))
    close(foreign.saelens_forward(again, written, x)[1], sae(x))
    assert load_file(tmp_path / "ours" / "sparsity.safetensors")["sparsity"].shape == (F,)
    assert isinstance(sae.activation, BatchTopK)  # the dictionary itself is as it was


def test_saelens_before_six(generator, x, tmp_path):
    config, tensors = foreign.saelens("topk", generator)
    old = {
        "d_in": D,
        "d_sae": F,
        "dtype": "float32",
        "hook_point": "blocks.3.hook_mlp_out",
        "model_name": "pocket",
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": K},
        "normalize_activations": False,
    }
    foreign.write_saelens(tmp_path, old, tensors)
    sae = load_saelens(tmp_path)
    check(sae, x, *foreign.saelens_forward(config, tensors, x))
    assert sae.metadata == {"hook_name": "blocks.3.hook_mlp_out", "model_name": "pocket"}


def test_saelens_log_thresholds(generator, x, tmp_path):
    config, tensors = foreign.saelens("jumprelu", generator)
    stored = dict(tensors)
    stored["log_threshold"] = stored.pop("threshold").log()
    foreign.write_saelens(tmp_path, config, stored)
    check(load_saelens(tmp_path), x, *foreign.saelens_forward(config, tensors, x))


def test_saelens_scaling_and_whitening_of_a_training_folder(generator, x, tmp_path):
    config, tensors = foreign.saelens("standard", generator)
    for apply in (True, False):
        config |= {
            "normalize_activations": "expected_average_only_in",
            "apply_b_dec_to_input": apply,
        }
        foreign.write_saelens(tmp_path, config, tensors)
        (tmp_path / "activation_scaler.json").write_text(json.dumps({"scaling_factor": 0.3}))
        sae = load_saelens(tmp_path)
        latents, out = foreign.saelens_forward(config, tensors, 0.3 * x)
        check(sae, x, latents, out / 0.3)
        save_saelens(sae, tmp_path / "folded")
        again, written = foreign.read_saelens(tmp_path / "folded")
        assert again["normalize_activations"] == "none"
        close(foreign.saelens_forward(again, written, x)[1], out / 0.3)

        matrix = foreign.draw(generator, D, D) + 3 * torch.eye(D)
        mean = foreign.draw(generator, D)
        config["normalize_activations"] = "covariance_whitening"
        foreign.write_saelens(tmp_path, config, tensors)
        inverse = torch.linalg.inv(matrix).contiguous()
        save_file(
            {"mean": mean, "matrix": matrix, "inverse_matrix": inverse},
            tmp_path / "activation_whitening.safetensors",
        )
        latents, out = foreign.saelens_forward(config, tensors, (x - mean) @ matrix)
        check(load_saelens(tmp_path), x, latents, out @ inverse + mean)


@pytest.mark.parametrize("kind", DICTIONARY_LEARNING)
def test_dictionary_learning(kind, generator, x, tmp_path):
    config, state = foreign.dictionary_learning(kind, generator)
    foreign.write_dictionary_learning(tmp_path / "theirs", config, state)
    sae = load_dictionary_learning(tmp_path / "theirs")
    check(sae, x, *foreign.dictionary_learning_forward(config, state, x))
    save_dictionary_learning(sae, tmp_path / "ours")
    again = json.loads((tmp_path / "ours" / "config.json").read_text())
    written = torch.load(tmp_path / "ours" / "ae.pt", weights_only=True)
    assert again["trainer"]["dict_class"] == kind
    assert set(written) == set(state)
    for name, value in state.items():
        assert torch.equal(written[name], value), name
        assert written[name].dtype == value.dtype, name


@pytest.mark.parametrize(
    "options",
    [{}, {"activation": "groupmax"}, {"transcode": True}, {"transcode": True, "skip": True}],
)
def test_sparsify(options, generator, x, tmp_path):
    config, state = foreign.sparsify(generator, **options)
    folder = tmp_path / "layers.3"
    foreign.write_sparsify(folder, config, state)
    sae = load_sparsify(folder)
    check(sae, x, *foreign.sparsify_forward(config, state, x))
    save_sparsify(sae, tmp_path / "ours")
    again = json.loads((tmp_path / "ours" / "cfg.json").read_text())
    config |= {"expansion_factor": 3, "normalize_decoder": not options.get("transcode", False)}
    assert again == config
    written = load_file(tmp_path / "ours" / "sae.safetensors")
    assert set(written) == set(state)
    assert all(torch.equal(written[name], value) for name, value in state.items())


@pytest.mark.parametrize(("kind", "after"), [("TopK", "ReLU"), ("TopK", "Identity"), ("ReLU", "")])
def test_openai(kind, after, generator, x, tmp_path):
    state = foreign.openai(generator, kind, after)
    torch.save(state, tmp_path / "theirs.pt")
    sae = load_openai(tmp_path / "theirs.pt")
    check(sae, x, *foreign.openai_forward(state, x))
    save_openai(sae, tmp_path / "ours.pt")
    written = torch.load(tmp_path / "ours.pt", weights_only=True)
    assert set(written) >= set(state)
    assert written["activation"] == kind
    assert written.get("activation_state_dict") == state.get("activation_state_dict")
    close(foreign.openai_forward(written, x)[1], sae(x))


def test_openai_tied(generator, x, tmp_path):
    state = foreign.openai(generator)
    tied = {k: v for k, v in state.items() if k != "decoder.weight"}
    torch.save(tied, tmp_path / "tied.pt")
    state["decoder.weight"] = state["encoder.weight"].T
    close(load_openai(tmp_path / "tied.pt")(x), foreign.openai_forward(state, x)[1])


@pytest.mark.parametrize("k", [None, K])
@pytest.mark.parametrize("norm", [1, 2, 3, 4])
@pytest.mark.parametrize("normaliser", [False, True])
def test_crosscoder(k, norm, normaliser, generator, tmp_path):
    x = foreign.draw(generator, N, M, D)
    state = foreign.crosscoder(generator, norm=norm, k=k, normaliser=normaliser)
    if norm == 4:
        state["threshold"] = torch.tensor(0.5)
        state = state if k else {n: v for n, v in state.items() if n != "threshold"}
    if normaliser and k:
        state["threshold"] = state["threshold"] / 3
    compiled = {f"_orig_mod.{name}": value for name, value in state.items()}
    torch.save(compiled, tmp_path / "model_final.pt")
    sae = load_crosscoder(tmp_path)
    latents, out = foreign.crosscoder_forward(state, x)
    assert latents.any()
    check(sae, x, latents, out)
    save_crosscoder(sae, tmp_path / "ours")
    written = load_file(tmp_path / "ours" / "model.safetensors")
    assert set(written) == set(state)
    close(foreign.crosscoder_forward(written, x)[1], out)
    check(load_dictionary(tmp_path / "ours"), x, latents, out)


def test_crosscoder_of_the_replication(generator, tmp_path):
    x = foreign.draw(generator, N, M, D)
    state = foreign.crosscoder(generator, k=None)
    theirs = {
        "W_enc": state["encoder.weight"],
        "W_dec": state["decoder.weight"].permute(1, 0, 2).contiguous(),
        "b_enc": state["encoder.bias"],
        "b_dec": state["decoder.bias"],
    }
    torch.save(theirs, tmp_path / "cc_weights.pt")
    check(load_dictionary(tmp_path), x, *foreign.crosscoder_forward(state, x))


@pytest.mark.parametrize("version", [1, 2])
def test_gemma_scope(version, generator, x, tmp_path):
    config, tensors = foreign.saelens("jumprelu", generator, apply_b_dec_to_input=False)
    folder = tmp_path / "gemma-scope-2b-pt-res" / "layer_12" / "width_16k" / "average_l0_71"
    folder.mkdir(parents=True)
    if version == 1:
        import numpy

        numpy.savez(folder / "params.npz", **{k: v.numpy() for k, v in tensors.items()})
    else:
        low = {name.lower(): value for name, value in tensors.items()}
        save_file(low, folder / "params.safetensors")
        given = {"architecture": "jump_relu", "hf_hook_point_in": "model.layers.12.output"}
        (folder / "config.json").write_text(json.dumps(given))
    sae = load_gemma_scope(folder)
    latents, out = foreign.saelens_forward(config, tensors, x)
    check(sae, x, latents, out)
    assert sae.metadata["hook_name"] == "blocks.12.hook_resid_post"
    save_gemma_scope(sae, tmp_path / "ours", version=version)
    check(load_dictionary(tmp_path / "ours"), x, latents, out)


def test_gemma_scope_of_embeddings(generator, x, tmp_path):
    config, tensors = foreign.saelens("jumprelu", generator, apply_b_dec_to_input=False)
    folder = tmp_path / "embedding" / "width_4k"
    folder.mkdir(parents=True)
    save_file({k.lower(): v for k, v in tensors.items()}, folder / "params.safetensors")
    tensors["W_enc"] = tensors["W_enc"] / D**0.5
    tensors["W_dec"] = tensors["W_dec"] * D**0.5
    check(load_gemma_scope(folder), x, *foreign.saelens_forward(config, tensors, x))


def test_gemma_scope_transcoders(generator, x, tmp_path):
    config, tensors = foreign.saelens("jumprelu_skip_transcoder", generator)
    arrays = {name.lower(): value for name, value in tensors.items() if name != "W_skip"}
    arrays["affine_skip_connection"] = tensors["W_skip"].T.contiguous()
    save_file(arrays, tmp_path / "params.safetensors")
    (tmp_path / "config.json").write_text(
        json.dumps({"architecture": "jump_relu", "hf_hook_point_out": "model.layers.3.mlp.output"})
    )
    sae = load_gemma_scope(tmp_path)
    check(sae, x, *foreign.saelens_forward(config, tensors, x))
    save_gemma_scope(sae, tmp_path / "ours", version=2)
    assert torch.equal(load_gemma_scope(tmp_path / "ours")(x), sae(x))


def test_gemma_scope_cross_layer_transcoder(generator, x, tmp_path):
    config, tensors = foreign.saelens("jumprelu_transcoder", generator)
    layers = torch.stack([foreign.draw(generator, F, 13) for _ in range(3)], 1)
    bias = foreign.draw(generator, 3, 13)
    arrays = {name.lower(): value for name, value in tensors.items()}
    save_file(arrays | {"w_dec": layers, "b_dec": bias}, tmp_path / "params.safetensors")
    sae = load_gemma_scope(tmp_path)
    latents, _ = foreign.saelens_forward(config, tensors, x)
    out = torch.einsum("nf,fld->nld", latents, layers) + bias
    check(sae, x, latents, out.flatten(1))
    assert sae.metadata["output_layers"] == 3
    save_gemma_scope(sae, tmp_path / "ours", version=2)
    assert torch.equal(load_gemma_scope(tmp_path / "ours")(x), sae(x))


@pytest.mark.parametrize("activation", [ReLU(), BatchTopK(4)])
def test_gemma_scope_takes_what_is_a_jumprelu_at_inference(activation, x, tmp_path):
    sae = SparseAutoencoder(
        D, F, activation, score_norm="joint" if isinstance(activation, BatchTopK) else None
    ).eval()
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_()
        if isinstance(activation, BatchTopK):
            sae.threshold.fill_(3.0)
    save_dictionary(sae, tmp_path, "gemma_scope")
    again = load_dictionary(tmp_path)
    assert isinstance(again.activation, JumpReLU)
    assert not again.subtract_bias
    close(again(x), sae(x))


def test_every_format_is_found_by_its_files(x, tmp_path):
    made = {
        "saelens": SparseAutoencoder(D, F, TopK(3)),
        "gemma_scope": SparseAutoencoder(D, F, JumpReLU(), subtract_bias=False),
        "gemma_scope_2": SparseAutoencoder(D, F, JumpReLU(), subtract_bias=False),
        "dictionary_learning": SparseAutoencoder(D, F, TopK(3)),
        "sparsify": SparseAutoencoder(D, F, TopK(3), unit_norm=True),
        "crosscoder": SparseAutoencoder(D, F, BatchTopK(3), subtract_bias=False),
        "openai": SparseAutoencoder(D, F, TopK(3), standardise="layer_norm"),
    }
    assert set(made) == set(FORMATS)
    for name, sae in made.items():
        path = tmp_path / (f"{name}.pt" if name == "openai" else name)
        save_dictionary(sae.eval(), path, name)
        again = load_dictionary(path)
        assert again.activation == sae.activation or name == "gemma_scope", name
        assert torch.equal(again(x), sae(x)), name


def test_a_repository_of_the_hub(monkeypatch, x, tmp_path):
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda name, allow_patterns: asked.append((name, allow_patterns)) or str(tmp_path),
    )
    sae = SparseAutoencoder(D, F, TopK(3)).eval()
    save_saelens(sae, tmp_path / "layer_3" / "small")
    assert torch.equal(load_dictionary("hf:me/saes:layer_3/small")(x), sae(x))
    save_saelens(sae, tmp_path)
    assert torch.equal(load_dictionary("hf:me/saes")(x), sae(x))
    assert asked == [("me/saes", "layer_3/small/*"), ("me/saes", None)]


REFUSED = [
    ("saelens", {"activation": GroupMax(1)}, "activation: SAELens has no GroupMax"),
    ("saelens", {"sources": 2}, "sources: expected 1"),
    ("saelens", {"activation": TopK(2, relu=False)}, "without a ReLU"),
    ("saelens", {"activation": JumpReLU(inclusive=True)}, "SAELens has no JumpReLU"),
    ("saelens", {"skip": True}, "skip: SAELens has it in transcoders only"),
    ("saelens", {"activation": TopK(2), "output_width": 4}, "no transcoder with TopK"),
    ("gemma_scope", {"activation": TopK(2)}, "expected ReLU, BatchTopK or JumpReLU, got TopK"),
    ("gemma_scope", {"sources": 2}, "sources: expected 1"),
    ("gemma_scope", {"skip": True, "output_width": 4}, "skip: only version 2"),
    ("gemma_scope", {"standardise": "layer_norm"}, "standardise: expected none or affine"),
    ("gemma_scope", {"activation": JumpReLU(inclusive=True)}, "no inclusive thresholds"),
    ("dictionary_learning", {"activation": AbsTopK(2)}, "dictionary_learning has no AbsTopK"),
    ("dictionary_learning", {"sources": 2}, "sources: expected 1"),
    ("dictionary_learning", {"score_norm": "sum"}, "score_norm: expected None"),
    ("dictionary_learning", {"standardise": "unit_norm"}, "standardise: expected none"),
    ("dictionary_learning", {"output_width": 4}, "output_width: expected None"),
    ("sparsify", {}, "activation: expected TopK or GroupMax"),
    ("sparsify", {"activation": TopK(2), "sources": 2}, "sources: expected 1"),
    ("sparsify", {"activation": TopK(2), "subtract_bias": False}, "subtract_bias: expected True"),
    ("sparsify", {"activation": TopK(2), "output_width": 4}, "output_width: expected 11"),
    ("openai", {"activation": JumpReLU()}, "activation: expected ReLU or TopK"),
    ("openai", {"activation": TopK(2)}, "standardise: expected layer_norm"),
    ("openai", {"sources": 2}, "sources: expected 1"),
    ("crosscoder", {"activation": TopK(2)}, "activation: expected ReLU or BatchTopK"),
    ("crosscoder", {}, "subtract_bias: expected False"),
    (
        "crosscoder",
        {"subtract_bias": False, "standardise": "layer_norm"},
        "standardise: expected none or affine",
    ),
    (
        "crosscoder",
        {"subtract_bias": False, "activation": BatchTopK(2.5)},
        "k: expected a whole number",
    ),
]


@pytest.mark.parametrize(("name", "options", "sentence"), REFUSED)
def test_what_a_format_has_no_word_for_is_refused(name, options, sentence, tmp_path):
    activation = options.get("activation", ReLU())
    rest = {k: v for k, v in options.items() if k != "activation"}
    sae = SparseAutoencoder(D, F, activation, **rest)
    with pytest.raises(ValueError, match=sentence):
        save_dictionary(sae, tmp_path / "x", name)
    assert list(tmp_path.rglob("*.*")) == []


def test_broken_folders_are_refused(generator, tmp_path):
    with pytest.raises(ValueError, match=r"a dictionary of saelens, .*got a folder without"):
        load_dictionary(tmp_path)
    with pytest.raises(ValueError, match=r"absent: expected .*, got no such file or folder"):
        load_dictionary(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"expected params\.npz or"):
        load_gemma_scope(tmp_path)
    with pytest.raises(ValueError, match=r"format: expected one of saelens.*got 'zip'"):
        load_dictionary(tmp_path, "zip")
    with pytest.raises(ValueError, match=r"expected a file .*cfg.json"):
        load_saelens(tmp_path)
    config, tensors = foreign.saelens("standard", generator)
    for change, sentence in (
        ({"architecture": "temporal"}, "expected a known architecture, got 'temporal'"),
        ({"normalize_activations": "whatever"}, "normalize_activations: expected one of"),
        ({"architecture": "gated"}, "expected a tensor b_gate"),
    ):
        foreign.write_saelens(tmp_path, config | change, tensors)
        with pytest.raises(ValueError, match=sentence):
            load_saelens(tmp_path)
    foreign.write_saelens(tmp_path, config, tensors | {"scaling_factor": torch.full((F,), 2.0)})
    with pytest.raises(ValueError, match="scaling factors other than 1"):
        load_saelens(tmp_path)
    foreign.write_saelens(tmp_path, config, tensors | {"b_enc": torch.zeros(F + 1)})
    with pytest.raises(ValueError, match=rf"encoder_bias: expected shape \[{F}\]"):
        load_saelens(tmp_path)
    (tmp_path / "cfg.json").write_text("[1]")
    with pytest.raises(ValueError, match="expected a JSON object, got list"):
        load_saelens(tmp_path)
    (tmp_path / "cfg.json").write_text("{")
    with pytest.raises(ValueError, match=r"cfg.json: expected JSON"):
        load_saelens(tmp_path)


def test_other_unknowns_are_refused(generator, tmp_path):
    config, state = foreign.dictionary_learning("AutoEncoder", generator)
    config["trainer"]["dict_class"] = "CrossCoder"
    foreign.write_dictionary_learning(tmp_path, config, state)
    with pytest.raises(ValueError, match=r"expected a dict_class of AutoEncoder.*got 'CrossCoder'"):
        load_dictionary_learning(tmp_path)
    config, state = foreign.sparsify(generator)
    foreign.write_sparsify(tmp_path / "s", config | {"activation": "relu"}, state)
    with pytest.raises(ValueError, match="expected the activation topk or groupmax, got 'relu'"):
        load_sparsify(tmp_path / "s")
    torch.save(foreign.openai(generator, after="Tanh"), tmp_path / "o.pt")
    with pytest.raises(ValueError, match="expected postact_fn ReLU or Identity, got 'Tanh'"):
        load_openai(tmp_path / "o.pt")
    torch.save(foreign.openai(generator) | {"activation": "GELU"}, tmp_path / "o.pt")
    with pytest.raises(ValueError, match="expected the activation ReLU or TopK, got 'GELU'"):
        load_openai(tmp_path / "o.pt")
    torch.save(
        foreign.crosscoder(generator, norm=1) | {"code_normalization_id": torch.tensor(5)},
        tmp_path / "c.pt",
    )
    with pytest.raises(ValueError, match="code normalisation 5"):
        load_crosscoder(tmp_path / "c.pt")
    arrays = {n.lower(): v for n, v in foreign.saelens("jumprelu", generator)[1].items()}
    save_file(arrays, tmp_path / "params.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "topk"}))
    with pytest.raises(ValueError, match="expected the architecture jump_relu, got 'topk'"):
        load_gemma_scope(tmp_path)
    with pytest.raises(ValueError, match="version: expected 1 or 2, got 3"):
        save_gemma_scope(SparseAutoencoder(D, F, ReLU()), tmp_path, version=3)


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    torch.save({"pre_bias": pytest.approx(1)}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="expected tensors and plain values only"):
        load_dictionary(tmp_path / "x.pt")


def test_a_failed_write_leaves_nothing(tmp_path):
    (tmp_path / "cfg.json").write_text("before")

    def fail():
        with files.replacing(tmp_path / "cfg.json") as beside:
            beside.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert [p.name for p in tmp_path.iterdir()] == ["cfg.json"]
    assert (tmp_path / "cfg.json").read_text() == "before"


def test_half_precision_weights_keep_their_dtype(generator, x, tmp_path):
    config, tensors = foreign.saelens("jumprelu", generator, dtype="bfloat16")
    narrow = {name: value.bfloat16() for name, value in tensors.items()}
    foreign.write_saelens(tmp_path, config, narrow)
    sae = load_saelens(tmp_path)
    assert sae.encoder.dtype == torch.bfloat16
    assert sae.threshold.dtype == torch.float32
    expected = foreign.saelens_forward(config, {k: v.float() for k, v in narrow.items()}, x)[1]
    compare_loosely(sae(x.bfloat16()).float(), expected)
    save_saelens(sae, tmp_path / "ours")
    assert torch.equal(foreign.read_saelens(tmp_path / "ours")[1]["W_enc"], narrow["W_enc"])


def compare_loosely(found, expected):
    """Thresholds flip near ties in bfloat16, so single tokens may differ."""
    near = (found - expected).norm(dim=-1) < 0.05 * expected.norm(dim=-1)
    assert near.float().mean() > 0.7
