"""Evaluations with known answers, and contexts against a search over everything."""

import pytest
import torch
from tiny_gemma2 import D, V, tiny_model, tiny_rows

from gemma_ext.integrations.transformers import patch
from gemma_ext.nn.sparse_autoencoder import JumpReLU, ReLU, SparseAutoencoder, TopK
from gemma_ext.sae import Activations, capture, evaluate, find_site, inspect_latents
from gemma_ext.sae.evaluation import cut_cross_entropy


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def mirror(scale=1.0):
    """x̂ = scale x: one latent for each sign of every coordinate."""
    sae = SparseAutoencoder(D, 2 * D, ReLU(), subtract_bias=False)
    both = torch.cat([torch.eye(D), -torch.eye(D)])
    with torch.no_grad():
        sae.encoder.copy_(both)
        sae.decoder.copy_(scale * both)
    return sae


def activations(model, rows, skip=1):
    (x,) = capture(model, rows.long(), [find_site(model, "1")])
    return x[:, skip:].flatten(0, 1)


def test_a_perfect_dictionary(model):
    rows = tiny_rows(10)
    found = evaluate(mirror(), model, "1", rows, rows=3)
    x = activations(model, rows)
    assert found.tokens == 10 * 15
    assert found.fvu < 1e-10
    assert found.cosine == pytest.approx(1)
    assert found.norm_ratio == pytest.approx(1)
    assert found.bias == pytest.approx(1)
    assert found.ce_sae == pytest.approx(found.ce, abs=1e-5)
    assert found.ce_recovered == pytest.approx(1, abs=1e-3)
    assert found.l0 == pytest.approx(float((x != 0).sum(-1).double().mean()))
    assert found.l1 == pytest.approx(float(x.abs().sum(-1).mean()), rel=1e-4)
    assert found.ce == pytest.approx(model(rows.long(), labels=rows.long()).loss.item(), rel=1e-4)


def test_a_dictionary_that_shrinks(model):
    rows = tiny_rows(10)
    found = evaluate(mirror(0.5), model, "1", rows)
    x = activations(model, rows).double()
    spread = (x - x.mean(0)).square().sum()
    assert found.fvu == pytest.approx(float(0.25 * x.square().sum() / spread), rel=1e-5)
    assert found.bias == pytest.approx(0.5)
    assert found.norm_ratio == pytest.approx(0.5)
    assert found.cosine == pytest.approx(1)


def test_a_dictionary_of_nothing_is_a_zero(model):
    sae = SparseAutoencoder(D, 4, JumpReLU())
    with torch.no_grad():
        sae.threshold.fill_(1e9)
    found = evaluate(sae, model, "1", tiny_rows(10))
    assert found.ce_sae == pytest.approx(found.ce_zero)
    assert found.ce_recovered == pytest.approx(0)
    assert (found.dead, found.l0) == (1.0, 0.0)
    assert found.density.tolist() == [0.0] * 4
    assert set(found.numbers()) == set(vars(found)) - {"density"}


def test_variance_is_exact_under_a_large_mean(model):
    sae = mirror()
    rows = tiny_rows(12)
    from gemma_ext.sae.evaluation import _Sums

    sums = _Sums(sae, 0)
    x = torch.randn(90, D) + 1000.0
    for part in x.split(7):
        sums.add(part)
    expected = float((x.double() - x.double().mean(0)).square().sum())
    assert sums.spread == pytest.approx(expected, rel=1e-9)
    assert len(rows) == 12


def test_skipped_positions_are_left_as_they_are(model):
    """A zero everywhere but at <bos> is not a zero everywhere."""
    rows = tiny_rows(6)
    kept, all_of_it = (evaluate(mirror(), model, "1", rows, skip=s).ce_zero for s in (1, 0))
    assert kept != all_of_it


def test_model_is_as_before(model):
    sae = mirror().train()
    model.train()
    evaluate(sae, model, "1", tiny_rows(4))
    assert model.training
    assert sae.training
    model.eval()
    assert "forward" not in vars(model)
    with cut_cross_entropy(model):
        assert model(tiny_rows(2).long(), labels=tiny_rows(2).long()).logits is None
    assert model(tiny_rows(2).long(), labels=tiny_rows(2).long()).logits is not None
    patched = patch(tiny_model(), train_only=False)
    with cut_cross_entropy(patched):
        pass
    assert hasattr(patched, "_gemma_ext_patch")


