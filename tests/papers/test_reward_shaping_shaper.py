"""The shaper: order of rules, statistics, quirks of the reference, flags, errors."""

from __future__ import annotations

import json
import math
from argparse import ArgumentParser

import pytest
import torch
from torch import tensor

from gemma_ext.papers.reward_shaping import (
    REFERENCE_COMPATIBLE,
    RULES,
    Quirks,
    RewardShaper,
    Running,
    Shaping,
    add_flags,
    from_flags,
)


def double(values):
    return tensor(values, dtype=torch.float64)


FIRST, SECOND = double([1, 3]), double([2.5, -0.5, 4])
STREAM = {
    "meanstd": ([-1, 1], [0.31622777, -1.58113883, 1.26491106]),
    "clip": ([1, 3], [2.5, 0.41886117, 3.58113883]),
    "minmax": ([0, 1], [0.66666667, 0, 1]),
}


@pytest.mark.parametrize("name", STREAM)
def test_running_rules_take_the_batch_in_before_they_shape_it(name):
    shaper = RewardShaper(name)
    for rewards, expected in zip((FIRST, SECOND), STREAM[name], strict=True):
        torch.testing.assert_close(shaper(rewards), double(expected), atol=1e-8, rtol=0)
    seen = shaper.statistics(name)
    assert (seen.count, seen.mean, seen.low, seen.high) == (5, 2, -0.5, 4)
    assert abs(seen.std - 1.58113883) < 1e-8


def test_ceil_comes_before_the_length_penalty():
    shaper = RewardShaper(Shaping(ceil=3, length_penalty=(300, 0.01)))
    assert shaper(double([5, 5, 1]), lengths=[400, 300, 350]).tolist() == [2, 3, 0.5]


def test_ceil_comes_again_behind_the_clip_and_before_minmax():
    shaper = RewardShaper(Shaping(ceil=0.5, meanstd=True))
    r = double([-2, 0, 0.1, 0.3])
    found = shaper(r)
    expected = (r - r.mean()) / r.std(correction=0)
    assert expected.max() > 0.5
    torch.testing.assert_close(found, expected.clamp(max=0.5))
    both = RewardShaper(Shaping(ceil=0.5, meanstd=True, minmax=True))(r)
    torch.testing.assert_close(both, (found - found.min()) / (found.max() - found.min()))


def test_flags_combine_in_the_order_of_the_reference():
    shaping = Shaping(
        length_penalty=(3, 0.5), centred=True, clip=True, sigmoid=True, relative=True, lsc=True,
        k=2.0, max_references=2,
    )  # fmt: skip
    r, q = double([4, 1, 2]), double([[0, 1, 5], [1, 3, 2], [2, 2, 1]])
    found = RewardShaper(shaping)(r, q, lengths=tensor([5, 3, 9]))
    x = r - 0.5 * double([2, 0, 6])
    x = (x[:, None] - q[:, :2]).mean(1)
    x = x.clamp(x.mean() - x.std(correction=0), x.mean() + x.std(correction=0))
    x = torch.sigmoid(2 * (x[:, None] - q[:, :2])).mean(1)
    level = q.mean(1) + 1.0364333894937896 * (q.std(1) + 1e-5)
    torch.testing.assert_close(found, torch.log(torch.sigmoid(x - level)))


def test_only_the_first_references_count_but_lsc_takes_all():
    r, q = double([1.0, -1]), double([[0, 1, 9], [0, 2, -9]])
    par = RewardShaper(Shaping.named("par", max_references=2))(r, q)
    torch.testing.assert_close(par, RewardShaper("par")(r, q[:, :2]))
    lsc = RewardShaper(Shaping.named("lsc", max_references=2))(r, q)
    torch.testing.assert_close(lsc, RewardShaper("lsc")(r, q))
    assert (lsc - RewardShaper("lsc")(r, q[:, :2])).abs().min() > 0.1


def test_equal_rewards_are_one_half_of_their_range():
    assert RewardShaper("minmax")(tensor([3.0, 3.0])).tolist() == [0.5, 0.5]
    assert RewardShaper("meanstd")(tensor([3.0])).tolist() == [0.0]


