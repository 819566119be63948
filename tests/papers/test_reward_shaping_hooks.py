"""Shaped rewards as trainers call them, and what group normalisation leaves of them."""

from __future__ import annotations

import asyncio
import inspect
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn, tensor

from gemma_ext.papers.reward_shaping import (
    RULES,
    Effect,
    Ensemble,
    HackingMonitor,
    RewardShaper,
    Shaping,
    effect,
    for_openrlhf,
    for_verl,
    load_state,
    save_state,
    shape,
    shaping_callback,
    warn_of_cancellation,
)


def length(prompts, completions, completion_ids=None, **columns):
    """Characters; no opinion of an empty one."""
    return [float(len(text)) if text else None for text in completions]


def call(reward, completions, **columns):
    ids = [[1] * len(text) for text in completions]
    return reward(prompts=["p"] * len(completions), completions=completions, completion_ids=ids,
                  **columns)  # fmt: skip


def test_a_shaped_reward_reads_its_column_and_logs_both_means():
    logged = {}
    reward = shape(length, "par")
    found = call(
        reward, ["ab", "", "abc"], ref_rewards=[[1, 2], [0], [3]], log_metric=logged.__setitem__,
        trainer_state=None,
    )  # fmt: skip
    expected = [(1 / (1 + math.exp(-1)) + 0.5) / 2, None, 0.5]
    assert found[1] is None
    assert [found[0], found[2]] == pytest.approx([expected[0], expected[2]])
    assert reward.__name__ == "length"
    assert logged == {
        "length/raw": 2.5, "length/shaped": pytest.approx((expected[0] + 0.5) / 2),
    }  # fmt: skip


def test_a_reward_is_asked_by_keywords_as_trl_does():
    """Most of trl's own functions do not name the prompts, or name the ids alone."""

    def words(completions, **kwargs):
        return [float(len(kwargs["prompts"][0])) for _ in completions]

    def tokens(completion_ids, **kwargs):
        return [float(len(ids)) for ids in completion_ids]

    async def later(completions, **kwargs):
        return words(completions, **kwargs)

    assert call(shape(words, "vanilla"), ["a", "b"]) == [1.0, 1.0]
    assert call(shape(tokens, "vanilla"), ["ab", "b"]) == [2.0, 1.0]
    assert asyncio.run(call(shape(later, "vanilla"), ["a"])) == [1.0]
    few = shape(lambda completions: [2.0, 3.0], "vanilla")
    assert call(few, ["a", "b"], x=[1, 2]) == [2.0, 3.0]
    with pytest.raises(ValueError, match="expected the prompts to have the column y"):
        call(shape(lambda y: y, "vanilla"), ["a"], x=[1])
    both = shape(Ensemble([tokens, words]), "vanilla")
    assert call(both, ["abc", "b"]) == [2.0, 1.0]


def test_only_the_terminal_score_is_touched_and_several_rewards_have_their_own_shapers():
    one, two = shape(length, "minmax", name="a"), shape(length, "par", column="other", name="b")
    assert call(one, ["a", "abc"]) == [0.0, 1.0]
    assert call(two, ["a", "abc"], other=[[1], [3]]) == [0.5, 0.5]


def test_the_length_penalty_counts_tokens():
    reward = shape(length, Shaping(length_penalty=(2, 0.5)))
    assert call(reward, ["ab", "abcd"]) == [2.0, 3.0]


def test_a_missing_column_is_named():
    with pytest.raises(ValueError, match=r"ref_rewards: expected a column .* got columns \['x'\]"):
        call(shape(length, "par"), ["a"], x=[1])


def test_a_module_is_no_function():
    with pytest.raises(TypeError, match="got Linear; a model becomes one by RewardModel"):
        shape(nn.Linear(1, 1), "par")


def test_async_rewards_stay_async():
    async def slow(prompts, completions, completion_ids=None, **columns):
        await asyncio.sleep(0)
        return tensor([1.0, 2.0])

    reward = shape(slow, "sigmoid")
    assert inspect.iscoroutinefunction(reward.__call__)
    found = asyncio.run(call(reward, ["a", "b"]))
    assert found == pytest.approx(torch.sigmoid(tensor([1.0, 2.0])).tolist())


