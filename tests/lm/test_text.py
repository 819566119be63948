"""Where texts begin, and where a prompt ends in what follows it."""

from __future__ import annotations

import pytest
from lm_models import BOS, EOS, tokenizer

from gemma_ext.lm.text import Text, shared_length


def text_of(encoder_decoder: bool = False, **options) -> Text:
    return Text(tokenizer(**options), encoder_decoder)


def pieces(text: Text, ids: list[int]) -> list[str]:
    return text.tokenizer.convert_ids_to_tokens(ids)


def test_tokens_are_those_of_the_joined_text():
    text = text_of()
    prompt_ends_in_space, space_in_option, across = text.jobs(
        [("a ", "blue"), ("a", " blue"), ("xa", "bc")]
    )
    # "Ġbl" is one token: the space that ends the prompt is scored with the word behind it
    assert prompt_ends_in_space == space_in_option
    assert pieces(text, space_in_option.context) == ["<bos>", "a"]
    assert pieces(text, space_in_option.targets) == ["Ġbl", "u", "e"]
    assert pieces(text, across.context) == ["<bos>", "x"]
    assert pieces(text, across.targets) == ["abc"]


def test_nothing_before_a_continuation_is_the_prefix():
    for options, prefix in (({}, BOS), ({"bos": False}, EOS)):
        text = text_of(**options)
        job, merged = text.jobs([("", "xy"), ("a", "b")])
        assert job.context == [prefix]
        assert pieces(text, job.targets) == ["x", "y"]
        assert pieces(text, merged.targets) == ["ab"]
        assert merged.context == [prefix]
    bare = tokenizer(bos=False)
    bare.eos_token = None
    with pytest.raises(ValueError, match="a tokenizer with a bos or eos token, got one with"):
        Text(bare, False).jobs([("", "xy")])


def test_a_text_begins_once():
    text = text_of()
    ids, again = text.encode(["xy", "<bos>xy"])
    assert ids == again == [BOS, *text.bare(["xy"])[0]]
    assert text.jobs([("<bos>x", "y")]) == text.jobs([("x", "y")])
    assert text.encode([""]) == [[BOS]]
    assert text_of(bos=False).encode(["xy", ""]) == [text.bare(["xy"])[0], [EOS]]


def test_the_end_that_a_tokenizer_adds_is_no_part_of_a_prompt():
    text = text_of(eos=True)
    assert text.encode(["xy"]) == [[BOS, *text.bare(["xy"])[0]]]
    (job,) = text.jobs([("x", "y")])
    assert EOS not in job.context + job.targets
    (job,) = text_of(encoder_decoder=True, eos=True).jobs([("x", "y")])
    assert (job.context[-1], len(job.targets)) == (EOS, 1)


@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 100])
def test_windows_score_every_token_once(length):
    text = text_of()
    words = "xyz uvw 12345 xyz"
    (ids,) = text.bare([words])
    jobs = text.windows(words, length)
    assert [token for job in jobs for token in job.targets] == ids
    assert jobs[0].context == [BOS]
    for job in jobs:
        assert job.context
        assert len(job.context) + len(job.targets) <= length + 1
    for job in jobs[1:-1]:
        assert len(job.targets) == length
    if len(jobs) > 1:  # the last sees as much as fits
        assert len(jobs[-1].context) + len(jobs[-1].targets) == length + 1
    assert text.windows("", length) == []


def test_windows_are_those_of_lm_eval():
    utils = pytest.importorskip("lm_eval.utils")
    text = text_of()
    words = "xyz uvw 12345 xyz" * 3
    for length in (1, 4, 7, 50, 51, 52, 100):
        theirs = [
            utils.make_disjoint_window(window)
            for window in utils.get_rolling_token_windows(text.bare([words])[0], BOS, length, 1)
        ]
        assert [tuple(job) for job in text.windows(words, length)] == theirs


def test_what_is_decoded_goes_on_from_what_came_before():
    text = text_of()
    before, ids = text.encode(["é a"])[0], text.bare([" blé"])[0]
    assert text.decode(before, ids) == " blé"
    assert text.decode([], [*ids, EOS]) == " blé"
    assert text.decode(before, []) == ""
    # half a character in the prompt, the other half behind it
    (both,) = text.bare(["é"])
    assert len(both) == 2
    assert "\ufffd" in text.decode(both[:1], both[1:])


def test_a_space_that_a_decoder_drops_is_kept():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"▁a": 0, "▁b": 1, "<eos>": 2}, unk_token="<eos>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    text = Text(PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>"), False)
    assert text.tokenizer.decode([1]) == "b"
    assert text.decode([0], [1]) == " b"


def test_shared_length():
    assert shared_length([[1, 2, 3], [1, 2], [1, 2, 9]]) == 2
    assert shared_length([[1, 2, 3], [0], [1, 2]]) == 0
    assert shared_length([[5, 6]]) == 2
    assert shared_length([[], [1]]) == 0


def test_a_tokenizer_is_described_by_what_the_ids_depend_on():
    first, second = text_of().describe(), text_of().describe()
    assert first == second
    assert text_of(bos=False).describe() != first
    changed = text_of()
    changed.tokenizer.chat_template = "x"
    assert changed.describe() != first