@pytest.mark.parametrize("name", STREAM)
def test_evaluation_is_shaped_by_statistics_that_stand_still(name):
    shaper = RewardShaper(name)
    before = shaper.eval()(SECOND)  # nothing seen yet: its own statistics
    torch.testing.assert_close(before, RewardShaper(name)(SECOND))
    shaper.train()(FIRST)
    state = shaper.state_dict()
    outside = shaper.eval()(double([7.0]))
    assert shaper.state_dict() == state
    seen = Running.of(FIRST)
    expected = {
        "meanstd": (7 - seen.mean) / seen.std, "clip": 3.0, "minmax": 3.0,
    }[name]  # fmt: skip
    torch.testing.assert_close(outside, double([expected]))


@pytest.mark.parametrize("name", STREAM)
def test_state_goes_through_a_file_to_the_last_bit(name):
    generator = torch.Generator().manual_seed(0)
    stream = [torch.randn(7, generator=generator) for _ in range(6)]
    whole, begun = RewardShaper(name), RewardShaper(name)
    for part in stream[:3]:
        whole(part)
        begun(part)
    resumed = RewardShaper(name)
    resumed.load_state_dict(json.loads(json.dumps(begun.state_dict())))
    for part in stream[3:]:
        assert torch.equal(resumed(part), whole(part))
    assert resumed.state_dict() == whole.state_dict()


def test_statistics_of_shards_merge_into_those_of_the_stream():
    generator = torch.Generator().manual_seed(1)
    values = 1e3 + torch.randn(101, generator=generator, dtype=torch.float64)
    found = Running()
    for part in values.split([0, 1, 40, 7, 53]):
        found = found.merged(Running.of(part))
    whole = Running.of(values)
    assert found.count == 101
    assert (found.low, found.high) == (whole.low, whole.high)
    assert abs(found.mean - whole.mean) < 1e-12 * 1e3
    assert abs(found.std - whole.std) < 1e-12


def test_scores_of_a_bfloat16_model_keep_the_top_of_the_range_apart():
    r, q = tensor([6.3, 7.0], dtype=torch.bfloat16), torch.zeros(2, 1, dtype=torch.bfloat16)
    found = RewardShaper("par")(r, q)
    assert found.dtype == torch.float32
    assert found[0] < found[1] < 1
    quirky = RewardShaper(Shaping.named("par", quirks=REFERENCE_COMPATIBLE))(r, q)
    assert quirky.tolist() == [1.0, 1.0]


def test_quirks_of_the_reference_are_switches():
    plain = RewardShaper("minmax")
    quirky = RewardShaper(Shaping.named("minmax", quirks=Quirks(update_in_evaluation=True)))
    for shaper in (plain, quirky):
        shaper(FIRST)
        shaper.eval()(double([9.0]))
    assert plain.statistics("minmax").high == 3
    assert quirky.statistics("minmax").high == 9
    shared = Shaping(meanstd=True, clip=True, quirks=Quirks(shared=True))
    apart, together = RewardShaper(Shaping(meanstd=True, clip=True)), RewardShaper(shared)
    apart(FIRST)
    together(FIRST)
    assert apart.statistics("clip") == Running.of(double([-1, 1]))
    assert together.statistics("clip") == Running.of(FIRST).merged(Running.of(double([-1, 1])))
    bf16 = RewardShaper(Shaping.named("meanstd", quirks=Quirks(dtype=torch.bfloat16)))
    assert bf16(tensor([1.0, 3.0])).dtype == torch.bfloat16


def test_flags_are_those_of_the_reference():
    def of(*flags):
        parser = ArgumentParser()
        add_flags(parser)
        return from_flags(parser.parse_args(flags))

    penalty = {"length_penalty": (300, 0.01)}
    assert of() == Shaping(**penalty)
    assert of("--reward_sigmoid", "--reward_relative") == Shaping.named("par", **penalty)
    assert of("--reward_shaping", "par", "--no-reward_penalize_length") == RULES["par"]
    assert of("--reward_odin") == Shaping()
    assert of("--reward_relative", "--reward_odin") == Shaping()
    assert of("--reward_shaping", "tanh", "--reward_relative", "--reward_odin") == RULES["tanh"]
    for flag, field in (
        ("minmax", "minmax"), ("meanstd", "meanstd"), ("clipping", "clip"), ("lsc", "lsc"),
        ("tanh", "tanh"), ("fittedpoly", "polynomial"), ("centered", "centred"), ("sgfc", "sgfc"),
    ):  # fmt: skip
        assert of(f"--reward_{flag}", "--reward_odin") == Shaping(**{field: True})
    many = of(
        "--reward_ceil", "4", "--sigmoid_k", "2", "--reward_maxref", "5", "--reward_sigmoid",
        "--gen_valid_len", "100", "--len_penalty", "0.1",
    )  # fmt: skip
    assert many == Shaping(ceil=4, k=2, max_references=5, sigmoid=True, length_penalty=(100, 0.1))