def test_evaluation_follows_the_model_or_the_call():
    model = nn.Linear(1, 1)
    reward = shape(length, "minmax").follow(model)
    call(reward, ["a", "abc"])
    model.eval()
    assert call(reward, ["abcdefg"]) == [3.0]
    model.train()
    assert call(reward, ["abcdefg"]) == [1.0]
    apart = shape(length, "minmax")
    call(apart, ["a", "abc"])
    assert call(apart.eval(), ["abcde"]) == [2.0]
    assert apart.train().shaper.training


def test_states_are_kept_with_checkpoints(tmp_path):
    monitor = HackingMonitor()
    reward = shape(length, "minmax", monitor=monitor)
    call(reward, ["a", "abc"])
    args = SimpleNamespace(output_dir=str(tmp_path))
    state = SimpleNamespace(global_step=3, is_world_process_zero=True)
    shaping_callback([reward]).on_save(args, state, None)
    fresh = shape(length, "minmax", monitor=HackingMonitor())
    begun = shaping_callback([fresh], resume=tmp_path / "checkpoint-3")
    model = nn.Linear(1, 1).eval()
    begun.on_train_begin(args, state, None, model=model)
    assert fresh.state_dict() == reward.state_dict()
    assert call(fresh, ["abcde"]) == [2.0]  # frozen with the model
    other = shape(length, "minmax", name="other")
    with pytest.raises(ValueError, match="expected 'other' in it, got"):
        load_state(tmp_path / "checkpoint-3", [other])
    assert save_state(tmp_path / "new", [other]).exists()


def test_the_state_of_an_inner_reward_is_part_of_it():
    class Counting:
        seen = 0

        def __call__(self, prompts, completions, completion_ids=None, **columns):
            self.seen += len(completions)
            return [0.0] * len(completions)

        def state_dict(self):
            return {"seen": self.seen}

        def load_state_dict(self, state):
            self.seen = state["seen"]

    reward = shape(Counting(), "vanilla")
    call(reward, ["a", "b"])
    fresh = shape(Counting(), "vanilla")
    fresh.load_state_dict(json.loads(json.dumps(reward.state_dict())))
    assert fresh.reward.seen == 2
    assert fresh.__name__ == "Counting"


def test_verl():
    def base(data_source, solution_str, ground_truth, extra_info=None):
        return {"score": len(solution_str), "more": 1}

    score = for_verl(base, "par")
    found = score(
        data_source="gsm", solution_str="abc", ground_truth=None,
        extra_info={"ref_rewards": np.array([3.0, 3.0]), "num_turns": None},
    )  # fmt: skip
    # what else the reward tells, as "acc", goes on to verl's metrics
    assert found == {"score": 0.5, "raw": 3.0, "more": 1}
    penalised = for_verl(lambda *a: 5.0, Shaping(length_penalty=(1, 1.0)), lengths=len)
    assert penalised("gsm", "abc", None)["score"] == 3.0
    with pytest.raises(ValueError, match=r"extra_info: expected 'ref_rewards' in it, got \[\]"):
        score("gsm", "abc", None)
    # as tables have a row without the entry
    with pytest.raises(ValueError, match=r"extra_info: expected 'ref_rewards' in it, got"):
        score("gsm", "abc", None, {"ref_rewards": None})
    with pytest.raises(ValueError, match="no running statistics for verl"):
        for_verl(base, "minmax")


def test_verl_waits_for_an_async_reward():
    async def base(data_source, solution_str, ground_truth, extra_info, reward_router_address):
        await asyncio.sleep(0)
        assert reward_router_address == "there"
        return len(solution_str)

    score = for_verl(base, "par")
    assert inspect.iscoroutinefunction(score)
    given = {"data_source": "gsm", "solution_str": "ab", "ground_truth": None}
    found = asyncio.run(
        score(**given, extra_info={"ref_rewards": [2]}, reward_router_address="there")
    )
    assert found == {"score": 0.5, "raw": 2.0}


