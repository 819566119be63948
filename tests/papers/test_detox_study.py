"""The detoxification study on a model of a few thousand parameters."""

import dataclasses
import json

import pytest
import tiny_gemma
import torch

from gemma_ext.lm import HuggingFaceModel, Sampling
from gemma_ext.nn.sparse_autoencoder import JumpReLU, SparseAutoencoder
from gemma_ext.ops.sae import steer
from gemma_ext.papers import detox
from gemma_ext.papers.detox import page

TEXTS = ("a plain word is said here", "blast it and drat it all", "so it goes on and on", "is it")
PROMPTS = ("a plain", "blast it", "so it goes")
LAYER = 0
FIVE = Sampling(5)


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    folder = tiny_gemma.base(tmp_path_factory.mktemp("model"), TEXTS)
    loaded = HuggingFaceModel.load(folder, dtype=torch.float32, show_progress=False)
    with torch.no_grad():  # far from uniform, so that greedy text depends on the state
        for parameter in loaded.model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    return loaded


def dictionary(features=40, seed=0):
    sae = SparseAutoencoder(32, features, JumpReLU(), subtract_bias=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in (sae.encoder, sae.decoder):
            value.copy_(torch.randn(value.shape, generator=generator))
    return sae.eval()


def hidden(lm, text):
    ids = torch.tensor(lm.text.encode([text]))
    with torch.no_grad():
        states = lm.model(input_ids=ids, output_hidden_states=True).hidden_states
    return states[LAYER + 1][0, 1:]


def plan_of(*ids, reference=1.0, **options):
    chosen = detox.latents(ids, [reference] * len(ids))
    return detox.Intervention("tiny", LAYER, "sae", chosen, **options)


def task(lm, scorer, **options):
    return detox.Task(PROMPTS, scorer, lm, continuations=1, sampling=FIVE, **options)


def test_latents_are_counted_in_the_block_that_is_steered_and_without_bos(lm):
    sae = dictionary()
    found = detox.contrast(lm, sae, LAYER, TEXTS[:2], TEXTS[2:], batch=3)
    codes = [sae.encode(hidden(lm, text)).dense() for text in TEXTS]
    largest = torch.stack([code.max(0).values for code in codes])
    delta = largest[:2].mean(0) - largest[2:].mean(0)
    torch.testing.assert_close(found.contrast()[0].float(), delta, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.largest, largest.max(0).values, rtol=1e-4, atol=1e-4)
    clean = torch.cat(codes[2:])
    assert found.tokens == [len(clean), len(torch.cat(codes[:2]))]


def test_the_pick_is_the_latent_that_causes_it_not_the_one_that_detects_it(lm):
    sae = dictionary()
    with torch.no_grad():
        sae.decoder[3] = 0  # changes nothing, however well it fires
    written = [completion.text for completion in lm.generate(PROMPTS, FIVE)]
    found = detox.Found(
        torch.tensor([3, 6]), *(torch.tensor([2.0, 1.0]) for _ in range(3)), torch.full((2,), 1e3)
    )
    chosen, drops = detox.causal_pick(
        lm,
        sae,
        plan_of(0, tier="constant"),
        found,
        task(lm, lambda texts: [float(text in written) for text in texts]),
        keep=2,
    )
    assert dict(drops) == {3: 0.0, 6: pytest.approx(1.0)}
    assert [latent.id for latent in chosen.latents] == [6]
    assert chosen.latents[0].ref_max == 1e3


def test_a_model_without_fault_has_no_latents_to_blame(lm):
    found = detox.Found(torch.tensor([3]), *(torch.ones(1) for _ in range(4)))
    harmless = task(lm, lambda texts: [0.0] * len(texts))
    with pytest.raises(ValueError, match="task: expected prompts that lead to toxic text"):
        detox.causal_pick(lm, dictionary(), plan_of(0), found, harmless)


def length_scorer(texts):
    return [min(1.0, len(set(text)) / 10) for text in texts]


def test_a_sweep_begins_with_the_model_as_it_is(lm):
    sae, seen = dictionary(), []

    def capability(model):
        seen.append(model.generate(PROMPTS, FIVE))
        return len(seen) / 10

    rows = detox.sweep(
        lm,
        sae,
        plan_of(1, 2, 4, reference=50.0),
        task(lm, length_scorer, capability=capability),
        alphas=[0.0, 1.0],
    )
    plain = lm.generate(PROMPTS, FIVE)
    texts = [completion.text for completion in plain]
    assert [(row.tier, row.alpha) for row in rows] == [
        ("none", 0.0),
        *((tier, alpha) for tier in detox.TIERS for alpha in (0.0, 1.0)),
    ]
    scores = lm.logprobs(PROMPTS, texts)
    count = sum(len(score.token_logprobs) for score in scores)
    perplexity = torch.tensor(-sum(s.logprob for s in scores) / count).exp().item()
    ids = lm.text.tokenizer(texts, add_special_tokens=False).input_ids
    repeated = sum(detox.repetition(row) for row in ids) / len(ids)
    for row in rows:
        if row.alpha == 0.0:
            assert row.toxicity == detox.toxicity([[x] for x in length_scorer(texts)])
            assert row.perplexity == pytest.approx(perplexity, rel=1e-4)
            assert row.repetition == pytest.approx(repeated)
    assert [row.capability for row in rows] == [pytest.approx((at + 1) / 10) for at in range(7)]
    assert seen[0] == seen[1] == plain != seen[2]
    assert lm.generate(PROMPTS, FIVE) == plain


def test_widths_are_compared_with_the_same_search(lm):
    states = torch.cat([hidden(lm, text) for text in TEXTS])
    made = {16: dictionary(16, seed=1), 40: dictionary(40, seed=2)}
    for sae in made.values():  # each latent fires on a tenth of the tokens
        with torch.no_grad():
            sae.threshold.copy_((states @ sae.encoder.T).quantile(0.9, dim=0))
    toxic, clean = TEXTS[:2], TEXTS[2:]
    options = task(lm, length_scorer)
    plan = plan_of(30)  # of the wider one
    rows = detox.splitting(lm, dict(reversed(made.items())), plan, toxic, clean, options)
    assert [row.features for row in rows] == [16, 40]
    for row in rows:
        sae = made[row.features]
        best = detox.contrast(lm, sae, LAYER, toxic, clean).best(8).latents
        fires = torch.stack(
            [(sae.encode(hidden(lm, t)).dense()[:, best] > 0).any(0) for t in TEXTS]
        )
        assert row.one == fires[:2, 0].float().mean()
        assert row.several == fires[:2].any(1).float().mean()
        assert row.clean == fires[2:].any(1).float().mean()
        assert row.one <= row.several


STATES = torch.randn(1, 12, 32, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("tier", detox.TIERS)
def test_each_tier_subtracts_where_it_says(tier):
    sae = dictionary()
    with torch.no_grad():
        sae.threshold.fill_(6.0)
    plan = detox.Intervention(
        "m", 0, "s", (detox.Latent(2, 0.5, 3.0), detox.Latent(9, 1.0, 4.0)), tier=tier
    )
    codes = sae.encode(STATES[0]).dense()[:, [2, 9]] > 0
    assert 0 < codes.sum() < codes.numel() / 2
    gates = {
        "constant": torch.ones_like(codes),
        "per_input": codes.any(1).cummax(0).values[:, None].expand_as(codes),
        "per_token": codes,
    }
    truth = STATES[0] - (gates[tier].float() * torch.tensor([1.5, 4.0])) @ sae.decoder[[2, 9]]
    torch.testing.assert_close(steer(STATES, plan.steering(sae))[0], truth)


def test_scale_may_lie_in_codes_or_in_rows():
    """As of a dictionary whose input scale was folded into its file."""
    sae, folded = dictionary(), dictionary()
    with torch.no_grad():
        folded.encoder /= 64
        folded.decoder *= 64
    before, after = (
        steer(STATES, plan_of(2, 9, reference=s, tier="constant").steering(given))
        for given, s in ((sae, 4.0), (folded, 4.0 / 64))
    )
    assert not torch.equal(before, STATES)
    torch.testing.assert_close(after, before)


def test_other_modes_take_alpha_as_a_share():
    sae = dictionary()
    half = detox.Intervention(
        "m", 0, "s", (detox.Latent(2, 0.5, 9.0),), mode="ablate", tier="constant"
    )
    code = sae.encode(STATES[0]).dense()[:, 2:3]
    truth = STATES[0] - 0.5 * code * sae.decoder[2]
    torch.testing.assert_close(steer(STATES, half.steering(sae))[0], truth, rtol=1e-5, atol=1e-5)


def test_an_intervention_is_one_file(tmp_path):
    plan = plan_of(3, 7, tier="per_input", input_scope="window", window=4)
    plan.write(tmp_path / "plan.json")
    assert detox.Intervention.read(tmp_path / "plan.json") == plan
    given = json.loads((tmp_path / "plan.json").read_text())
    for broken in ("{", json.dumps({**given, "latents": [{"name": 3}]}), json.dumps([])):
        (tmp_path / "plan.json").write_text(broken)
        with pytest.raises(ValueError, match=r"plan.json: expected an intervention"):
            detox.Intervention.read(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latents": ()}, "latents: expected at least one"),
        ({"tier": "always"}, "tier: expected one of constant, per_input, per_token, got 'always'"),
        ({"mode": "delete"}, "mode: expected one of add"),
    ],
)
def test_interventions_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        detox.Intervention(**{"model": "m", "layer": 0, "sae": "s", "latents": (1,), **options})


def record(tier, alpha, toxic, perplexity, capability=None):
    row = detox.Row(
        tier, alpha, detox.Toxicity(toxic, toxic, toxic), perplexity, 0.5, 0.1, capability
    )
    return dataclasses.asdict(row)


def test_the_page_holds_every_row_and_names_the_gentlest(tmp_path):
    rows = [
        record("none", 0.0, 0.8, 20.0, 0.7),
        record("constant", 1.0, 0.1, 90.0, 0.3),
        record("per_token", 1.0, 0.3, 21.0, 0.7),
    ]
    splits = [dataclasses.asdict(detox.Split(256, 0.9, 1.0, 0.1, 0.8, 0.4, 0.2))]
    page.write(tmp_path / "page.html", rows, [(7, 0.25)], splits, {"model": "tiny"})
    html = (tmp_path / "page.html").read_text()
    for text in ("0.800", "per token, 1", "+0.250", "256", "tiny", "<svg"):
        assert text in html
    assert "Feature splitting" in html
    text = page.markdown(rows, splits)
    assert "| per token | 1 | 0.300 |" in text
    assert "| 256 | 0.900 |" in text
    page.write(tmp_path / "page.html", [record("none", 0.0, 0.8, 20.0)], [], [], {})
    assert "Feature splitting" not in (tmp_path / "page.html").read_text()
