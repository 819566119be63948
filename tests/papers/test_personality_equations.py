"""The equations of the personality study against known answers."""

import math

import numpy as np
import pytest
import torch

from gemma_ext.papers.personality import bbq, directions
from gemma_ext.papers.personality.calibration import Trial, best, best_layer, by_thirds, grid
from gemma_ext.papers.personality.paired import difference, holm, mcnemar
from gemma_ext.papers.personality.stability import Row, levels, ranges, stability


@pytest.mark.parametrize(("lost", "gained", "p"), [(1, 9, 22 / 1024), (0, 0, 1.0), (5, 5, 1.0)])
def test_mcnemar_is_the_exact_binomial(lost, gained, p):
    assert mcnemar(lost, gained) == pytest.approx(p, abs=1e-12)
    assert mcnemar(gained, lost) == pytest.approx(p, abs=1e-12)


def test_a_paired_interval_is_narrower_than_the_spread_of_items():
    rng = np.random.default_rng(3)
    easy = rng.uniform(size=400)
    before, after = easy, np.clip(easy + 0.05 + 0.02 * rng.standard_normal(400), 0, 1)
    found = difference(before, after)
    assert found.mean == pytest.approx((after - before).mean())
    assert found.low < found.mean < found.high
    assert found.high - found.low < 0.01
    assert found.p is None


def test_a_paired_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(5)
    hits = 0
    for trial in range(200):
        gaps = rng.normal(0.1, 0.3, 60)
        found = difference(np.zeros(60), gaps, resamples=400, seed=trial)
        hits += found.low <= 0.1 <= found.high
    assert 0.88 <= hits / 200 <= 0.99


def test_right_and_wrong_answers_get_the_exact_test_too():
    before, after = [1] * 10 + [0] * 10, [0] + [1] * 9 + [1] * 9 + [0]
    assert difference(before, after).p == pytest.approx(22 / 1024)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ([], [], "before: expected \\[items\\]"),
        ([1.0], [1.0, 0.0], "expected the 1 items of before, got 2"),
        ([math.nan], [0.0], "before: expected finite scores"),
    ],
)
def test_conditions_that_cannot_be_paired(before, after, message):
    with pytest.raises(ValueError, match=message):
        difference(before, after)


def test_holm_multiplies_by_the_tests_that_are_left():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_stability_of_known_differences():
    found = stability([0.0, 0.5, 1.0])
    assert found.consistency == pytest.approx(0.8571, abs=1e-4)
    assert found.low_disruption == pytest.approx(0.6667, abs=1e-4)
    assert found.composite == pytest.approx(0.5714, abs=1e-4)
    assert stability([0.0, 0.0]).composite == 1.0


def rows(deltas):
    return [Row("ms", str(i), {"mmlu": d}) for i, d in enumerate(deltas)]


@pytest.mark.parametrize("seed", range(20))
def test_composite_is_at_least_a_quarter_where_differences_straddle_zero(seed):
    rng = np.random.default_rng(seed)
    found = levels(rows([-rng.uniform(), 0.0, *rng.uniform(-2, 2, 4), rng.uniform()]))
    for group in found.values():
        assert all(0.25 <= value.composite <= 1 for value in group.values())


def test_far_from_zero_the_range_blows_differences_up():
    found = levels(rows([-0.40, -0.45]))["trait"]
    assert found[("0",)].low_disruption == pytest.approx(1 / 9)
    assert found[("1",)].low_disruption == pytest.approx(1 / 10)


def test_ranges_are_kept_so_that_another_row_moves_nothing():
    table = rows([0.1, -0.1])
    kept = ranges(table)
    more = [*table, Row("icl", "0", {"mmlu": 5.0})]
    assert (
        levels(more, kept)["combination"][("ms", "0")] == levels(table)["combination"][("ms", "0")]
    )
    assert levels(more)["combination"][("ms", "0")] != levels(table)["combination"][("ms", "0")]


def test_a_benchmark_that_never_moves_counts_as_no_difference():
    assert levels(rows([0.3, 0.3]))["method"][("ms",)].composite == 1.0


def test_ranges_by_standard_deviation():
    assert ranges(rows([-1.0, 1.0]), "sd") == {"mmlu": 1.0}
    with pytest.raises(ValueError, match="scale: expected range or sd, got 'iqr'"):
        ranges(rows([1.0]), "iqr")


@pytest.mark.parametrize(
    ("table", "by", "message"),
    [
        ([], None, "rows: expected at least one"),
        ([Row("a", "b", {"x": 1.0}), Row("a", "c", {"y": 1.0})], None, "got y of a, c"),
        ([Row("a", "b", {"x": 1.0})], {"y": 1.0}, "expected the ranges of x too"),
    ],
)
def test_tables_that_cannot_be_scaled(table, by, message):
    with pytest.raises(ValueError, match=message):
        levels(table, by)


def test_bias_of_ambiguous_items():
    answers = ["unknown"] * 6 + ["biased"] * 3 + ["anti-biased"]
    assert bbq.disambiguated(answers) == pytest.approx(0.5)
    assert bbq.ambiguous(answers) == pytest.approx(0.2)
    assert bbq.ambiguous(["unknown"] * 4) == 0.0
    with pytest.raises(ValueError, match="got 'maybe'"):
        bbq.ambiguous(["maybe"])


