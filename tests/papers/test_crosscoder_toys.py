"""Crosscoders by hand: selection by norms, files, and the toys where L1 misleads."""

import pytest
import torch

from gemma_ext.integrations.crosscoder_files import load_crosscoder, save_crosscoder
from gemma_ext.nn.sparse_autoencoder import (
    BatchTopK,
    Objective,
    ReLU,
    SparseAutoencoder,
    fold_norms,
)
from gemma_ext.papers.crosscoder.planted import shrunk


def made_by_hand(activation, features=12, width=5, sources=2, **options):
    made = SparseAutoencoder(
        width, features, activation, sources=sources, subtract_bias=False, **options
    )
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn(p.shape))
    return made


def test_one_product_is_the_sum_over_models():
    made = made_by_hand(BatchTopK(2.0), score_norm="sum")
    x = torch.randn(30, 2, 5)
    each = made.encoder.view(12, 2, 5)
    p = torch.einsum("nmd,fmd->nf", x, each) + made.encoder_bias
    w = made.decoder.view(12, 2, 5).norm(dim=-1).sum(1)
    score = (p * w).clamp(min=0)
    kept = score >= score.flatten().topk(60).values[-1]
    codes = made.train().encode(x)
    torch.testing.assert_close(codes.dense(), p * kept, rtol=1e-4, atol=1e-4)


def test_latents_compete_by_norms_and_are_decoded_without_them():
    made = made_by_hand(BatchTopK(1.0), features=2, width=2, score_norm="sum")
    with torch.no_grad():
        made.encoder.zero_()
        made.encoder_bias.copy_(torch.tensor([1.0, 2.0]))
        made.decoder.copy_(torch.tensor([[3.0, 0, 0, 0], [0, 1.0, 0, 0]]))
        made.decoder_bias.zero_()
    x = torch.zeros(1, 2, 2)
    codes = made.train().encode(x)  # by p the second, by p w the first
    assert codes.indices.tolist() == [0]
    assert codes.values.tolist() == [1.0]
    torch.testing.assert_close(made(x), torch.tensor([[[3.0, 0], [0, 0]]]))


def test_one_model_is_a_sparse_autoencoder_by_norms():
    made = made_by_hand(BatchTopK(2.0), sources=1, score_norm="sum")
    x = torch.randn(40, 5)
    before = made.train().encode(x)
    rebuilt = made(x)
    fold_norms(made)
    after = made.encode(x)
    assert before.indices.tolist() == after.indices.tolist()
    torch.testing.assert_close(rebuilt, made(x))


def test_folding_norms_leaves_the_sets_of_the_threshold():
    made = made_by_hand(BatchTopK(2.0), score_norm="sum").eval()
    made.threshold.fill_(1.5)
    x = torch.randn(64, 2, 5)
    before, rebuilt = made.encode(x), made(x)
    fold_norms(made)
    after = made.encode(x)
    assert before.indices.tolist() == after.indices.tolist()
    assert before.offsets.tolist() == after.offsets.tolist()
    torch.testing.assert_close(rebuilt, made(x), rtol=1e-4, atol=1e-4)


def test_a_file_has_the_sets_of_the_crosscoder(tmp_path):
    made = made_by_hand(BatchTopK(2), score_norm="sum", standardise="affine").eval()
    made.threshold.fill_(1.5)
    made.input_factor.copy_(torch.tensor([0.5, 2.0]))
    save_crosscoder(made, tmp_path)
    again = load_crosscoder(tmp_path).eval()
    x = torch.randn(64, 2, 5)
    before, after = made.encode(x), again.encode(x)
    assert before.indices.tolist() == after.indices.tolist()
    torch.testing.assert_close(before.values, after.values)
    for one in (made, again):
        fold_norms(one)
    folded = again.encode(x)
    assert folded.indices.tolist() == before.indices.tolist()
    torch.testing.assert_close(made(x), again(x))


@pytest.mark.parametrize(("strength", "f", "mu"), [(0.3, 1.0, 0.1), (0.3, 1.0, 0.5), (0.8, 2, 0.4)])
def test_a_penalty_shrinks_a_weak_decoder_away(strength, f, mu):
    s = torch.tensor(strength, dtype=torch.float64, requires_grad=True)
    for _ in range(2000):
        loss = 0.5 * f**2 * (strength - s) ** 2 + mu * f * s.abs()
        (grad,) = torch.autograd.grad(loss, s)
        with torch.no_grad():
            s.sub_(0.01 * grad).clamp_(min=0)
    assert s.item() == pytest.approx(shrunk(strength, f, mu), abs=1e-6)


def decoupled(decoders):
    """A dictionary that reads latent j from base + chat entry j, by hand."""
    features = len(decoders)
    made = made_by_hand(BatchTopK(1.0), features=features, width=4, score_norm="sum")
    with torch.no_grad():
        made.encoder.zero_()
        made.encoder[:, 0] = 1.0
        made.encoder_bias.zero_()
        made.decoder_bias.zero_()
        made.decoder.copy_(torch.tensor(decoders))
    return made


def test_l1_is_indifferent_to_a_decoupled_concept_and_batchtopk_is_not():
    u, zero = [1.0, 0, 0, 0], [0.0] * 4
    together, apart = decoupled([u + u, zero + zero]), decoupled([u + zero, zero + u])
    x = (1 + torch.rand(50, 1, 1)) * torch.tensor(u).expand(1, 2, 4)
    l1 = Objective("squared", l1=0.3)
    with torch.no_grad():
        for made in (together, apart):
            made.activation = BatchTopK(2.0)  # both latents may fire
        # float32 sums of 50 tokens in another order
        assert float(l1(together, x).total) == pytest.approx(float(l1(apart, x).total), rel=1e-5)
        for made in (together, apart):
            made.activation = BatchTopK(1.0)
        scarce = Objective("squared")
        assert float(scarce(together, x).total) < 1e-9
        # half the tokens are lost in both models, each with a square of 1 at least
        assert float(scarce(apart, x).total) > 0.49


def test_gradient_of_the_penalty_at_a_vanished_decoder_is_zero():
    made = made_by_hand(ReLU())
    with torch.no_grad():
        made.decoder[:, :5] = 0
        made.encoder_bias.fill_(5)
    x = torch.randn(8, 2, 5)
    f = made.encode(x).dense()
    loss = Objective("squared", l1=0.7)(made, x)
    plain = Objective("squared")(made, x)
    with_l1, without = (
        torch.autograd.grad(one.total, made.decoder, retain_graph=True)[0] for one in (loss, plain)
    )
    got = (with_l1 - without).view(12, 2, 5)
    d = made.decoder.detach().view(12, 2, 5)[:, 1]
    expected = 0.7 * f.mean(0)[:, None] * d / d.norm(dim=1, keepdim=True)
    torch.testing.assert_close(got[:, 0], torch.zeros(12, 5), rtol=0, atol=1e-5)
    torch.testing.assert_close(got[:, 1], expected.detach(), rtol=1e-4, atol=1e-4)