def test_each_source_of_a_crosscoder(model):
    """The first source is rebuilt whole, the second by half."""
    models = [model, tiny_model(seed=1)]
    sae = SparseAutoencoder(D, 4 * D, ReLU(), sources=2, subtract_bias=False)
    both = torch.cat([torch.eye(2 * D), -torch.eye(2 * D)])
    with torch.no_grad():
        sae.encoder.copy_(both)
        sae.decoder.copy_(both * torch.tensor([1.0, 0.5]).repeat_interleave(D))
    rows = tiny_rows(6)
    first, second = (evaluate(sae, models, "1", rows, source=s) for s in (0, 1))
    assert (first.norm_ratio, second.norm_ratio) == (pytest.approx(1), pytest.approx(0.5))
    assert first.ce_sae == pytest.approx(first.ce, abs=1e-5)
    alone = evaluate(mirror(0.5), models[1], "1", rows)
    for name in ("fvu", "ce", "ce_sae", "ce_zero"):
        assert getattr(second, name) == pytest.approx(getattr(alone, name), rel=1e-5), name


def test_what_cannot_be_evaluated_is_refused(model):
    rows, pair = tiny_rows(2), SparseAutoencoder(D, 4, ReLU(), sources=2)
    with pytest.raises(ValueError, match="got a transcoder"):
        evaluate(SparseAutoencoder(D, 4, ReLU(), output_width=5), model, "1", rows)
    with pytest.raises(ValueError, match="model: expected one for each of 2 sources, got 1"):
        evaluate(pair, model, "1", rows)
    with pytest.raises(ValueError, match="source: expected one below 2, got 2"):
        evaluate(pair, [model, model], "1", rows, source=2)


def looked_at(model, sae, rows, **options):
    stream = Activations([model], ["1"], rows, batch=1, buffer=1, rows=3)
    return stream, *inspect_latents(sae, stream, **options)


def test_contexts_are_the_strongest_of_each_row(model):
    sae = SparseAutoencoder(D, 30, TopK(6))
    rows = tiny_rows(23)
    numbers = [0, 7, 29]
    stream, latents, densities = looked_at(model, sae, rows, latents=numbers, contexts=4, window=3)
    dense = sae.encode(activations(model, rows)).dense().view(23, 15, 30)
    torch.testing.assert_close(densities, (dense != 0).double().mean((0, 1)))
    for latent in latents:
        values = dense[:, :, latent.number]
        best = values.max(1).values.sort(descending=True)
        expected = [int(i) for v, i in zip(*best, strict=True) if v > 0][:4]
        assert [c.row for c in latent.contexts] == expected
        assert latent.density == pytest.approx(float(densities[latent.number]))
        for context in latent.contexts:
            at = int(values[context.row].argmax()) + 1
            start = max(0, at - 3)
            assert context.ids == rows[context.row, start : at + 4].tolist()
            assert context.ids[context.peak] == rows[context.row, at]
            line = torch.cat([torch.zeros(1), values[context.row]])[start : at + 4]
            torch.testing.assert_close(torch.tensor(context.values), line.detach())
    assert stream.sources == 1


def test_tokens_that_a_latent_writes_for(model):
    sae = SparseAutoencoder(D, 30, TopK(6))
    with torch.no_grad():
        model.model.norm.weight.normal_()
    _, (latent,), _ = looked_at(model, sae, tiny_rows(5), latents=[3])
    logits = model.lm_head.weight @ ((1 + model.model.norm.weight) * sae.decoder[3])
    with torch.no_grad():
        model.model.norm.weight.zero_()
    order = logits.argsort(descending=True)
    assert [i for i, _ in latent.promoted] == order[:8].tolist()
    assert [i for i, _ in latent.suppressed] == order.flip(0)[:8].tolist()
    assert latent.promoted[0][1] == pytest.approx(float(logits.max()), rel=1e-5)
    assert latent.suppressed[0][1] == pytest.approx(float(logits.min()), rel=1e-5)
    assert all(0 <= i < V for i, _ in latent.promoted)


def test_latents_are_spread_from_dense_to_rare(model):
    sae = SparseAutoencoder(D, 30, TopK(6))
    _, latents, densities = looked_at(model, sae, tiny_rows(20), count=5)
    found = [latent.density for latent in latents]
    assert found == sorted(found, reverse=True)
    assert found[0] == densities.max()
    assert found[-1] == densities[densities > 0].min()
    _, every, _ = looked_at(model, sae, tiny_rows(20), count=1000)
    assert len(every) == int((densities > 0).sum())
    with pytest.raises(ValueError, match="latents: expected numbers below 30, got 30"):
        looked_at(model, sae, tiny_rows(2), latents=[30])


def test_a_latent_that_never_fires_has_no_contexts(model):
    sae = SparseAutoencoder(D, 30, JumpReLU())
    with torch.no_grad():
        sae.threshold[5] = 1e9
    _, (latent,), _ = looked_at(model, sae, tiny_rows(4), latents=[5])
    assert (latent.contexts, latent.density) == ([], 0.0)