def test_a_planted_direction_is_found():
    generator = torch.Generator().manual_seed(1)
    u = torch.nn.functional.normalize(torch.randn(64, generator=generator), dim=0) * 2
    noise = torch.randn(2, 1000, 64, generator=generator)
    v = directions.difference(noise[0] + u, noise[1] - u)
    assert torch.dot(v, u / 2) > 0.995
    assert v.norm() == pytest.approx(1.0, abs=1e-6)


def test_a_running_mean_is_that_of_float64_for_any_batches():
    generator = torch.Generator().manual_seed(2)
    x = 100 + torch.randn(1001, 33, generator=generator)
    for cut in ([1001], [1, 500, 500], [7] * 143):
        mean = directions.Mean()
        for part in x.split(cut):
            mean.add(part)
        torch.testing.assert_close(mean.result().double(), x.double().mean(0), rtol=1e-6, atol=0)


def purified(covariance):
    generator = torch.Generator().manual_seed(4)
    v, others = torch.randn(24, generator=generator), torch.randn(2, 24, generator=generator)
    return v, others, directions.without(v, others, covariance)


def test_nothing_of_the_others_is_left_and_twice_is_once():
    _, others, kept = purified(None)
    assert (others @ kept).abs().max() < 1e-6
    assert kept.norm() == pytest.approx(1.0, abs=1e-6)
    torch.testing.assert_close(directions.without(kept, others), kept)


def test_under_a_covariance_the_others_say_nothing_of_what_is_left():
    generator = torch.Generator().manual_seed(6)
    root = torch.randn(24, 24, generator=generator, dtype=torch.float64)
    covariance = root @ root.T + 24 * torch.eye(24, dtype=torch.float64)
    v, others, kept = purified(covariance)
    inverse = torch.linalg.inv(covariance)
    assert (others.double() @ inverse @ kept.double()).abs().max() < 1e-7
    b = others.double().T
    formula = v.double() - b @ torch.linalg.solve(b.T @ inverse @ b, b.T @ inverse @ v.double())
    torch.testing.assert_close(kept.double(), formula / formula.norm(), rtol=1e-5, atol=1e-6)
    identity = torch.eye(24, dtype=torch.float64)
    torch.testing.assert_close(directions.without(v, others, identity), purified(None)[2])


def test_parallel_others_count_once():
    v, others, kept = purified(None)
    doubled = torch.stack([others[0], others[1], 3 * others[0]])
    torch.testing.assert_close(directions.without(v, doubled), kept)


def test_a_direction_inside_the_span_is_refused_not_turned_into_noise():
    _, others, _ = purified(None)
    with pytest.raises(ValueError, match="outside the span of the others"):
        directions.without(others[0] - 2 * others[1], others)


def test_contrast_leans_from_the_other_trait_to_the_target():
    generator = torch.Generator().manual_seed(8)
    v = torch.randn(16, generator=generator)
    target, other = torch.randn(2, 50, 16, generator=generator)
    toward = target.mean(0) - other.mean(0)
    before, after = directions.unit(v), directions.contrasted(v, target, other)
    assert torch.dot(after, toward) > torch.dot(before, toward)


def test_crossed_coefficients_move_one_trait_alone():
    response = torch.randn(5, 5, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    torch.testing.assert_close(response @ directions.crossed(response).T, torch.eye(5).double())


def alignment(strength):
    return 1 / (1 + math.exp(-strength / 40))


def curve(seed=None, clean=1.0):
    """Alignment rises with strength, text breaks beyond 180; shares of 15 outputs, or exact."""
    rng = np.random.default_rng(seed)

    def measure(strengths):
        trials = []
        for s in strengths:
            shares = alignment(s), clean if abs(s) <= 180 else 0.2
            if seed is not None:
                shares = rng.binomial(15, shares) / 15
            trials.append(Trial(s, *shares, prompts=15))
        return trials

    return measure


def test_the_grid_stops_at_the_cliff():
    trials = grid(curve(), count=31)
    assert len(trials) == 31
    assert best(trials).strength == 180


def test_a_search_by_thirds_is_lost_to_a_gate_that_noise_shuts_and_a_grid_is_not():
    def lost(search):
        chosen = [search(curve(seed, clean=0.92)).strength for seed in range(100)]
        return sum(abs(s) > 180 or alignment(s) < 0.75 for s in chosen)

    assert lost(by_thirds) > 15
    assert lost(lambda measure: best(grid(measure))) < 5


def test_no_clean_trial_is_said_and_not_chosen():
    with pytest.raises(ValueError, match=r"expected one at least 0\.9 clean, got 0\.5 at most"):
        best([Trial(1.0, 1.0, 0.5, 15)])


def test_a_clean_share_has_a_lower_bound():
    assert Trial(0.0, 0.0, 1.0, 15).clean_bound == pytest.approx(0.796, abs=1e-3)
    assert Trial(0.0, 0.0, 0.5, 100).clean_bound == pytest.approx(0.404, abs=1e-3)


def test_a_layer_that_no_strength_leaves_clean_takes_no_part():
    trials = {
        9: [Trial(0.0, 0.9, 0.8, 20), Trial(5.0, 1.0, 0.0, 20)],
        12: [Trial(0.0, 0.2, 0.8, 20), Trial(4.0, 0.45, 0.95, 20)],
        15: [Trial(0.0, 0.3, 1.0, 20)],
    }
    assert best_layer(trials) == (12, trials[12][1])
    with pytest.raises(ValueError, match=r"expected one at least 0.9 clean, got 0.8 at most"):
        best_layer({9: trials[9]})
