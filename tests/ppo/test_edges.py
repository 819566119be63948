"""Edges of a run: infinite scores, other data, adapters that peft froze, leftovers."""

from __future__ import annotations

import asyncio
import json
import math
import os
import sys
import types

import pytest
import torch
from ppo_tiny import (
    PROMPTS,
    adapted,
    count_words,
    fixed,
    random_sequences,
    tiny_model,
    trainer,
)

from gemma_ext import files
from gemma_ext.nn.ppo import AdapterCritic, AdapterOffReference, AdaptiveKL, full_kl, value_loss
from gemma_ext.nn.ppo.adapters import adapter_parameters
from gemma_ext.ppo import History, PPOConfig, Rewards, page
from gemma_ext.ppo.command import join_ranks
from gemma_ext.ppo.files import write_samples


@pytest.mark.parametrize("advantage", ["gae", "rloo", "grpo", "remax", "reinforce++"])
def test_an_infinite_score_is_none(advantage, tmp_path):
    """As log(0) is: it must not reach the baselines of its neighbours."""

    def scores(worst):
        def reward(completions, **columns):
            return [worst if i % 4 == 1 else float(i) for i in range(len(completions))]

        return reward

    changed = {"total_episodes": 8, "advantage": advantage, "num_generations": 4}
    found = []
    for worst in (float("-inf"), None):
        made = trainer(tmp_path / str(worst), rewards=scores(worst), changed=changed)
        made.train()
        found.append([p.clone() for p in made.policy.parameters()])
    for infinite, none in zip(*found, strict=True):
        assert torch.equal(infinite, none)
        assert bool(none.isfinite().all())


def test_full_kl_has_a_gradient_beside_impossible_tokens():
    logits = torch.tensor([[0.3, 0.1, float("-inf")]], requires_grad=True)
    full_kl(logits.log_softmax(-1), torch.tensor([[0.5, 0.25, 0.25]]).log()).sum().backward()
    two = torch.tensor([[0.3, 0.1]], requires_grad=True)
    full_kl(two.log_softmax(-1), torch.tensor([[0.5, 0.25]]).log()).sum().backward()
    torch.testing.assert_close(logits.grad, torch.cat([two.grad, torch.zeros(1, 1)], 1))


def test_a_value_inside_the_clip_is_not_counted_as_clipped():
    torch.manual_seed(0)
    old = 0.05 * torch.randn(20000)
    values = old + 0.38 * torch.rand(20000) - 0.19
    inside = (values > old - 0.2) & (values < old + 0.2)
    assert not (value_loss(values, old, torch.randn(20000)).clipped & inside).any()


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"prompts": [*PROMPTS[:-1], "w13"]}, "prompts"),
        ({"rewards": Rewards(count_words(), [2.0])}, "weights of the rewards"),
    ],
)
def test_other_data_of_the_same_size_is_another_run(other, named, tmp_path):
    trainer(tmp_path, changed={"total_episodes": 8}).train()
    with pytest.raises(ValueError, match=rf"is of another run \({named} differ\)"):
        trainer(tmp_path, changed={"total_episodes": 8}, **other).train()


class Learning:
    """With `train` and `eval` that take no argument."""

    def __init__(self):
        self.modes, self.learns = [], True

    def __call__(self, completions, **columns):
        self.modes.append(self.learns)
        return [0.0] * len(completions)

    def train(self):
        self.learns = True

    def eval(self):
        self.learns = False

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def test_samples_amid_training_do_not_stop_a_shaper(tmp_path):
    reward = Learning()

    def look(made, step, line):
        made.samples()

    changed = {"total_episodes": 16, "sample_prompts": 1}
    trainer(tmp_path, rewards=reward, callbacks=[look], changed=changed).train()
    # the samples before; then two steps, each with its look
    assert reward.modes == [False, True, False, True, False]


