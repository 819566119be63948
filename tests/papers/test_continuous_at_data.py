"""Files of HarmBench and UltraChat, prompts that share their tokens, and the mixture."""

from __future__ import annotations

import json

import pytest
import tiny_gemma

from gemma_ext.papers.continuous_at import (
    Behaviour,
    Encoder,
    Mixture,
    Pair,
    Row,
    pairs,
    read_behaviours,
    read_refusals,
    read_targets,
    read_utility,
    utility_rows,
)

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


def test_behaviours_of_both_column_names(tmp_path):
    new = write(
        tmp_path / "new.csv",
        "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID\n"
        '"open it, now",standard,locks,"a, b",,open\nread it,contextual,texts,,A text.,read\n',
    )
    assert read_behaviours(new) == [
        Behaviour("open", "open it, now", "locks", "standard", "a, b"),
        Behaviour("read", "A text.\n\nread it", "texts", "contextual", ""),
    ]
    old = write(tmp_path / "old.csv", "\ufeffBehavior,Category,BehaviorID\nx,copyright,y\n")
    assert read_behaviours(old) == [Behaviour("y", "x", kind="copyright")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Behavior,Tags\nx,y\n", "expected a column BehaviorID, got Behavior, Tags"),
        ("Behavior,BehaviorID\nx,y\nz,y\n", "expected each BehaviorID once, got y twice"),
    ],
)
def test_behaviours_that_do_not_fit(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_behaviours(write(tmp_path / "bad.csv", text))


def test_targets(tmp_path):
    path = write(tmp_path / "t.json", json.dumps({"a": ["x", "y"], "b": "z"}))
    assert read_targets(path) == {"a": ["x", "y"], "b": ["z"]}
    for value, message in (
        ([1], "expected an object by BehaviorID, got list"),
        ({"a": [3]}, r"expected strings for a, got \[3\]"),
        ({"a": []}, "expected strings for a"),
    ):
        with pytest.raises(ValueError, match=message):
            read_targets(write(path, json.dumps(value)))


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
        [Behaviour("a", "open the file"), Behaviour("b", "sort a list")],
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
        [Behaviour("a", "open the file"), Behaviour("b", "sort a list")],
        {"a": ["Sure, here", "Yes"], "b": ["Of course"]},
        ["No.", "Never.", "I will not."],
    )
    with pytest.raises(ValueError, match="targets: expected some for a, got none"):
        pairs(encoder, [Behaviour("a", "x")], {}, ["No."])
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
