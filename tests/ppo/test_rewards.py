"""Rewards: trl's signature, several with weights, models, states."""

import json
import sys

import pytest
import torch
from ppo_tiny import D, random_sequences, tiny_model, tokenizer, trainer

from gemma_ext.papers.reward_shaping import HackingMonitor, shape
from gemma_ext.ppo import Responses, Rewards, load_reward


def responses(**columns):
    sequences = random_sequences(rows=3)
    ids = [
        row[mask].tolist()
        for row, mask in zip(sequences.responses, sequences.response_mask, strict=True)
    ]
    texts = tokenizer().batch_decode(ids, skip_special_tokens=True)
    return Responses(["w3 w4", "w5", "w6"], texts, ids, columns, sequences, "state")


def test_function_gets_what_trl_hands_it():
    seen = {}

    def reward(prompts, completions, completion_ids, **rest):
        seen.update(prompts=prompts, completions=completions, ids=completion_ids, **rest)
        rest["log_metric"]("mine", 3)
        rest["log_extra"]("column", ["a", "b", "c"])
        return torch.tensor([1.0, 2.0, 3.0])

    given = responses(ref_rewards=[[1], [2], [3]])
    total, each = Rewards(reward)(given)
    assert total.tolist() == [1, 2, 3]
    assert each["reward"].tolist() == [1, 2, 3]
    assert seen["prompts"] == ["w3 w4", "w5", "w6"]
    assert seen["ids"] == given.completion_ids
    assert seen["ref_rewards"] == [[1], [2], [3]]
    assert seen["trainer_state"] == "state"
    assert given.metrics == {"mine": [3.0]}
    assert given.extra == {"column": ["a", "b", "c"]}


def test_several_with_weights_opinions_and_names():
    def first(completions, **columns):
        return [1, None, None]

    async def second(completion_ids):
        return [10.0, 20.0, None]

    total, each = Rewards([first, second, first], [2.0, 0.5, 1.0])(responses())
    assert total[:2].tolist() == [2 + 5 + 1, 10]
    assert bool(total[2].isnan())
    assert list(each) == ["first", "second", "first#2"]


def test_module_reads_whole_conversations():
    model = tiny_model(kind="Gemma2ForSequenceClassification", num_labels=1)
    given, words = responses(), tokenizer()
    total, _ = Rewards(model, tokenizers=words)(given)
    for row in range(3):
        text = given.prompts[row] + given.completions[row]
        ids = words(text, return_tensors="pt").input_ids
        torch.testing.assert_close(total[row], model(input_ids=ids).logits[0, 0].float())


def test_folder_of_a_reward_model(tmp_path):
    model = tiny_model(kind="Gemma2ForSequenceClassification", num_labels=1)
    model.save_pretrained(tmp_path / "one")
    tokenizer().save_pretrained(tmp_path / "one")
    given = responses()
    mine, each = Rewards(str(tmp_path / "one"))(given)
    assert list(each) == ["one"]
    torch.testing.assert_close(mine, Rewards(model, tokenizers=tokenizer())(given)[0])
    two = tiny_model(kind="Gemma2ForSequenceClassification", num_labels=2)
    two.save_pretrained(tmp_path / "two")
    tokenizer().save_pretrained(tmp_path / "two")
    with pytest.raises(ValueError, match="expected one output of"):
        load_reward(str(tmp_path / "two"))


def test_function_of_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "my_rewards_of_ppo.py").write_text("def two(completions):\n    return [2] * 3\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    assert Rewards("my_rewards_of_ppo:two")(responses())[0].tolist() == [2, 2, 2]
    with pytest.raises(ValueError, match="expected three in my_rewards_of_ppo, got none"):
        load_reward("my_rewards_of_ppo:three")
    with pytest.raises(ValueError, match="expected a module no_such_rewards"):
        load_reward("no_such_rewards:f")
    with pytest.raises(ValueError, match="a folder or a hub id, got nowhere"):
        load_reward("nowhere")


class Remembering:
    def __init__(self):
        self.seen, self.training = 0, None

    def __call__(self, completions, **columns):
        self.seen += len(completions)
        return [0.0] * len(completions)

    def train(self, mode=True):
        self.training = mode

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


def test_state_of_rewards_travels():
    rewards = Rewards([Remembering(), lambda completions: [0, 0, 0]])
    rewards(responses())
    state = rewards.state_dict()
    assert state == {"Remembering": {"seen": 3}}
    other = Rewards([Remembering(), lambda completions: [0, 0, 0]])
    other.load_state_dict(state)
    assert other.functions[0].seen == 3
    other.mode(training=False)
    assert other.functions[0].training is False


def test_mistakes():
    with pytest.raises(ValueError, match="expected as many weights and tokenizers as functions"):
        Rewards([len, len], [1.0])
    with pytest.raises(TypeError, match="expected a function, module, id or path, got int"):
        Rewards(3)
    with pytest.raises(TypeError, match="expected a tokenizer for the module Linear"):
        Rewards(torch.nn.Linear(D, 1))

    def short(completions):
        return [1.0]

    with pytest.raises(ValueError, match=r"expected 3 numbers of short, .* got \[1\]"):
        Rewards(short)(responses())


def test_a_tokenizer_without_padding_pads_with_its_end():
    """As Llama's has none, and its models no padding token."""
    model = tiny_model(kind="Gemma2ForSequenceClassification", num_labels=1)
    wanted = Rewards(model, tokenizers=tokenizer())(responses())[0]
    words = tokenizer()
    words.pad_token = None
    model.config.pad_token_id = None
    found = Rewards(model, tokenizers=words)(responses())[0]
    assert (words.pad_token_id, model.config.pad_token_id) == (1, 1)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_modules_read_so_many_at_once():
    model = tiny_model(kind="Gemma2ForSequenceClassification", num_labels=1)
    seen = []
    model.register_forward_pre_hook(
        lambda module, args, given: seen.append(len(given["input_ids"])), with_kwargs=True
    )
    found = Rewards(model, tokenizers=tokenizer(), batch=2)(responses())[0]
    assert seen == [2, 1]
    wanted = Rewards(model, tokenizers=tokenizer())(responses())[0]
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_a_monitor_ends_a_run_and_keeps_the_curve(tmp_path):
    def score(completion_ids, **columns):
        return [float(len(set(ids))) for ids in completion_ids]

    def run(folder, **options):
        monitor = HackingMonitor(**options)
        trainer(
            folder,
            rewards=shape(score, "par", monitor=monitor),
            prompts=[{"prompt": "w3 w4", "ref_rewards": [0.0, 1.0]}],
            changed={"total_episodes": 24, "num_ppo_epochs": 1, "save_steps": 1},
            callbacks=[monitor.watch],
        ).train()
        return monitor, [json.loads(x) for x in (folder / "history.jsonl").open()]

    whole, lines = run(tmp_path / "whole")
    assert len(lines) == 3
    assert not whole.stop
    assert whole.curve()[0] == [line["objective/kl"] for line in lines]
    ended, lines = run(tmp_path / "ended", stop_at=1e-9, saturation=0.01)
    assert ended.stop
    assert len(lines) == 1
    again, lines = run(tmp_path / "ended", stop_at=1e-9, saturation=0.01)
    assert again.stop
    assert len(lines) == 2