def test_an_async_reward_where_a_loop_is_running(tmp_path):
    async def reward(completions, **columns):
        await asyncio.sleep(0)
        return [1.0] * len(completions)

    async def notebook():
        return trainer(tmp_path, rewards=reward, changed={"total_episodes": 8}).train()

    assert asyncio.run(notebook())["objective/scores"] == [1.0]


def test_half_written_files_of_a_killed_run_go(tmp_path):
    for name in ("checkpoint-7-0.pt", "history.jsonl", "checkpoint.json"):
        tmp_path.joinpath(f"{name}.1234.tmp").write_bytes(b"half")
    tmp_path.joinpath("notes.tmp").write_text("somebody's own")
    tmp_path.joinpath("checkpoint-7-0.pt").write_bytes(b"of a step that was not completed")
    trainer(tmp_path, changed={"total_episodes": 8}).train()
    assert [p.name for p in tmp_path.glob("checkpoint-*.pt*")] == ["checkpoint-1-0.pt"]
    assert [p.name for p in tmp_path.glob("*.tmp")] == ["notes.tmp"]


def test_an_adapter_that_peft_froze_is_trained_as_a_critic(tmp_path):
    peft = pytest.importorskip("peft")
    policy = adapted(tiny_model())
    policy.add_adapter("value", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    before = [p.clone() for p in adapter_parameters(policy, "value")]
    made = trainer(tmp_path, policy, value=AdapterCritic(policy), changed={"total_episodes": 16})
    made.train()
    after = adapter_parameters(policy, "value")
    assert all(p.requires_grad for p in after)
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_module_of_the_models_own_is_no_adapter():
    peft = pytest.importorskip("peft")
    made = peft.get_peft_model(
        tiny_model(), peft.LoraConfig(r=2, target_modules=["v_proj"]), adapter_name="self_attn"
    )
    own = adapter_parameters(made, "self_attn")
    assert len(own) == 4  # A and B of two layers


def test_a_reference_without_adapters_may_not_move_with_the_base():
    peft = pytest.importorskip("peft")
    policy = peft.get_peft_model(
        tiny_model(), peft.LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="policy"
    )
    AdapterOffReference(policy)
    next(p for n, p in policy.named_parameters() if "norm" in n).requires_grad_(True)
    with pytest.raises(ValueError, match=r"policy: expected only adapters to train .* got .*norm"):
        AdapterOffReference(policy)


def test_every_rank_has_a_card_of_its_own(monkeypatch):
    done = {}
    monkeypatch.setattr(os, "environ", {"WORLD_SIZE": "4", "LOCAL_RANK": "3"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda place: done.update(card=place))
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda kind: done.update(backend=kind)
    )
    join_ranks()
    assert done == {"card": 3, "backend": "cpu:gloo,cuda:nccl"}


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ({"gamma": 1.1}, r"gamma: expected a number in \[0, 1\], got 1.1"),
        ({"lam": -0.1}, r"lam: expected a number in \[0, 1\], got -0.1"),
        ({"dual_clip": 0.5}, "dual_clip: expected None or above 1, got 0.5"),
        ({"scale_rewards": "row"}, "scale_rewards: expected one of group, batch, none, got 'row'"),
        (
            {"kl_target": 6.0, "kl_horizon": 4},
            "kl_horizon: expected at least the 8 responses of a batch, got 4",
        ),
    ],
)
def test_settings_are_refused_before_a_rollout(setting, told):
    with pytest.raises(ValueError, match=told):
        PPOConfig(**setting)


def test_beta_does_not_change_its_sign():
    control = AdaptiveKL(0.1, target=6.0, horizon=10)
    assert control.update(0.0, 200) == 0.0


def test_a_cap_of_importance_needs_a_sampler_that_tells(tmp_path):
    def silent(policy, prompts, seeds, **options):
        return fixed(random_sequences(rows=len(prompts)))(policy, prompts, seeds)

    made = trainer(tmp_path, sampler=silent, changed={"importance_cap": 2.0})
    with pytest.raises(ValueError, match="importance_cap: expected a sampler that gives"):
        made.train_step()