def test_verl_by_the_batch():
    def base(data_sources, solution_strs, ground_truths, extra_infos, factor=1):
        return [{"score": factor * len(text), "acc": False} for text in solution_strs]

    scores = for_verl(base, "par", batch=True)
    given = {
        "data_sources": ["gsm"] * 2, "solution_strs": ["ab", "abc"], "ground_truths": [None] * 2,
        "extra_infos": np.array([{"ref_rewards": [2]}, {"ref_rewards": [3, 3]}], dtype=object),
    }  # fmt: skip
    assert scores(**given) == [
        {"score": 0.5, "raw": 2.0, "acc": False}, {"score": 0.5, "raw": 3.0, "acc": False},
    ]  # fmt: skip
    assert [one["raw"] for one in scores(**given, factor=2)] == [4.0, 6.0]
    short = for_verl(lambda *a: [1.0], "vanilla", batch=True)
    with pytest.raises(ValueError, match="reward: expected 2 scores, got 1"):
        short(**given)

    async def late(*given):
        return []

    with pytest.raises(TypeError, match="expected a plain function with batch, got an async one"):
        for_verl(late, "vanilla", batch=True)


def test_openrlhf():
    def base(queries, prompts, labels):
        return [float(len(q) - len(p)) for q, p in zip(queries, prompts, strict=True)]

    reward = for_openrlhf(base, "par")
    labels = [{"ref_rewards": [1]}, json.dumps({"ref_rewards": [3], "answer": "4"}), [2, 2]]
    found = reward(["pa", "pabc", "pab"], ["p"] * 3, labels)
    assert found["rewards"].tolist() == [0.5] * 3
    assert found["extra_logs"]["raw_reward"].tolist() == [1, 3, 2]
    assert set(found) == {"rewards", "scores", "extra_logs"}
    for label in ("not json", "4", None):
        with pytest.raises(ValueError, match="labels: expected 'ref_rewards' in it"):
            reward(["pa"], ["p"], [label])
    penalised = for_openrlhf(base, Shaping(length_penalty=(1, 1.0)), lengths=len)
    assert penalised(["pabc"], ["p"], [None])["rewards"].tolist() == [1.0]
    # a prompt that was cut: its tokens are not the response's
    with pytest.raises(ValueError, match="queries: expected a text that begins with its prompt"):
        penalised(["mptabc"], ["prompt"], [None])
    with pytest.raises(ValueError, match="no running statistics for OpenRLHF"):
        for_openrlhf(base, RewardShaper("clip"))


def test_openrlhf_shapes_a_function_of_its_own():
    def base(queries, prompts, labels, **more):
        right = tensor([1.0])
        return {"rewards": 3 * right, "scores": right, "extra_logs": {"accuracy": right}}

    found = for_openrlhf(base, "par")(["pa"], ["p"], [[3.0]])
    assert found["rewards"].tolist() == [0.5]
    assert found["scores"].tolist() == [1.0]
    assert {k: float(v) for k, v in found["extra_logs"].items()} == {
        "accuracy": 1.0, "raw_reward": 3.0,
    }  # fmt: skip
    assert for_openrlhf(lambda *a: {"rewards": [3.0]}, "par")(["pa"], ["p"], [[3.0]])[
        "scores"
    ].tolist() == [0.5]


def advantages(rewards, eps=0.0):
    groups = rewards.view(4, -1)
    centred = groups - groups.mean(1, keepdim=True)
    return centred / (groups.std(1, keepdim=True) + eps)


