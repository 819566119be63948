"""Byte-level: whatever goes in comes out, with Gemma's special ids in Gemma's places."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_ext.pocket.tokenizer import BOS_ID, EOS_ID, PAD_ID, encode, load_tokenizer
from gemma_ext.pocket.tokenizer import train_tokenizer as train

TEXTS = ["def add(a, b):\n    return a + b\n" * 5, "the sum of the numbers 12 and 345\n" * 5]


@pytest.fixture(scope="module")
def tokenizer():
    return train(TEXTS, 290, 64)


def test_specials_are_gemmas(tokenizer):
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1, 2)
    assert (PAD_ID, EOS_ID, BOS_ID) == (0, 1, 2)
    assert tokenizer("add").input_ids[0] == BOS_ID
    assert len(tokenizer) == 290


@given(text=st.text(st.characters(codec="utf-8", exclude_characters="<>"), max_size=40))
def test_text_survives_the_round_trip(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text


def test_digits_are_single_tokens(tokenizer):
    ids = tokenizer("12345", add_special_tokens=False).input_ids
    assert [tokenizer.decode([i]) for i in ids] == list("12345")


def test_stream_marks_each_document(tokenizer):
    ids = encode(tokenizer, ["the", "sum"])
    assert ids.count(BOS_ID) == ids.count(EOS_ID) == 2
    assert ids[0] == BOS_ID
    assert ids[-1] == EOS_ID


def test_training_is_deterministic_and_saved_whole(tokenizer, tmp_path):
    assert train(TEXTS, 290, 64).get_vocab() == tokenizer.get_vocab()
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again(TEXTS[0]).input_ids == tokenizer(TEXTS[0]).input_ids
    assert (again.pad_token_id, again.eos_token_id, again.bos_token_id) == (0, 1, 2)


def test_too_large_a_vocabulary_is_refused():
    with pytest.raises(ValueError, match="vocab_size: expected at most"):
        train(["ab"], 5000, 64)