def test_rows_without_references():
    ragged = [[0.0], []]
    with pytest.raises(ValueError, match="expected at least 1, got none in row 1"):
        RewardShaper("par")([1.0, 2.0], ragged)
    lenient = RewardShaper(Shaping.named("par", without_references="uncentred"))
    found = lenient(double([1.0, 2.0]), ragged)
    torch.testing.assert_close(found, torch.sigmoid(double([1.0, 2.0])))
    torch.testing.assert_close(lenient(double([2.0]), [[]]), torch.sigmoid(double([2.0])))
    centred = RewardShaper(Shaping.named("centred", without_references="uncentred"))
    assert centred([1.0, 2.0], ragged).tolist() == [1.0, 2.0]
    for name in ("sgfc", "quantile"):
        strict = RewardShaper(Shaping.named(name, without_references="uncentred"))
        with pytest.raises(ValueError, match="got none in row 1"):
            strict([1.0, 2.0], ragged)


def test_empty_batches():
    for name in RULES:
        assert RewardShaper(name)(torch.zeros(0), torch.zeros(0, 2)).shape == (0,)
        assert RewardShaper(name)([], []).shape == (0,)


@pytest.mark.parametrize(
    ("name", "rewards", "more", "message"),
    [
        ("par", [1, math.nan], {"references": [[0], [0]]}, "rewards: .* got nan in row 1"),
        ("minmax", [math.inf], {}, "rewards: expected finite scores, got inf in row 0"),
        ("par", [1, 2], {"references": [[0], [math.nan]]}, "references: .* got nan in row 1"),
        ("par", [1, 2], {}, "references: expected the scores of reference responses, got none"),
        ("par", [1, 2], {"references": torch.zeros(3, 1)}, r"expected \[2, M\]"),
        ("lsc", [1, 2], {"references": [[0, 1], [0]]}, "at least 2 for lsc, got 1 in row 1"),
        ("vanilla", [[1.0]], {}, r"rewards: expected \[B\], got \[1, 1\]"),
    ],
)
def test_errors_name_the_row(name, rewards, more, message):
    with pytest.raises(ValueError, match=message):
        RewardShaper(name)(tensor(rewards, dtype=torch.float32), **more)


def test_length_penalty_needs_lengths():
    shaper = RewardShaper(Shaping(length_penalty=(300, 0.01)))
    with pytest.raises(ValueError, match="lengths: expected the tokens"):
        shaper([1.0])
    with pytest.raises(ValueError, match=r"lengths: expected \[1\], got \[2\]"):
        shaper([1.0], lengths=[1, 2])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"k": 0}, "k: expected a slope above 0"),
        ({"level": 1}, "level: expected a quantile"),
        ({"max_references": 0}, "max_references: expected at least 1"),
        ({"without_references": "skip"}, "without_references: expected 'raise' or 'uncentred'"),
        ({"relative": True}, "relative: expected sigmoid, tanh or polynomial"),
    ],
)
def test_a_shaping_that_makes_no_sense(fields, message):
    with pytest.raises(ValueError, match=message):
        Shaping(**fields)


def test_unknown_names_and_states():
    with pytest.raises(ValueError, match="name: expected one of vanilla"):
        RewardShaper("relu")
    with pytest.raises(ValueError, match="rule: expected one of"):
        RewardShaper("par").statistics("minmax")
    with pytest.raises(ValueError, match=r"state: expected statistics of \['minmax'\]"):
        RewardShaper("minmax").load_state_dict(RewardShaper("clip").state_dict())
    with pytest.raises(ValueError, match="state: expected count, mean"):
        RewardShaper("clip").load_state_dict({"clip": {"count": 1}})
