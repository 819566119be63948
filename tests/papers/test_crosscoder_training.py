"""Training: planted worlds, the null diff, dead latents, repeats."""

import dataclasses
import math

import pytest
import torch

from gemma_ext.nn.sparse_autoencoder import ReLU, SparseAutoencoder
from gemma_ext.papers import crosscoder
from gemma_ext.papers.crosscoder import study
from gemma_ext.papers.crosscoder.discovery import contrast_delta, discover, recall_of_role
from gemma_ext.papers.crosscoder.planted import matched, two_models

SMALL = crosscoder.Recipe(
    "batchtopk", 40, k=2, steps=800, batch=1024, rate=3e-3, warmup=50, dead_after=50_000
)
L1 = dataclasses.replace(SMALL, kind="l1", mu=1.0, error="squared")


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
    place = matched(raw_decoder(made), planted)
    assert (place >= 0).sum() == 24
    found = discover(made, held_out.split(4096))
    names = [crosscoder.TAGS[n] for n in found.tags[place]]
    assert names == ["shared"] * 16 + ["base only"] * 4 + ["chat only"] * 4
    assert found.explained.min() > 0.9
    assert found.betas.specific()[place[20:]].all()
    torch.testing.assert_close(
        found.betas.nu_error[place[:16]], torch.ones(16).double(), rtol=0, atol=0.05
    )


@pytest.mark.slow
def test_ratios_know_rare_concepts_that_norms_do_not():
    """Concepts in 0.5 % of the tokens: their decoders have not come far from where they began."""
    generator = torch.Generator().manual_seed(0)
    planted = two_models(32, 16, 4, 0.08, generator, rare=0.005)
    x, held_out = planted.draw(60_000, generator)[0], planted.draw(40_000, generator)[0]
    made = crosscoder.train(x, dataclasses.replace(SMALL, k=1.5, steps=900)).crosscoder
    found = discover(made, held_out.split(4096))
    place = matched(raw_decoder(made), planted, 0.7)
    base, chat = (part[part >= 0] for part in (place[16:20], place[20:]))
    assert len(base) + len(chat) >= 6
    assert found.betas.specific()[chat].all()
    binned = [crosscoder.TAGS[n] for n in found.tags[torch.cat([base, chat])]]
    assert binned != ["base only"] * len(base) + ["chat only"] * len(chat)


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


def test_decoders_start_as_long_as_asked_for():
    x = torch.randn(200, 2, 6)
    still = crosscoder.Recipe("batchtopk", 16, k=1, steps=1, batch=64, rate=0.0)
    for kind, start, norm in (
        ("batchtopk", None, 1.0),
        ("l1", None, 0.1),
        ("batchtopk", 0.05, 0.05),
        ("l1", 0.05, 0.05),
    ):
        made = crosscoder.train(x, dataclasses.replace(still, kind=kind, start=start)).crosscoder
        norms = made.decoder_norms()
        torch.testing.assert_close(norms, torch.full_like(norms, norm))
        encoder = made.encoder.view(16, 2, 6).norm(dim=-1)
        torch.testing.assert_close(encoder, torch.full_like(encoder, 1.0 if kind != "l1" else 0.1))


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
    made, found, record = study.model_diff(x, held_out, roles, (1,), 1, plan)
    assert record["chat only"] == record["confirmed"] == record["confirmed at home"] == 2
    assert record["flagged"] == record["flagged at home"] == 0
    assert record["detector share"] > 0.9
    assert 0.4 < record["detector recall"] < 0.7  # one of the two concepts
    assert record["detector rank"] in (1, 2)
    assert record["detector delta"] > 0.9
    assert max(record["detector nu error"], record["detector nu reconstruction"]) < 0.1
    assert record["overlap"] == 0
    assert record["all at home"] == record["most leaning at home"] == 2 / record["alive"]
    assert record["correlation"] > 0.9
    assert found.tokens == 8000
    assert made.features == 16


