"""Round trips through sae-lens, dictionary-learning and sparsify themselves, where installed."""

import json

import foreign_dictionaries as foreign
import pytest
import torch
from foreign_dictionaries import DICTIONARY_LEARNING, D, N, close

from gemma_ext.integrations import sparsify
from gemma_ext.integrations.dictionary_learning import (
    load_dictionary_learning,
    save_dictionary_learning,
)
from gemma_ext.integrations.saelens import load_saelens, save_saelens
from gemma_ext.integrations.saelens_object import SAELensDictionary

SAELENS = (
    ("standard", {}),
    ("standard", {"normalize_activations": "layer_norm"}),
    ("standard", {"normalize_activations": "constant_norm_rescale"}),
    ("jumprelu", {"apply_b_dec_to_input": False}),
    ("gated", {}),
    ("topk", {}),
    ("topk", {"rescale_acts_by_decoder_norm": True}),
    ("transcoder", {}),
    ("skip_transcoder", {}),
    ("jumprelu_transcoder", {}),
)


@pytest.fixture
def x(generator):
    return foreign.draw(generator, N, D)


@pytest.mark.parametrize(("architecture", "config"), SAELENS, ids=str)
def test_saelens(architecture, config, generator, x, tmp_path):
    sae_lens = pytest.importorskip("sae_lens")
    config, tensors = foreign.saelens(architecture, generator, **config)
    foreign.write_saelens(tmp_path / "theirs", config, tensors)
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "theirs")
    ours = load_saelens(tmp_path / "theirs")
    close(ours(x), theirs(x))
    shown = SAELensDictionary(ours)
    close(shown.encode(x), theirs.encode(x))
    assert set(theirs.hook_dict) <= set(shown.hook_dict)
    assert shown.cfg.to_dict().keys() == theirs.cfg.to_dict().keys()
    save_saelens(ours, tmp_path / "ours")
    close(sae_lens.SAE.load_from_disk(tmp_path / "ours")(x), theirs(x))
    theirs.save_model(tmp_path / "again")
    close(load_saelens(tmp_path / "again")(x), theirs(x))


@pytest.mark.parametrize("name", ["BatchTopK", "MatryoshkaBatchTopK", "TopK", "JumpReLU"])
def test_dictionaries_in_training_at_saelens(name, x, tmp_path):
    sae_lens = pytest.importorskip("sae_lens")
    options = {"k": 5} if "TopK" in name else {}
    if name.startswith("Matryoshka"):
        options["matryoshka_widths"] = [16, 37]
    config = getattr(sae_lens, f"{name}TrainingSAEConfig")(d_in=D, d_sae=37, **options)
    theirs = getattr(sae_lens, f"{name}TrainingSAE")(config)
    with torch.no_grad():
        theirs.W_dec *= torch.rand(37, 1) + 0.5
        if name.endswith("BatchTopK"):
            theirs.topk_threshold.fill_(0.03)
    theirs.save_inference_model(tmp_path / "inference")
    inference = sae_lens.SAE.load_from_disk(tmp_path / "inference")
    close(load_saelens(tmp_path / "inference")(x), inference(x))
    theirs.save_model(tmp_path / "training")
    ours = load_saelens(tmp_path / "training")
    close(ours(x), inference(x))
    save_saelens(ours, tmp_path / "ours")
    close(sae_lens.SAE.load_from_disk(tmp_path / "ours")(x), inference(x))


@pytest.mark.parametrize("kind", DICTIONARY_LEARNING)
def test_dictionary_learning(kind, generator, x, tmp_path):
    utils = pytest.importorskip("dictionary_learning.utils")
    config, state = foreign.dictionary_learning(kind, generator)
    foreign.write_dictionary_learning(tmp_path / "theirs", config, state)
    theirs, _ = utils.load_dictionary(str(tmp_path / "theirs"), "cpu")
    ours = load_dictionary_learning(tmp_path / "theirs")
    close(ours(x), theirs(x))
    save_dictionary_learning(ours, tmp_path / "ours")
    again, _ = utils.load_dictionary(str(tmp_path / "ours"), "cpu")
    close(again(x), theirs(x))


def coder_of_sparsify(**options):
    pytest.importorskip("sparsify")
    from sparsify.config import SparseCoderConfig
    from sparsify.sparse_coder import SparseCoder

    coder = SparseCoder(D, SparseCoderConfig(num_latents=40, k=5, **options))
    with torch.no_grad():
        for parameter in coder.parameters():
            parameter.normal_()
    return coder


@pytest.mark.parametrize(
    "options",
    [{}, {"activation": "groupmax"}, {"transcode": True, "skip_connection": True}],
    ids=str,
)
def test_sparsify(options, x, tmp_path):
    theirs = coder_of_sparsify(**options)
    theirs.save_to_disk(tmp_path / "layers.1")
    ours = sparsify.load_sparsify(tmp_path / "layers.1")
    close(ours(x), theirs(x).sae_out)
    sparsify.save_sparsify(ours, tmp_path / "ours")
    again = type(theirs).load_from_disk(tmp_path / "ours")
    close(again(x).sae_out, theirs(x).sae_out)
    written = json.loads((tmp_path / "ours" / "cfg.json").read_text())
    assert written.keys() == json.loads((tmp_path / "layers.1" / "cfg.json").read_text()).keys()


@pytest.mark.parametrize("dead", [False, True])
def test_sparsify_with_our_kernels(dead, x):
    coder = coder_of_sparsify(multi_topk=True)
    mask = torch.rand(40) < 0.4 if dead else None
    plain = coder(x, dead_mask=mask)
    plain.fvu.backward()
    expected = {name: p.grad.clone() for name, p in coder.named_parameters()}
    coder.zero_grad()
    with sparsify.fast_sparsify():
        fast = coder(x, dead_mask=mask)
        fast.fvu.backward()
    for name in ("sae_out", "fvu", "auxk_loss", "multi_topk_fvu"):
        close(getattr(fast, name), getattr(plain, name))
    for name, parameter in coder.named_parameters():
        close(parameter.grad, expected[name])
    if dead:
        coder.zero_grad()
        with sparsify.fast_sparsify():
            coder(x, dead_mask=mask).auxk_loss.backward()
        assert coder.encoder.weight.grad[mask].any()  # its own kernel has none here