def test_the_file_of_a_history_is_json(tmp_path):
    """Nobody scores, so that means are of nothing."""
    made = trainer(
        tmp_path,
        rewards=lambda completions, **columns: [None] * len(completions),
        changed={"total_episodes": 8, "sample_prompts": 1},
    )
    history = made.train()
    assert math.isnan(history["objective/scores"][0])

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    text = (tmp_path / "history.jsonl").read_text()
    (line,) = [json.loads(line, parse_constant=refuse) for line in text.splitlines()]
    assert line["objective/scores"] is None
    assert line["step"] == 1
    again = History(tmp_path)
    again.read(1)
    assert math.isnan(again["objective/scores"][0])
    again.write()
    assert (tmp_path / "history.jsonl").read_text() == text
    write_samples(tmp_path / "samples.json", made.before, made.samples())
    kept = json.loads((tmp_path / "samples.json").read_text(), parse_constant=refuse)
    assert kept["before"][0]["score"] is None


def test_live_metrics_are_the_lines_and_go_on_behind_the_checkpoint(tmp_path, monkeypatch):
    told = []

    class Writer:
        """Of torch's signature."""

        def __init__(self, log_dir, purge_step):
            assert log_dir == str(tmp_path / "tensorboard")
            told.append({"purged": purge_step})

        def add_scalar(self, tag, scalar_value, global_step):
            told[-1].setdefault(global_step, {})[tag] = scalar_value

        def close(self):
            told[-1]["closed"] = True

    def stop(made, step, line):
        if step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("gemma_ext.ppo.history.find_spec", lambda name: name)
    monkeypatch.setitem(
        sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer)
    )
    changed = {"total_episodes": 24, "num_ppo_epochs": 1, "save_steps": 1}
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, changed=changed, callbacks=[stop]).train()
    history = trainer(tmp_path, changed=changed).train()
    first, second = told
    assert first["purged"] == 1
    assert second["purged"] == 2
    assert second["closed"]
    lines = {1: first[1], 2: second[2], 3: second[3]}
    assert list(lines.values()) == list(history)


def test_a_greedy_baseline_is_no_sample_to_learn_from(tmp_path):
    reward = Learning()
    changed = {"total_episodes": 8, "advantage": "remax"}
    trainer(tmp_path, rewards=reward, changed=changed).train()
    assert reward.modes == [True, False]


def test_what_rewards_tell_of_responses_is_shown_beside_them(tmp_path):
    def reward(completions, log_extra, **columns):
        log_extra("words", [len(text.split()) for text in completions])
        log_extra("verdict", [torch.tensor(1.5)] * len(completions))
        return [1.0] * len(completions)

    made = trainer(tmp_path, rewards=reward, changed={"total_episodes": 8, "sample_prompts": 2})
    made.train()
    samples = made.samples()
    assert [one["words"] for one in samples] == [len(one["completion"].split()) for one in samples]
    assert samples[0]["verdict"] == "tensor(1.5000)"
    page.write(
        tmp_path / "page.html", made.history.lines, title="t", facts={},
        before=made.before, after=samples,
    )  # fmt: skip
    assert f"words: {samples[0]['words']}" in (tmp_path / "page.html").read_text()


def test_what_replaces_a_file_is_on_the_disk_first(tmp_path, monkeypatch):
    done = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (done.append("sync"), sync(handle)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("replace"), replace(a, b)))
    files.write_json(tmp_path / "a.json", {})
    assert done == ["sync", "replace", "sync"]
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_metric_of_a_reward_takes_no_name_of_the_loop(tmp_path):
    def reward(completions, log_metric, **columns):
        for name in ("step", "objective/kl", "mine"):
            log_metric(name, 1e6)
        return [1.0] * len(completions)

    (line,) = trainer(tmp_path, rewards=reward, changed={"total_episodes": 8}).train()
    assert (line["step"], line["mine"]) == (1, 1e6)
    assert line["objective/kl"] == pytest.approx(0, abs=1e-4)
