"""Refusals, UltraChat, prompts that share their tokens, and the mixture."""

from __future__ import annotations

import json

import pytest
import tiny_gemma

from gemma_ext.papers.continuous_at import (
    Encoder,
    Mixture,
    Pair,
    Row,
    pairs,
    read_refusals,
    read_utility,
    utility_rows,
)
from gemma_ext.papers.continuous_at.evaluation.harmbench import Behavior

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<model>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    pytest.importorskip("transformers")
    from transformers import AutoTokenizer

    from gemma_ext import pocket

    texts = [document.text for document in pocket.documents(30_000)]
    folder = tiny_gemma.base(tmp_path_factory.mktemp("tiny"), texts)
    made = AutoTokenizer.from_pretrained(folder)
    made.chat_template = TEMPLATE
    return made


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_refusals(tmp_path):
    path = write(tmp_path / "r.csv", 'answer,more\n"No, never.",a\nNo.,b\n')
    assert read_refusals(path) == ["No, never.", "No."]
    assert read_refusals(path, "more") == ["a", "b"]
    with pytest.raises(ValueError, match="expected answers in column x, got none"):
        read_refusals(path, "x")
    with pytest.raises(ValueError, match="expected answers in column None, got none"):
        read_refusals(write(path, "answer\n"))


def test_utility_is_the_first_turn_of_short_requests(tmp_path):
    def line(*turns):
        roles = ("user", "assistant", "user", "assistant")
        spoken = [{"role": r, "content": c} for r, c in zip(roles, turns, strict=False)]
        return json.dumps({"prompt": turns[0], "messages": spoken})

    system = {"role": "system", "content": "be good"}
    behind = json.dumps({"messages": [system, *json.loads(line("c", "d"))["messages"]]})
    path = write(
        tmp_path / "u.jsonl",
        "\n".join([line("a", "b", "x", "y"), "", line("q" * 768, "long"), behind, line("alone")]),
    )
    assert read_utility(path) == [("a", "b"), ("c", "d")]
    assert read_utility(path, characters=1) == []
    with pytest.raises(ValueError, match=r"u.jsonl:1: expected messages, got none"):
        read_utility(write(path, '{"text": "a"}\n'))


def test_answers_of_a_request_share_the_tokens_of_its_prompt(tokenizer):
    encoder = Encoder(tokenizer)
    made = pairs(
        encoder,
        [Behavior("a", "open the file"), Behavior("b", "sort a list")],
        {"a": ["Sure, here", "Yes"], "b": ["Of course"]},
        ["No.", "Never.", "I will not."],
    )
    assert [len({pair.harmful.prompt, pair.safe.prompt}) for pair in made] == [1, 1, 1]
    assert made[0].harmful.prompt == made[1].harmful.prompt != made[2].harmful.prompt
    text = tokenizer.decode(made[0].harmful.prompt)
    assert text == "<bos><user>open the file\n<model>"
    assert made[0].harmful.prompt.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(made[0].harmful.target) == "Sure, here"
    assert made[0].safe.target[-1] == tokenizer.eos_token_id
    assert made == pairs(
        encoder,
        [Behavior("a", "open the file"), Behavior("b", "sort a list")],
        {"a": ["Sure, here", "Yes"], "b": ["Of course"]},
        ["No.", "Never.", "I will not."],
    )
    with pytest.raises(ValueError, match="targets: expected some for a, got none"):
        pairs(encoder, [Behavior("a", "x")], {}, ["No."])
    with pytest.raises(ValueError, match="refusals: expected at least one, got none"):
        pairs(encoder, [], {}, [])
    with pytest.raises(ValueError, match="safe: expected the prompt of the harmful row"):
        Pair(made[0].harmful, made[2].safe)


def test_a_row_is_cut_at_the_end_of_its_target(tokenizer):
    encoder = Encoder(tokenizer)
    (whole,) = utility_rows(encoder, [("open the file", "read it and then close it")])
    assert whole.target[-1] == tokenizer.eos_token_id
    short = Encoder(tokenizer, max_length=len(whole.prompt) + 3)
    (cut,) = utility_rows(short, [("open the file", "read it and then close it")])
    assert (cut.prompt, cut.target) == (whole.prompt, whole.target[:3])
    tight = Encoder(tokenizer, max_length=len(whole.prompt))
    with pytest.raises(ValueError, match="prompt: expected fewer than max_length="):
        utility_rows(tight, [("open the file", "read")])


def test_a_conversation_ends_with_its_target(tokenizer):
    encoder = Encoder(tokenizer)
    spoken = [
        ("user", "open the file"),
        ("assistant", "No."),
        ("user", "now"),
        ("assistant", "Yes"),
    ]
    messages = [{"role": role, "content": content} for role, content in spoken]
    row = encoder.conversation(messages)
    assert tokenizer.decode(row.prompt) == (
        "<bos><user>open the file\n<assistant>No.\n<user>now\n<model>"
    )
    assert tokenizer.decode(row.target) == "Yes"
    for wrong in (messages[:3], messages[1:2]):
        with pytest.raises(ValueError, match="messages: expected some that end with the"):
            encoder.conversation(wrong)


def test_messages_need_a_template(tokenizer):
    bare = tokenizer.__class__.from_pretrained(tokenizer.name_or_path)
    with pytest.raises(ValueError, match="got messages and no chat template"):
        Encoder(bare).ask("x")


def test_a_step_draws_the_same_samples_again():
    row = Row((2, 3), (4,))
    adversarial = [Pair(Row((2, at), (1,)), Row((2, at), (0,))) for at in range(50)]
    mixture = Mixture(adversarial, [row], 0.125, seed=3)
    drawn = [mixture.draw(step, 64) for step in range(40)]
    assert [mixture.draw(step, 64) for step in range(40)] == drawn
    assert all(len(a) + len(u) == 64 for a, u in drawn)
    share = sum(len(a) for a, _ in drawn) / (40 * 64)
    assert 0.10 < share < 0.15
    assert drawn[0] != drawn[1]
    assert len(Mixture(adversarial, [], 1.0).draw(0, 8)[0]) == 8
    assert Mixture([], [row], 0.0).draw(0, 8) == ([], [row] * 8)
    for values, message in (
        ((adversarial, [row], 1.5), "p: expected a probability, got 1.5"),
        (([], [row], 0.5), "adversarial: expected rows to draw from, got none"),
        ((adversarial, [], 0.5), "utility: expected rows to draw from, got none"),
    ):
        with pytest.raises(ValueError, match=message):
            Mixture(*values)
