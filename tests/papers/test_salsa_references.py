"""References against float64: soups, several models, moving ones; resume."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from salsa_toy import heads_only, logits, model, near, responses

from gemma_ext.nn.ppo import FrozenReference, Reference
from gemma_ext.papers import salsa


def logp64(of, sequences, temperature=1.0):
    z = (logits(of, sequences) / temperature).log_softmax(-1)
    return z.gather(1, sequences.targets.unsqueeze(1)).squeeze(1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_soup_reference_is_its_models_log_probability(temperature):
    one = model(0)
    reference = salsa.SoupReference([one, near(one, 1)], [0.4, 0.6])
    assert isinstance(reference, Reference)
    sequences = responses()
    got = reference.logprobs(sequences, temperature)
    expected = logp64(salsa.soup([one, near(one, 1)], [0.4, 0.6]), sequences, temperature)
    assert got.shape == (int(sequences.lengths.sum()),)
    assert not got.requires_grad
    assert (got.double() - expected).abs().max() < 1e-5
    assert reference.after_update(one, 1) == {}


def test_alpha_one_scores_bit_for_bit_as_the_first_parent():
    one = model(0)
    two, sequences = near(one, 1), responses()
    soup = salsa.SoupReference([one, two], [1.0, 0.0])
    frozen = FrozenReference(copy.deepcopy(one))
    assert torch.equal(soup.logprobs(sequences), frozen.logprobs(sequences))
    swapped = salsa.SoupReference([two, one], [0.0, 1.0])
    assert torch.equal(swapped.logprobs(sequences), frozen.logprobs(sequences))


def test_identical_parents_cost_nothing_at_step_zero():
    one, sequences = model(0), responses()
    reference = salsa.SoupReference([one, copy.deepcopy(one)])
    ended = [True] * len(sequences)
    found = salsa.step_zero(one, {"soup": reference, "sft": one}, sequences, ended)
    assert found["kl_soup"] == found["kl_sft"]
    assert abs(found["kl_soup"]) < 1e-6
    assert abs(found["kl_soup_per_token"]) < 1e-6
    assert torch.equal(reference.logprobs(sequences), FrozenReference(one).logprobs(sequences))


def test_a_soup_is_made_anew_in_place_and_resumed():
    one = model(0)
    two, three, sequences = near(one, 1), near(one, 2), responses()
    reference = salsa.SoupReference([one, two])
    places = [p.data_ptr() for p in reference.model.parameters()]
    assert reference.state_dict() == {"puts": 0}
    reference.put([one, two, three])
    assert places == [p.data_ptr() for p in reference.model.parameters()]
    expected = salsa.SoupReference([one, two, three]).logprobs(sequences)
    assert torch.equal(reference.logprobs(sequences), expected)
    resumed = salsa.SoupReference([one, two])
    resumed.load_state_dict(copy.deepcopy(reference.state_dict()))
    assert torch.equal(resumed.logprobs(sequences), expected)
    untouched = salsa.SoupReference([one, two])
    before = untouched.logprobs(sequences)
    untouched.load_state_dict({"puts": 0})
    assert torch.equal(untouched.logprobs(sequences), before)


def test_the_soup_of_linear_models_is_their_normalised_geometric_mean():
    """log softmax(sum a_k z_k) = sum a_k log pi_k - log Z: both paths at once."""
    given, weights, sequences = heads_only(3), [0.5, 0.2, 0.3], responses()
    soup = salsa.SoupReference(given, weights).logprobs(sequences).double()
    several = salsa.MultiReference(copy.deepcopy(given), weights).logprobs(sequences).double()
    each = torch.stack([logits(m, sequences).log_softmax(-1) for m in given])
    log_z = torch.einsum("k,knv->nv", torch.tensor(weights).double(), each).logsumexp(-1)
    assert (log_z < -1e-4).all()
    assert (soup - (several - log_z)).abs().max() < 1e-5


def test_several_divergences_are_one_to_the_geometric_mean():
    """sum a_k KL(pi || pi_k) = KL(pi || prod pi_k^a_k / Z) - log Z."""
    given, weights, sequences = heads_only(4), [0.1, 0.6, 0.3], responses()
    policy, references = given[3], given[:3]
    p = logits(policy, sequences).log_softmax(-1)
    each = torch.stack([logits(m, sequences).log_softmax(-1) for m in references])
    mixed = torch.einsum("k,knv->nv", torch.tensor(weights).double(), each)
    log_z = mixed.logsumexp(-1)
    expected = (p.exp() * (p - (mixed - log_z.unsqueeze(1)))).sum(-1) - log_z
    several = salsa.MultiReference(references, weights)
    assert [weight for weight, _ in several.heads(sequences)] == weights
    found = salsa.divergences(policy, {"several": several}, sequences)
    assert found["kl_several_per_token"] == pytest.approx(float(expected.mean()), rel=1e-4)
    # and by the mean of k1 under the policy, every token of the vocabulary summed
    k1 = (p.exp() * (p - mixed)).sum(-1)
    assert torch.allclose(k1, expected, atol=1e-12)
    # k3 of the difference adds Z - 1
    k3 = (p.exp() * ((mixed - p).exp() - 1 + (p - mixed))).sum(-1)
    assert torch.allclose(k3, expected + log_z.exp() - 1, atol=1e-12)


def test_one_model_of_several_is_the_model():
    one, sequences = model(0), responses()
    several = salsa.MultiReference([copy.deepcopy(one)])
    assert torch.equal(several.logprobs(sequences), FrozenReference(one).logprobs(sequences))
    assert several.after_update(one, 1) == {}
    assert several.state_dict() == {}
    several.load_state_dict({})
    with pytest.raises(ValueError, match="at least one model"):
        salsa.MultiReference([])
    with pytest.raises(ValueError, match="expected 1 numbers in weights, got 2"):
        salsa.MultiReference([one], [0.5, 0.5])


def test_divergence_of_linear_models_falls_as_alpha_goes_to_one():
    one, two = heads_only(2)
    sequences = responses()
    grid = [0.5, 0.6, 0.75, 0.9, 0.97, 1.0]
    soups = {f"{a}": salsa.soup([one, two], [a, 1 - a]) for a in grid}
    found = salsa.divergences(one, soups, sequences)
    paid = [found[f"kl_{a}"] for a in grid]
    assert all(high > low for high, low in itertools.pairwise(paid))
    assert abs(paid[-1]) < 1e-6


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_exact_divergence_is_the_sum_over_the_vocabulary(temperature):
    one = model(0)
    two, sequences = near(one, 1, by=0.1), responses()
    p = (logits(one, sequences) / temperature).log_softmax(-1)
    q = (logits(two, sequences) / temperature).log_softmax(-1)
    expected = float((p.exp() * (p - q)).sum())
    one.train()
    found = salsa.divergences(one, {"other": two}, sequences, temperature)
    assert one.training
    assert found["kl_other"] == pytest.approx(expected / len(sequences), rel=1e-4)
    count = int(sequences.lengths.sum())
    assert found["kl_other_per_token"] == pytest.approx(expected / count, rel=1e-4)


def test_a_moving_reference_moves_on_its_steps_alone():
    one = model(0)
    policy = near(one, 1)
    reference = salsa.MovingReference(copy.deepcopy(one), 0.75, every=3, rounding="nearest")
    for step in (1, 2):
        assert reference.after_update(policy, step) == {}
    assert reference.after_update(policy, 3) == {"reference/moves": 1.0}
    for made, old, new in zip(
        reference.model.parameters(), one.parameters(), policy.parameters(), strict=True
    ):
        torch.testing.assert_close(made, 0.75 * old + 0.25 * new)


def test_a_hard_sync_is_the_policy_and_a_soft_one_is_trls_up_to_rounding():
    one = model(0)
    policy = near(one, 1)
    hard = salsa.sync(copy.deepcopy(one), 1.0, every=1)
    hard.after_update(policy, 1)
    for made, new in zip(hard.model.parameters(), policy.parameters(), strict=True):
        assert torch.equal(made, new)
    from trl.trainer.callbacks import SyncRefModelCallback

    theirs, ours = copy.deepcopy(one), salsa.sync(copy.deepcopy(one), every=1)
    SyncRefModelCallback._sync_target_model(policy, theirs, 0.6)
    ours.after_update(policy, 1)
    for mine, other in zip(ours.model.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)
    assert salsa.sync(one).every == 512


@pytest.mark.parametrize("options", [{}, {"shadow": True}], ids=["stochastic", "shadow"])
def test_a_slow_average_in_bfloat16_arrives(options):
    """100 steps of 1 %: rounded to nearest it stands still, these two end where they should."""
    start = model(0, torch.bfloat16)
    policy = near(start, 1, by=0.004)
    stuck = salsa.ema(copy.deepcopy(start), 0.99, rounding="nearest")
    moved = salsa.ema(copy.deepcopy(start), 0.99, **options)
    for step in range(1, 101):
        stuck.after_update(policy, step)
        moved.after_update(policy, step)

    def way(reference):
        pairs = zip(
            reference.model.parameters(), start.parameters(), policy.parameters(), strict=True
        )
        along = [((r - s).double() * (p - s).double()).sum() for r, s, p in pairs]
        full = [
            (p - s).double().square().sum()
            for p, s in zip(policy.parameters(), start.parameters(), strict=True)
        ]
        return (sum(along) / sum(full)).item()

    assert way(moved) == pytest.approx(1 - 0.99**100, abs=0.03)
    assert way(stuck) < 0.3


@pytest.mark.parametrize("shadow", [False, True])
def test_a_moving_reference_resumes_to_the_bit(shadow):
    start = model(0, torch.bfloat16)
    steps = [near(start, seed) for seed in range(1, 7)]

    def fresh():
        return salsa.ema(copy.deepcopy(start), 0.9, shadow=shadow, seed=11)

    whole, first, second = fresh(), fresh(), fresh()
    for step, policy in enumerate(steps, 1):
        whole.after_update(policy, step)
        if step <= 3:
            first.after_update(policy, step)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for step, policy in enumerate(steps[3:], 4):
        second.after_update(policy, step)
    for one, two in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, two)
    assert second.moves == 6


def test_what_does_not_move_right_is_refused():
    one = model(0)
    for options, message in (
        ({"decay": 1.5}, r"expected decay in \[0, 1\], got 1.5"),
        ({"decay": 0.5, "every": 0}, "expected every to be at least 1, got 0"),
        ({"decay": 0.5, "rounding": "up"}, "expected rounding to be nearest or stochastic"),
    ):
        with pytest.raises(ValueError, match=message):
            salsa.MovingReference(one, **options)
    reference = salsa.ema(one, 0.9)
    with pytest.raises(ValueError, match="got the policy itself"):
        reference.after_update(one, 1)


def test_nothing_behind_the_end_counts():
    one = model(0)
    two, sequences = near(one, 1), responses()
    reference = salsa.SoupReference([one, two])
    noisy = copy.deepcopy(sequences)
    behind = ~noisy.response_mask
    noisy.ids[:, noisy.prompt_width :][behind] = 5
    assert torch.equal(reference.logprobs(sequences), reference.logprobs(noisy))
    assert torch.equal(
        sequences.unpack(reference.logprobs(sequences))[behind], torch.zeros(int(behind.sum()))
    )
