"""Training: selection by norms, losses, toys where L1 misleads, planted worlds, the null diff."""

import dataclasses
import math
import sys

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
from gemma_ext.papers import crosscoder
from gemma_ext.papers.crosscoder import study
from gemma_ext.papers.crosscoder.discovery import discover
from gemma_ext.papers.crosscoder.planted import matched, shrunk, two_models

SMALL = crosscoder.Recipe(
    "batchtopk", 40, k=2, steps=800, batch=1024, rate=3e-3, warmup=50, dead_after=50_000
)
L1 = dataclasses.replace(SMALL, kind="l1", mu=1.0, error="squared")


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
    x = torch.rand(50, 1, 1) * torch.tensor(u).expand(1, 2, 4) + 0.0
    l1 = Objective("squared", l1=0.3)
    with torch.no_grad():
        for made in (together, apart):
            made.activation = BatchTopK(2.0)  # both latents may fire
        assert float(l1(together, x).total) == pytest.approx(float(l1(apart, x).total), abs=1e-7)
        for made in (together, apart):
            made.activation = BatchTopK(1.0)
        scarce = Objective("squared")
        assert float(scarce(together, x).total) < 1e-9
        assert float(scarce(apart, x).total) > 0.05


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


def test_k_is_annealed_only_where_asked_for():
    assert crosscoder.Recipe("batchtopk", 4, k=3).k_at(0) == 3
    plan = crosscoder.Recipe("batchtopk", 4, k=100, k_start=1000, annealing=10)
    assert [plan.k_at(step) for step in (0, 5, 10, 11)] == [1000, 550, 100, 100]


@pytest.fixture(scope="module")
def world():
    generator = torch.Generator().manual_seed(0)
    made = two_models(32, 16, 4, 0.08, generator)
    return made, made.draw(40_000, generator)[0], made.draw(20_000, generator)[0]


@pytest.fixture(scope="module")
def trained(world):
    ticks = []
    done = crosscoder.train(world[1], SMALL, advance=ticks.append)
    assert sum(ticks) == 800
    return done


def raw_decoder(made):
    return made.decoder.detach().view(made.features, 2, -1) / made.input_factor[:, None]


@pytest.mark.slow
def test_a_planted_world_is_found_and_binned(world, trained):
    planted, _, held_out = world
    made = trained.crosscoder
    assert (matched(raw_decoder(made), planted) >= 0).sum() == 24
    found = discover(made, held_out.split(4096))
    names = [crosscoder.TAGS[n] for n in study.binned(planted, raw_decoder(made), found)]
    assert names == ["shared"] * 16 + ["base only"] * 4 + ["chat only"] * 4
    assert found.explained.min() > 0.9
    place = matched(raw_decoder(made), planted)
    assert found.betas.specific()[place[20:]].all()
    torch.testing.assert_close(
        found.betas.nu_error[place[:16]], torch.ones(16).double(), rtol=0, atol=0.05
    )


@pytest.mark.slow
def test_the_threshold_keeps_as_many_as_training(world, trained):
    found = discover(trained.crosscoder, world[2].split(4096))
    assert found.active == pytest.approx(2, rel=0.02)
    assert trained.active[-1] == 2
    assert len(trained.losses) == 800


@pytest.mark.slow
def test_activations_are_scaled_to_one_size(trained, world):
    made = trained.crosscoder
    z = made.split(made.standardised(world[1])[0])
    torch.testing.assert_close(z.mean(0), torch.zeros(2, 32), rtol=0, atol=1e-3)
    power = z.square().sum(-1).mean(0).sqrt()
    torch.testing.assert_close(power, torch.full((2,), math.sqrt(32)), rtol=1e-3, atol=0)


@pytest.mark.slow
def test_l1_hides_weak_concepts_and_the_ratios_find_them():
    sparse = study.planted(SMALL, 0)
    penalised = study.planted(L1, 0)
    for record in (sparse, penalised):
        assert record["found"] == record["concepts"] == 28
        assert record["exclusive called chat only"] == record["of these confirmed"] == 4
    assert sparse["weak called chat only"] == 0
    assert penalised["weak called chat only"] == penalised["of these flagged"] >= 3


def test_a_model_against_itself_is_shared(world):
    plan = dataclasses.replace(SMALL, steps=150)
    record = study.null_diff(world[1][:, 0], world[2][:, 0], plan)
    assert record["alive"] > 20
    assert record["shared"] == record["alive"]
    assert record["largest |Delta - 1/2|"] < 1e-6
    assert record["largest |nu - 1|"] < 1e-4


def test_training_repeats():
    x = torch.randn(2000, 2, 6)
    plan = crosscoder.Recipe(
        "batchtopk", 64, k=1, steps=30, batch=64, warmup=5, rate=3e-3, dead_after=64
    )
    a, b = (crosscoder.train(x, plan) for _ in range(2))
    assert a.losses == b.losses
    assert torch.equal(a.crosscoder.decoder, b.crosscoder.decoder)
    other = crosscoder.train(x, dataclasses.replace(plan, seed=1))
    assert not torch.equal(a.crosscoder.decoder, other.crosscoder.decoder)


def test_auxk_moves_what_never_fires():
    x = torch.randn(2000, 2, 6)
    plan = crosscoder.Recipe(
        "batchtopk", 1000, k=1, steps=10, batch=64, warmup=1, rate=1e-3, dead_after=64
    )
    start = crosscoder.train(x, dataclasses.replace(plan, steps=1, rate=0.0)).crosscoder
    still = []
    for weight in (1 / 32, 0.0):
        made = crosscoder.train(x, dataclasses.replace(plan, auxiliary=weight)).crosscoder
        still.append(int((made.decoder == start.decoder).all(1).sum()))
    assert still[1] > 300
    assert still[0] < 0.9 * still[1]


def test_model_diff_names_the_planted_behaviour():
    generator = torch.Generator().manual_seed(1)
    planted = two_models(24, 8, 2, 0.15, generator)
    x, _ = planted.draw(20_000, generator)
    held_out, f = planted.draw(8000, generator)
    roles = (f[:, 10:] > 0).any(1).long()  # tokens with a concept of the chat model alone
    plan = dataclasses.replace(SMALL, features=16, steps=500, batch=512)
    made, found, record = study.model_diff(x, held_out, roles, (1,), plan)
    assert record["chat only"] == record["confirmed"] == record["confirmed at home"] == 2
    assert record["flagged"] == record["flagged at home"] == 0
    assert record["overlap"] == 0
    assert record["all at home"] == record["most leaning at home"] == 2 / record["alive"]
    assert record["correlation"] > 0.9
    assert found.tokens == 8000
    assert made.features == 16


def test_intervals():
    assert study.interval([2.0]) == "2"
    assert study.interval([1.0, 2, 3]) == "2 ± 2.5"


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(ImportError, match=r"pip install 'gemma_ext\[genome\]'"):
        study.interval([1.0, 2.0])


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="kind: expected one of batchtopk, l1, got 'topk'"):
        crosscoder.Recipe("topk", 4)
    with pytest.raises(ValueError, match="k_start: expected a number with annealing"):
        crosscoder.Recipe("batchtopk", 4, annealing=3)
    for shape in ((5, 2), (0, 2, 3)):
        with pytest.raises(ValueError, match=r"x: expected \[N, M, D\]"):
            crosscoder.train(torch.ones(shape), crosscoder.Recipe("l1", 4))
