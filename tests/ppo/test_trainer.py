"""The loop: scores rise, references stay, unscored responses are left out, settings act."""

import copy
import json

import pytest
import torch
from ppo_tiny import (
    END,
    PROMPTS,
    adapted,
    count_words,
    fixed,
    random_sequences,
    tiny_model,
    trainer,
)

from gemma_ext.nn.ppo import (
    AdapterCritic,
    AdapterOffReference,
    AdapterReward,
    FrozenReference,
    SharedCritic,
    ValueHead,
)
from gemma_ext.ppo import Generate, History, PPOConfig
from gemma_ext.ppo.setup import without_dropout

ONE_STEP = {"total_episodes": 8, "num_ppo_epochs": 1}


def varied(completion_ids, **columns):
    """Another number for nearly every response."""
    return [float(sum(ids) % 7) for ids in completion_ids]


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_scores_rise_and_the_reference_stays(tmp_path):
    policy = tiny_model()
    started = weights(policy)
    made = trainer(
        tmp_path,
        policy,
        changed={
            "total_episodes": 24 * 14,
            "per_device_train_batch_size": 24,
            "gradient_accumulation_steps": 1,
            "learning_rate": 2e-2,
            "lr_scheduler_type": "constant",
            "num_ppo_epochs": 2,
            "sample_prompts": 2,
        },
    )
    history = made.train()
    scores = history["objective/scores"]
    assert len(history) == 14
    assert sum(scores[-3:]) / 3 > 5 * sum(scores[:2]) / 2 + 1
    assert history["objective/kl"][0] == pytest.approx(0, abs=1e-5)
    assert history["objective/kl"][-1] > 0.5
    assert all(k3 >= 0 for k3 in history["objective/kl_k3"])
    assert max(history["sampler/difference"]) < 1e-4
    after = weights(made.reference.model)
    assert all(torch.equal(after[name], value) for name, value in started.items())
    ours = {p.data_ptr() for p in policy.parameters()}
    assert not ours & {p.data_ptr() for p in made.reference.model.parameters()}
    lines = [json.loads(x) for x in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert lines == history.lines
    assert [line["step"] for line in lines] == list(range(1, 15))
    assert lines[-1]["episode"] == 24 * 14
    again = History(tmp_path)
    again.read(3)
    assert again.lines == lines[:3]
    assert len(made.before) == len(made.samples()) == 2


def test_one_backbone_for_all_roles(tmp_path):
    policy = adapted(tiny_model(), "value", "reward")
    base = {n: p.clone() for n, p in policy.named_parameters() if "lora" not in n}
    judge = {n: p.clone() for n, p in policy.named_parameters() if ".reward." in n}
    head = ValueHead(24)
    with torch.no_grad():
        head.weight.normal_()
    made = trainer(
        tmp_path,
        policy,
        AdapterReward(policy, head),
        value=AdapterCritic(policy),
        changed={**ONE_STEP, "total_episodes": 16},
    )
    assert isinstance(made.reference, AdapterOffReference)
    acting = {n: p.clone() for n, p in policy.named_parameters() if "lora_B.policy" in n}
    critic = {n: p.clone() for n, p in policy.named_parameters() if "lora_B.value" in n}
    history = made.train()
    assert history["objective/kl"][0] != 0  # the policy's adapter was not fresh
    trained = {n.split(".")[-2] for n, p in policy.named_parameters() if p.requires_grad}
    assert trained == {"policy", "value"}
    now = dict(policy.named_parameters())
    assert all(torch.equal(now[n], p) for n, p in (base | judge).items())
    assert all(not torch.equal(now[n], p) for n, p in (acting | critic).items())


@pytest.mark.parametrize("advantage", ["rloo", "grpo", "remax", "reinforce++"])
def test_every_advantage_runs_on_the_same_machinery(tmp_path, advantage):
    pairs = advantage in ("rloo", "grpo")
    made = trainer(
        tmp_path,
        rewards=varied,
        changed={**ONE_STEP, "advantage": advantage, "num_generations": 2 if pairs else 1},
    )
    before = weights(made.policy)
    line = made.train_step()
    assert made.critic is None
    assert "loss/value_avg" not in line
    assert any(not torch.equal(before[n], v) for n, v in weights(made.policy).items())


def test_what_nobody_scores_takes_no_part(tmp_path):
    sequences = random_sequences(rows=8)

    def gradient(scores, rows):
        made = trainer(
            tmp_path,
            rewards=lambda completions, **columns: scores,
            sampler=fixed(rows),
            changed={
                **ONE_STEP,
                "per_device_train_batch_size": len(rows),
                "gradient_accumulation_steps": 1,
                "total_episodes": len(rows),
                "max_grad_norm": None,
            },
        )
        kept = []
        for optimiser in made.update.optimisers:
            optimiser.step = lambda o=optimiser: kept.extend(
                p.grad.clone() for g in o.param_groups for p in g["params"]
            )
        return kept, made.train_step()

    scores = [1.0, None, 0.5, None, 2.0, 0.0, None, 1.0]
    known = [row for row, score in enumerate(scores) if score is not None]
    some, line = gradient(scores, sequences)
    only, _ = gradient([scores[row] for row in known], sequences[torch.tensor(known)])
    for a, b in zip(some, only, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    assert line["objective/scores"] == pytest.approx(4.5 / 5)


def test_penalty_for_a_missing_end_and_rate_of_ends(tmp_path):
    sequences = random_sequences(rows=8, response=4)
    made = trainer(
        tmp_path,
        rewards=lambda completions, **columns: [1.0] * 8,
        sampler=fixed(sequences),
        changed={**ONE_STEP, "missing_eos_penalty": 3.0},
    )
    ended = [END in row.tolist() for row in sequences.responses]
    scores, _, _ = made.score([0, 1, 2, 3, 4, 0, 1, 2], sequences)
    assert scores.tolist() == [1.0 if end else -2.0 for end in ended]
    line = made.train_step()
    assert line["response/eos_rate"] == pytest.approx(sum(ended) / 8)
    assert line["val/num_eos_tokens"] == sum(ended)
    assert line["response/length"] == pytest.approx(sequences.lengths.float().mean().item())


def test_control_steers_beta_and_callbacks_see_every_step(tmp_path):
    seen = []
    made = trainer(
        tmp_path,
        changed={"total_episodes": 16, "kl_target": 0.5, "kl_horizon": 80, "num_ppo_epochs": 1},
        callbacks=[lambda trainer, step, line: seen.append((step, line["kl_coef"]))],
    )
    made.train()
    # no KL at first: an error of -0.2, eight responses of a horizon of 80
    assert seen == [(1, 0.02), (2, pytest.approx(0.02 * (1 - 0.2 * 8 / 80)))]


def test_responses_depend_on_prompt_and_seed_alone():
    policy = tiny_model()
    prompts, seeds = [[2, 5, 6], [2, 7], [2, 9, 9, 9, 9], [2, 3]], [4, 3, 2, 1]

    def drawn(size, order=(0, 1, 2, 3), **changed):
        settings = PPOConfig(
            response_length=6, temperature=0.8, local_rollout_forward_batch_size=size, **changed
        )
        sampler = Generate(settings, [END], 0)
        return sampler(policy, [prompts[i] for i in order], [seeds[i] for i in order])

    whole = drawn(4)
    apart = drawn(1, order=(2, 0, 3, 1))
    for place, row in enumerate((2, 0, 3, 1)):
        mine = apart.sequences.responses[place][apart.sequences.response_mask[place]]
        theirs = whole.sequences.responses[row][whole.sequences.response_mask[row]]
        assert torch.equal(mine, theirs)
    logprobs = FrozenReference(copy.deepcopy(policy)).logprobs(whole.sequences, 0.8)
    torch.testing.assert_close(whole.logprobs, logprobs, atol=1e-5, rtol=0)
    best = Generate(PPOConfig(response_length=6), [END], 0)(policy, prompts, seeds, greedy=True)
    assert torch.equal(drawn(4, top_k=1).sequences.ids, best.sequences.ids)
    assert torch.equal(drawn(4, top_p=1e-6).sequences.ids, best.sequences.ids)


def test_checkpointing_of_gradients_changes_no_step(tmp_path):
    def stepped(folder, **changed):
        policy = tiny_model(attention_dropout=0.3)
        made = trainer(folder, policy, changed={**ONE_STEP, **changed})
        made.train_step()
        return made

    plain = stepped(tmp_path / "a")
    saving = stepped(tmp_path / "b", gradient_checkpointing=True)
    assert saving.policy.model.gradient_checkpointing
    assert saving.policy.model.layers[0].self_attn.attention_dropout == 0.0
    for a, b in zip(plain.policy.parameters(), saving.policy.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="gradient_checkpointing: expected False for Linear"):
        without_dropout(PPOConfig(gradient_checkpointing=True), torch.nn.Linear(1, 1))


def test_products_in_bfloat16(tmp_path):
    made = trainer(tmp_path, changed={**ONE_STEP, "bf16": True, "kl_estimator": "full"})
    line = made.train_step()
    assert line["objective/kl"] == pytest.approx(0, abs=1e-4)
    assert line["val/ratio"] == pytest.approx(1, abs=1e-3)
    assert all(p.dtype == torch.float32 for p in made.policy.parameters())


def test_a_policy_that_accelerate_prepared(tmp_path):
    """Its mixed precision casts in the forward, not in the loop around it."""
    accelerate = pytest.importorskip("accelerate")
    policy = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare(tiny_model())
    made = trainer(tmp_path, policy, changed={**ONE_STEP, "total_episodes": 16})
    line = made.train_step()
    assert line["objective/kl"] == pytest.approx(0, abs=1e-4)
    # states of other batches round to bfloat16 elsewhere: some 2^-8 of logits up to 3
    assert line["val/ratio"] == pytest.approx(1, abs=0.03)
    # the copy of it that is the reference has a forward of its own
    assert made.train_step()["objective/kl_k3"] > 1e-3


def test_end_tokens(tmp_path):
    def ends(**changed):
        return trainer(tmp_path, changed=changed).ends

    assert ends() == [END]
    assert ends(stop_token="eos") == [END]
    assert ends(stop_token="w9") == [9]
    assert ends(stop_token_id=17) == [17]
    with pytest.raises(ValueError, match="stop_token: expected one token, got 2 of 'w9 w8'"):
        ends(stop_token="w9 w8")
    with pytest.raises(ValueError, match="expected None beside a stop_token"):
        ends(stop_token="w9", stop_token_id=9)


def test_mistakes(tmp_path):
    with pytest.raises(ValueError, match="prompts: expected some, got None"):
        trainer(tmp_path, prompts=None)
    made = trainer(tmp_path, changed=ONE_STEP)
    made.train()
    other = trainer(tmp_path, changed={**ONE_STEP, "kl_coef": 0.5})
    with pytest.raises(ValueError, match=r"is of another run \(kl_coef differ\)"):
        other.train()
    assert len(trainer(tmp_path, changed=ONE_STEP).train()) == 1


def test_plan_counts_shared_weights_once(tmp_path):
    policy = tiny_model()
    bytes_of = sum(p.numel() * 4 for p in policy.parameters())
    shared = trainer(tmp_path, policy, reference=FrozenReference(tiny_model(1)))
    critic = SharedCritic(24)
    head = sum(p.numel() * 4 for p in critic.parameters())
    found = shared.plan()
    assert found.weights == 2 * bytes_of + head
    assert found.peak == found.weights + max(found.rollout, found.scoring, found.update)
    assert found.update > 3 * bytes_of
    assert found.line().startswith("memory: weights")
    light = trainer(tmp_path, adapted(tiny_model()))
    assert light.plan().weights < 1.2 * bytes_of + head
    assert light.plan().update < found.update
    assert count_words("w3")(completions=["w3 w3", "w4"]) == [2.0, 0.0]
    assert len(PROMPTS) == len(shared.prompts)