def test_model_diff_needs_cues():
    x = torch.zeros(8, 2, 4)
    roles = torch.zeros(8, dtype=torch.int64)
    with pytest.raises(ValueError, match="roles: expected held-out tokens of the cue 1, got none"):
        study.model_diff(x, x, roles, (1,), 1, SMALL)


def test_the_best_detector_is_a_living_latent(monkeypatch):
    """Latent 0 is dead, and no latent fires on the one cue."""
    x = torch.randn(64, 2, 6, generator=torch.Generator().manual_seed(2))
    x[0] = 0
    made = SparseAutoencoder(6, 5, ReLU(), sources=2, subtract_bias=False, standardise="affine")
    made.reset_parameters(torch.Generator().manual_seed(3))
    monkeypatch.setattr(study, "train", lambda *_, **__: crosscoder.Trained(made.eval(), [], []))
    roles = torch.zeros(64, dtype=torch.int64)
    roles[0] = 1
    with torch.no_grad():
        made.encoder_bias.copy_(torch.tensor([-1e3, -0.1, -0.1, -0.1, -0.1]))
    _, found, record = study.model_diff(x, x, roles, (1, 4), 1, SMALL)
    assert found.alive.tolist() == [False, True, True, True, True]
    assert record["detector recall"] == record["detector share"] == 0
    assert record["detector rank"] == 1
    with torch.no_grad():
        made.encoder_bias.fill_(-1e3)
    with pytest.raises(ValueError, match="expected latents that fire on held-out tokens, got none"):
        study.model_diff(x, x, roles, (1,), 1, SMALL)


def test_the_recall_of_a_role_is_the_share_of_its_tokens_that_a_latent_fires_on():
    made = SparseAutoencoder(2, 3, ReLU(), sources=2, subtract_bias=False).eval()
    with torch.no_grad():
        made.encoder.copy_(torch.eye(4)[:3])
        made.encoder_bias.zero_()
    x = torch.tensor(
        [[[1.0, 0], [0, 0]], [[0, 1.0], [0, 0]], [[1.0, 1], [1, 0]], [[-1, 0], [0, 0]]]
    )
    roles = torch.tensor([1, 1, 1, 0])
    found = recall_of_role(made, x.split(2), roles.split(2), 1)
    torch.testing.assert_close(found, torch.tensor([2 / 3, 2 / 3, 1 / 3]))
    assert not recall_of_role(made, [x], [roles], 0).any()
    assert not recall_of_role(made, [x], [roles], 2).any()


def test_the_delta_of_a_perfect_detector():
    x = torch.randn(6, 2, 3)
    here = torch.tensor([1, 1, 0, 0, 0, 0], dtype=torch.bool)
    there = torch.tensor([0, 0, 1, 0, 1, 0], dtype=torch.bool)
    tokens = torch.tensor([7, 8, 7, 9, 8, 7])
    x[here] = x[there]
    x[here, 1] += torch.tensor([3.0, 0, 4])
    assert contrast_delta(x, here, there, tokens) == pytest.approx(1)
    x[here, 0] += torch.tensor([0.0, 1, 0])
    assert contrast_delta(x, here, there, tokens) == pytest.approx(0.5 * (4 / 5 + 1))
    x[1] += 100  # an id that is on one side alone counts for nothing
    tokens[1] = 5
    assert contrast_delta(x, here, there, tokens) == pytest.approx(0.5 * (4 / 5 + 1))
    with pytest.raises(ValueError, match="tokens: expected an id that is here and there, got none"):
        contrast_delta(x, here, there, torch.arange(6))


def test_intervals():
    assert study.interval([2.0]) == "2"
    assert study.interval([1.0, 2, 3]) == "2 ± 2.5"


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="kind: expected one of batchtopk, l1, got 'topk'"):
        crosscoder.Recipe("topk", 4)
    with pytest.raises(ValueError, match="k_start: expected a number with annealing"):
        crosscoder.Recipe("batchtopk", 4, annealing=3)
    for shape in ((5, 2), (0, 2, 3)):
        with pytest.raises(ValueError, match=r"x: expected \[N, M, D\]"):
            crosscoder.train(torch.ones(shape), crosscoder.Recipe("l1", 4))
