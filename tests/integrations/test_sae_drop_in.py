"""Objects and kernels that stand in for those of SAELens and sparsify."""

import types

import foreign_dictionaries as foreign
import pytest
import torch
from foreign_dictionaries import D, F, K
from torch.nn import functional

from gemma_ext.integrations import sparsify
from gemma_ext.integrations.saelens_object import SAELensDictionary
from gemma_ext.nn.sparse_autoencoder import BatchTopK, SparseAutoencoder

VARIANTS = [
    ("standard", {}),
    ("topk", {"rescale_acts_by_decoder_norm": True}),
    ("jumprelu", {"normalize_activations": "layer_norm"}),
    ("gated", {}),
    ("jumprelu_skip_transcoder", {}),
]


def near(found, wanted):
    """Within the rounding of float32 sums, which counts in units of the largest entry."""
    largest = float(wanted.detach().abs().max())
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * max(largest, 1.0))


@pytest.mark.parametrize(("architecture", "config"), VARIANTS)
def test_object_computes_as_the_library(architecture, config, generator, tmp_path):
    config, tensors = foreign.saelens(architecture, generator, **config)
    foreign.write_saelens(tmp_path, config, tensors)
    x = foreign.draw(generator, 3, 7, D)
    sae = SAELensDictionary.load_from_disk(tmp_path)
    latents, out = foreign.saelens_forward(config, tensors, x)
    torch.testing.assert_close(sae.encode(x), latents, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sae.encode_sparse(x).dense(), latents, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sae(x), out, rtol=1e-4, atol=1e-3)
    if "skip" not in architecture:  # as in the library, decode alone knows no input
        torch.testing.assert_close(sae.decode(sae.encode(x)), out, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(sae.decode(sae.encode_sparse(x)), out, rtol=1e-4, atol=1e-3)
    assert sae.cfg.architecture() == architecture
    assert (sae.cfg.d_in, sae.cfg.d_sae, sae.cfg.dtype) == (D, F, "float32")
    assert sae.cfg.metadata.hook_name == "blocks.1.hook_resid_post"
    assert sae.cfg.metadata.nothing_of_the_kind is None
    assert {k: sae.cfg.to_dict()[k] for k in config} == config
    assert torch.equal(sae.W_enc, tensors["W_enc"])
    assert torch.equal(sae.W_dec, tensors["W_dec"])
    assert torch.equal(sae.b_dec, tensors["b_dec"])
    assert sae.b_enc.shape == (F,)
    assert (sae.dtype, sae.device.type) == (torch.float32, "cpu")
    if "threshold" in tensors:
        assert torch.equal(sae.threshold, tensors["threshold"])


def test_object_hooks_error_term_and_heads(generator, tmp_path):
    config, tensors = foreign.saelens("topk", generator)
    foreign.write_saelens(tmp_path, config, tensors)
    sae = SAELensDictionary.load_from_disk(tmp_path, dtype="float32")
    x = foreign.draw(generator, 5, D)
    heard = []
    handle = sae.hook_sae_acts_post.register_forward_hook(lambda m, a, out: heard.append(out))
    with_hook = sae(x)
    handle.remove()
    near(with_hook, sae(x))
    assert heard[0].shape == (5, F)
    handle = sae.hook_sae_acts_post.register_forward_hook(lambda m, a, out: out * 0)
    torch.testing.assert_close(sae(x), sae.b_dec.expand(5, D))
    handle.remove()
    sae.use_error_term = True
    near(sae(x), x)
    sae.use_error_term = False
    heads = foreign.draw(generator, 5, 1, D)
    assert sae(heads[:, 0]).shape == (5, D)
    config, tensors = foreign.saelens("topk", generator)
    wide = {
        name: value.repeat(*[2 if size == D else 1 for size in value.shape])
        for name, value in tensors.items()
    }
    foreign.write_saelens(tmp_path / "z", config | {"d_in": 2 * D}, wide)
    z = SAELensDictionary.load_from_disk(tmp_path / "z")
    heads = foreign.draw(generator, 5, 2, D)
    assert z(heads).shape == (5, 2, D)
    near(z(heads).flatten(1), z(heads.flatten(1)))
    assert set(sae.hook_dict) >= {"hook_sae_acts_post", "hook_sae_error"}


def test_object_folds_and_saves(generator, tmp_path):
    config, tensors = foreign.saelens("topk", generator, rescale_acts_by_decoder_norm=True)
    foreign.write_saelens(tmp_path, config, tensors)
    sae = SAELensDictionary.load_from_disk(tmp_path)
    x = foreign.draw(generator, 5, D)
    latents, out = sae.encode(x), sae(x)
    sae.fold_W_dec_norm()
    assert not sae.cfg.rescale_acts_by_decoder_norm
    near(sae.encode(x), latents)
    near(sae(x), out)
    weights, written = sae.save_model(tmp_path / "ours")
    assert weights.exists()
    assert written.exists()


def test_object_shows_batch_topk_as_saelens_would_save_it(generator, tmp_path):
    sae = SparseAutoencoder(D, F, BatchTopK(K), score_norm="joint").eval()
    with torch.no_grad():
        sae.decoder *= torch.rand(F, 1) + 0.5
        sae.threshold.fill_(0.4)
    shown = SAELensDictionary(sae)
    x = foreign.draw(generator, 9, D)
    shown.save_model(tmp_path)
    config, tensors = foreign.read_saelens(tmp_path)
    assert shown.cfg.architecture() == "jumprelu"
    latents, out = foreign.saelens_forward(config, tensors, x)
    near(shown.encode(x), latents)
    near(shown(x), out)
    near(shown.decode(latents), out)


@pytest.mark.parametrize("activation", ["topk", "groupmax"])
def test_fused_encoder_of_sparsify(activation, generator):
    x = foreign.draw(generator, 13, D).requires_grad_()
    weight = foreign.draw(generator, 40, D).requires_grad_()
    bias = foreign.draw(generator, 40).requires_grad_()
    found = sparsify.fused_encoder(x, weight, bias, K, activation)
    p = functional.linear(x, weight, bias).relu()
    if activation == "topk":
        best = p.topk(K, dim=-1)
        near(found.top_acts, best.values)
    else:
        best = p.unflatten(-1, (K, -1)).max(-1)
        near(found.top_acts, best.values)
    near(p.gather(-1, found.top_indices), found.top_acts)
    assert found.top_indices.dtype == torch.int64
    g = torch.randn_like(found.top_acts)
    parts = (x, weight, bias)
    expected = torch.autograd.grad((p.gather(-1, found.top_indices) * g).sum(), parts)
    for ours, theirs in zip(
        torch.autograd.grad((found.top_acts * g).sum(), parts), expected, strict=True
    ):
        near(ours, theirs)


def test_pre_activations_exist_when_asked_and_have_a_gradient(generator):
    x = foreign.draw(generator, 13, D)
    weight = foreign.draw(generator, 40, D).requires_grad_()
    bias = foreign.draw(generator, 40)
    pre = sparsify.fused_encoder(x, weight, bias, K, "topk").pre_acts
    assert pre._dense is None
    dead = torch.rand(40) < 0.5
    lifted = torch.where(dead[None], pre, -torch.inf)
    dense = functional.linear(x, weight, bias).relu()
    torch.testing.assert_close(lifted, torch.where(dead[None], dense, -torch.inf))
    values, _ = pre.topk(2 * K, sorted=False)
    assert values.shape == (13, 2 * K)
    assert pre.shape == (13, 40)
    (gradient,) = torch.autograd.grad(lifted[:, dead].sum(), weight)
    (expected,) = torch.autograd.grad(dense[:, dead].sum(), weight)
    near(gradient, expected)
    with pytest.raises(AttributeError):
        _ = pre._nothing


def test_decoder_of_sparsify(generator):
    weight = foreign.draw(generator, 40, D).requires_grad_()
    acts = foreign.draw(generator, 3, 5, K).requires_grad_()
    indices = torch.randint(40, (3, 5, K))
    out = sparsify.decoder_impl(indices, acts, weight.mT)
    expected = (acts[..., None] * weight[indices]).sum(-2)
    near(out, expected)
    g = torch.randn_like(out)
    for ours, theirs in zip(
        torch.autograd.grad(out, (acts, weight), g),
        torch.autograd.grad(expected, (acts, weight), g),
        strict=True,
    ):
        near(ours, theirs)


def test_sparsify_gets_its_own_back(monkeypatch):
    import sys

    with pytest.raises(ImportError, match="pip install eai-sparsify"), sparsify.fast_sparsify():
        pass
    coder = types.SimpleNamespace(fused_encoder=1, decoder_impl=2)
    monkeypatch.setitem(sys.modules, "sparsify", types.SimpleNamespace(sparse_coder=coder))
    seen = []

    def fail():
        with sparsify.fast_sparsify():
            seen.extend((coder.fused_encoder, coder.decoder_impl))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert seen == [sparsify.fused_encoder, sparsify.decoder_impl]
    assert (coder.fused_encoder, coder.decoder_impl) == (1, 2)
    with pytest.raises(ValueError, match="activation: expected topk or groupmax, got 'relu'"):
        sparsify.fused_encoder(torch.zeros(1, D), torch.zeros(4, D), torch.zeros(4), 1, "relu")