@pytest.mark.parametrize("name", RULES)
def test_what_a_group_undoes_is_what_the_table_says(name):
    generator = torch.Generator().manual_seed(0)
    r = 2 * torch.randn(32, generator=generator, dtype=torch.float64)
    q = torch.randn(4, 5, generator=generator, dtype=torch.float64).repeat_interleave(8, 0)
    changes = {"ceil": 1.0} if name == "ceil" else {}
    shaping = Shaping.named(name, **changes)
    x = RewardShaper(shaping)(r, q)
    normal = (advantages(x) - advantages(r)).abs().max()
    bare = (x - r).view(4, 8)
    offset = (bare - bare.mean(1, keepdim=True)).abs().max()
    found = {mode: effect(shaping, mode) for mode in ("group", "none")}
    assert (normal < 1e-6) == (found["group"] is Effect.NONE)
    assert (offset < 1e-6) == (found["none"] is Effect.NONE)
    if found["none"] is Effect.SCALE:
        ratio = advantages(x) * x.view(4, -1).std(1, keepdim=True)
        ratio = ratio / (advantages(r) * r.view(4, -1).std(1, keepdim=True))
        torch.testing.assert_close(ratio, ratio[0, 0].expand_as(ratio))
    assert effect(shaping, "batch") is found["group"]


def test_trl_keeps_a_trace_of_an_affine_rule_through_its_epsilon():
    r = torch.randn(32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = RewardShaper("minmax")(r)
    gap = (advantages(x, 1e-4) - advantages(r, 1e-4)).abs().max()
    assert 1e-6 < gap < 1e-2


def test_next_to_another_reward_a_factor_is_a_weight():
    assert effect(RULES["minmax"], "group", alone=False) is Effect.SCALE
    assert effect(RULES["centred"], "group", alone=False) is Effect.NONE
    with pytest.raises(ValueError, match="scale_rewards: expected one of"):
        effect(RULES["par"], "prompt")


def test_warnings_of_cancellation():
    def trainer(scale, *rewards):
        return SimpleNamespace(
            args=SimpleNamespace(scale_rewards=scale), reward_funcs=list(rewards)
        )

    affine, par = shape(length, "meanstd", name="m"), shape(length, "par", name="p")
    with pytest.warns(UserWarning, match="m: its shaping is affine"):
        assert len(warn_of_cancellation(trainer("group", affine))) == 1
    with pytest.warns(UserWarning, match="p: scale_rewards='group' divides"):
        warn_of_cancellation(trainer(True, par))
    assert warn_of_cancellation(trainer("none", par, affine)) == []
    assert warn_of_cancellation(trainer(False, par)) == []
    assert warn_of_cancellation(trainer("group", shape(length, "vanilla"), length)) == []
    rloo = SimpleNamespace(args=SimpleNamespace(), reward_funcs=[par])
    assert warn_of_cancellation(rloo) == []


@pytest.mark.slow
def test_grpo_of_trl_trains_with_it(tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    import tiny_gemma
    import transformers

    from gemma_ext import pocket

    texts = [document.text for document in pocket.documents(30_000)]
    folder = tiny_gemma.base(tmp_path / "model", texts)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    rows = [{"prompt": text[:20], "ref_rewards": [3.0, 8.0]} for text in texts[:8]]
    reward = shape(length, "par", monitor=HackingMonitor())
    arguments = trl.GRPOConfig(
        output_dir=str(tmp_path / "out"), per_device_train_batch_size=4, num_generations=2,
        max_completion_length=8, max_steps=2, save_steps=2, logging_steps=1, report_to=[],
        use_cpu=True, bf16=False, scale_rewards="none",
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        model, reward, arguments, datasets.Dataset.from_list(rows), processing_class=tokenizer,
        callbacks=[shaping_callback([reward])],
    )  # fmt: skip
    assert warn_of_cancellation(trainer) == []
    trainer.train()
    logs = [row for row in trainer.state.log_history if "rewards/length/mean" in row]
    assert all(0 < row["rewards/length/mean"] < 1 for row in logs)
    assert all("length/raw" in row and "length/saturated" in row for row in logs)
    assert (tmp_path / "out" / "checkpoint-2" / "reward_shaping.json").exists()
    assert len(reward.monitor.history) == 2


def test_a_score_that_is_no_number_names_its_row():
    reward = shape(lambda prompts, completions, **columns: [None, 1.0, math.nan], "sigmoid")
    with pytest.raises(ValueError, match="expected finite scores, got nan in row 2"):
        call(reward, ["", "a", "b"])
