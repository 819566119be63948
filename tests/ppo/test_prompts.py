"""Prompts, their columns and their order; settings."""

import json

import pytest
from ppo_tiny import PROMPTS, config, tokenizer

from gemma_ext.ppo import PPOConfig, Prompts, read_prompts


def test_texts_ids_and_columns():
    found = Prompts([{"prompt": "w3 w4 w5", "gold": 1}, {"prompt": "w6", "gold": 2}], tokenizer())
    assert [found.ids(row) for row in range(2)] == [[2, 3, 4, 5], [2, 6]]
    assert found.columns([1, 0, 1]) == {"gold": [2, 1, 2]}
    assert found.given(1) == "w6"
    cut = Prompts(["w3 w4 w5"], tokenizer(), max_length=2)
    assert cut.ids(0) == [4, 5]
    assert cut.columns([0]) == {}


def test_tokens_and_messages():
    words = tokenizer()
    found = Prompts([{"input_ids": [2, 7, 8]}], words)
    assert found.ids(0) == [2, 7, 8]
    assert found.given(0) == "w7 w8"
    words.chat_template = (
        "{% for m in messages %}{{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}w9{% endif %}"
    )
    messages = [{"role": "user", "content": "w3 w4"}]
    chat = Prompts([{"prompt": messages}], words)
    assert chat.ids(0)[-3:] == [3, 4, 9]
    assert chat.given(0) == messages


def test_order_shuffles_every_round_and_is_the_same_from_anywhere():
    found = Prompts(PROMPTS, tokenizer())
    walk = found.order(0, 23, seed=3)
    assert [sorted(walk[at : at + 5]) for at in range(0, 20, 5)] == [list(range(5))] * 4
    assert walk[:5] != walk[5:10] or walk[5:10] != walk[10:15]
    assert found.order(7, 9, seed=3) == walk[7:16]
    assert found.order(0, 23, seed=4) != walk


def test_files(tmp_path):
    rows = [{"prompt": "a", "gold": 1}, {"prompt": "b", "gold": 2}]
    lines = tmp_path / "p.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_prompts(lines) == rows
    text = tmp_path / "p.txt"
    text.write_text("one\n\ntwo\n")
    assert Prompts(text, tokenizer()).rows == [{"prompt": "one"}, {"prompt": "two"}]
    lines.write_text('{"prompt": "a"}\n[1]\n')
    with pytest.raises(ValueError, match=r"row 2: expected a JSON object, got '\[1\]'"):
        read_prompts(lines)
    with pytest.raises(ValueError, match="expected a file or hf:NAME, got nowhere"):
        read_prompts("nowhere")


@pytest.mark.parametrize("odd", ["\u2028", "\u0085"])
def test_a_line_of_a_file_ends_at_its_newline_alone(odd, tmp_path):
    """JSON leaves what other programs take for the end of a line in its texts."""
    rows = [{"prompt": f"one{odd}two"}, {"prompt": "three"}]
    texts = [json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "rows.jsonl").write_text("\n".join(texts) + "\n", encoding="utf-8")
    assert read_prompts(tmp_path / "rows.jsonl") == rows


def test_rows_that_do_not_fit():
    words = tokenizer()
    with pytest.raises(ValueError, match="prompts: expected at least one, got none"):
        Prompts([], words)
    with pytest.raises(ValueError, match=r"a prompt or input_ids in row 1, got \['gold'\]"):
        Prompts([{"prompt": "a"}, {"gold": 1}], words)
    with pytest.raises(ValueError, match=r"expected the columns \['prompt'\] in row 1"):
        Prompts([{"prompt": "a"}, {"prompt": "b", "gold": 1}], words)
    with pytest.raises(ValueError, match="expected a token in row 0, got none"):
        Prompts([{"input_ids": []}], words).ids(0)


def test_defaults_are_those_of_trl():
    found = PPOConfig()
    assert (found.learning_rate, found.num_ppo_epochs, found.num_mini_batches) == (3e-6, 4, 1)
    assert (found.kl_coef, found.kl_estimator, found.temperature) == (0.05, "k1", 0.7)
    assert (found.cliprange, found.cliprange_value, found.vf_coef) == (0.2, 0.2, 0.1)
    assert (found.gamma, found.lam, found.whiten_rewards) == (1.0, 0.95, False)
    assert (found.response_length, found.stop_token, found.missing_eos_penalty) == (53, None, None)
    assert found.local_rollout_forward_batch_size == 64


def test_sizes_and_schedules(tmp_path):
    found = config(tmp_path, num_mini_batches=3, total_episodes=100)
    assert (found.local_mini_batch_size, found.local_batch_size) == (8, 24)
    assert (found.steps(), found.steps(2)) == (5, 3)
    linear = [config(tmp_path).factor(step, 4) for step in range(4)]
    assert linear == [1.0, 0.75, 0.5, 0.25]
    warm = config(tmp_path, warmup_ratio=0.5, lr_scheduler_type="constant")
    assert [warm.factor(step, 4) for step in range(4)] == [0.5, 1.0, 1.0, 1.0]
    for ratio in (0.01, 0.25, 0.3, 1.0):  # of steps that they are no whole part of
        factors = [config(tmp_path, warmup_ratio=ratio).factor(step, 10) for step in range(10)]
        assert max(factors) == 1.0
    cosine = config(tmp_path, lr_scheduler_type="cosine")
    assert cosine.factor(0, 4) == 1
    assert cosine.factor(2, 4) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_ppo_epochs": 0}, "num_ppo_epochs: expected at least 1, got 0"),
        ({"temperature": 0.0}, "temperature: expected a positive number, got 0.0"),
        ({"advantage": "vtrace"}, "advantage: expected one of gae, rloo"),
        ({"kl_estimator": "k9"}, "kl_estimator: expected one of k1"),
        ({"kl_in": "both"}, "kl_in: expected one of reward, loss"),
        ({"aggregation": "sum"}, "aggregation: expected one of token-mean"),
        ({"lr_scheduler_type": "step"}, "lr_scheduler_type: expected one of linear"),
        ({"advantage": "rloo"}, "num_generations: expected at least 2 for rloo, got 1"),
        ({"num_generations": 3}, "expected a divisor of the 8 responses of a rank, got 3"),
        ({"max_prompt_length": 0}, "max_prompt_length: expected None or at least 1, got 0"),
        ({"warmup_ratio": 1.5}, r"warmup_ratio: expected a number in \[0, 1\], got 1.5"),
        ({"cliprange": 1.0}, r"cliprange: expected a number in \[0, 1\), got 1.0"),
        ({"cliprange_high": -0.1}, "cliprange_high: expected at least 0, got -0.1"),
        ({"cliprange_value": 0.0}, "cliprange_value: expected a positive number, got 0.0"),
        ({"importance_cap": -1.0}, "importance_cap: expected a positive number, got -1.0"),
        ({"top_k": -1}, "top_k: expected at least 0, got -1"),
    ],
)
def test_settings_out_of_range(tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **changed)
