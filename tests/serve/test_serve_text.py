"""Pieces of text that are never taken back, and strings that end it."""

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from live_server import nano_tokenizer  # noqa: F401

from gemma_ext.serve.text import Decoder, StopStrings, Vocabulary


def plain(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def pieces(tokenizer, ids, context=()):
    decoder = Decoder(tokenizer, context)
    return [*(decoder.push(id) for id in ids), decoder.end()]


@pytest.mark.parametrize("text", ["", "a", "héllo wörld", "日本語 🤗🤗 x", "  two  spaces\n\ttab"])
def test_pieces_are_the_text(nano_tokenizer, text):  # noqa: F811
    ids = nano_tokenizer(text, add_special_tokens=False)["input_ids"]
    told = pieces(nano_tokenizer, ids)
    assert "".join(told) == text
    assert all("\ufffd" not in piece for piece in told)


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40))
def test_pieces_are_any_text(text):
    tokenizer = test_pieces_are_any_text.tokenizer
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert "".join(pieces(tokenizer, ids)) == plain(tokenizer, ids)


@pytest.fixture(autouse=True)
def _keep(nano_tokenizer):  # noqa: F811
    test_pieces_are_any_text.tokenizer = nano_tokenizer


def test_pieces_of_random_tokens_are_what_the_tokenizer_says(nano_tokenizer):  # noqa: F811
    draw = random.Random(0)
    for _ in range(50):
        ids = [draw.randrange(len(nano_tokenizer)) for _ in range(30)]
        assert "".join(pieces(nano_tokenizer, ids)) == plain(nano_tokenizer, ids)


def test_a_character_comes_whole(nano_tokenizer):  # noqa: F811
    ids = nano_tokenizer("🤗", add_special_tokens=False)["input_ids"]
    assert len(ids) == 4
    assert pieces(nano_tokenizer, ids) == ["", "", "", "🤗", ""]


def test_an_open_character_ends_as_a_replacement(nano_tokenizer):  # noqa: F811
    ids = nano_tokenizer("🤗", add_special_tokens=False)["input_ids"][:2]
    assert "".join(pieces(nano_tokenizer, ids)) == plain(nano_tokenizer, ids) == "\ufffd"


def test_a_prompt_that_ends_within_a_character(nano_tokenizer):  # noqa: F811
    ids = nano_tokenizer("x🤗y", add_special_tokens=False)["input_ids"]
    assert "".join(pieces(nano_tokenizer, ids[3:], ids[:3])) == "🤗y"


def test_no_text_is_held_without_bound(nano_tokenizer):  # noqa: F811
    lead = nano_tokenizer("🤗", add_special_tokens=False)["input_ids"][0]
    decoder = Decoder(nano_tokenizer)
    told = [decoder.push(lead) for _ in range(200)]
    assert sum(map(len, told)) > 150
    assert max(map(len, told)) <= 17


def test_special_tokens_are_no_text(nano_tokenizer):  # noqa: F811
    ids = nano_tokenizer("ab")["input_ids"]
    assert ids[0] == nano_tokenizer.bos_token_id
    assert "".join(pieces(nano_tokenizer, [*ids, nano_tokenizer.eos_token_id])) == "ab"


def test_spaces_of_sentence_pieces():
    tokenizer = sentence_pieces()
    ids = tokenizer("hello hello", add_special_tokens=False)["input_ids"]
    assert "".join(pieces(tokenizer, ids)) == "hello hello"
    # after a prompt the space belongs to the output
    assert "".join(pieces(tokenizer, ids[1:], ids[:1])) == " hello"
    vocabulary = Vocabulary(tokenizer)
    assert vocabulary.bytes(ids[1]) == b" hello"
    snowman = tokenizer("\N{SNOWMAN}", add_special_tokens=False)["input_ids"][-3:]
    assert b"".join(map(vocabulary.bytes, snowman)) == "\N{SNOWMAN}".encode()
    assert vocabulary.name(snowman[0]) == r"bytes:\xe2"


def test_a_special_token_takes_no_space_away():
    tokenizer = sentence_pieces()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    (turn,) = tokenizer.convert_tokens_to_ids(["<turn>"])
    hello = tokenizer("hello", add_special_tokens=False)["input_ids"]
    ids = [*hello, turn, *hello]
    assert "".join(pieces(tokenizer, ids)) == plain(tokenizer, ids) == "hello hello"
    # nor do many of them at the end of a prompt
    assert "".join(pieces(tokenizer, hello, [*hello, *[turn] * 9])) == " hello"
    # one between the bytes of a character
    snowman = tokenizer("\N{SNOWMAN}", add_special_tokens=False)["input_ids"][-3:]
    ids = [*hello, snowman[0], turn, *snowman[1:], turn, *hello]
    assert "".join(pieces(tokenizer, ids)) == plain(tokenizer, ids)


def sentence_pieces():
    """As of Llama and Gemma: a mark for a space, and bytes for what has no token."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    mark = "\N{LOWER ONE EIGHTH BLOCK}"
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    word = f"{mark}hello"
    merges, built = [], word[0]
    for letter in word[1:]:
        merges.append((built, letter))
        built += letter
    names += sorted({*word, *(word[: end + 1] for end in range(len(word)))})
    core = Tokenizer(
        models.BPE(
            {name: id for id, name in enumerate(names)},
            merges,
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend(mark), normalizers.Replace(" ", mark)]
    )
    core.decoder = decoders.Sequence(
        [
            decoders.Replace(mark, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


def test_the_bytes_of_all_tokens_are_the_text(nano_tokenizer):  # noqa: F811
    vocabulary = Vocabulary(nano_tokenizer)
    text = "def f(x):\n    return 'né' + \"日本\"  # 🤗"
    ids = nano_tokenizer(text, add_special_tokens=False)["input_ids"]
    assert b"".join(map(vocabulary.bytes, ids)) == text.encode()
    assert vocabulary.name(nano_tokenizer.bos_token_id) == "<bos>"
    assert len({vocabulary.name(id) for id in range(len(nano_tokenizer))}) == len(nano_tokenizer)


def test_a_row_of_the_head_that_is_no_token(nano_tokenizer):  # noqa: F811
    assert Vocabulary(nano_tokenizer).bytes(10**6) == b""


def cut(strings, parts):
    stops = StopStrings(strings)
    told = [stops.push(part) for part in parts]
    if not stops.hit:
        told.append(stops.end())
    return told, stops.hit


def test_a_stop_string_across_pieces():
    assert cut(["END"], ["one E", "N", "D two"]) == (["one ", "", ""], True)
    assert cut(["END"], ["one E", "N", "C"]) == (["one ", "", "ENC", ""], False)
    assert cut(["END"], ["one E"]) == (["one ", "E"], False)
    assert cut([], ["any", "thing"]) == (["any", "thing", ""], False)


def test_the_first_stop_string_wins():
    assert cut(["cd", "b"], ["abcd"]) == (["a"], True)
    assert cut(["b", "bcd"], ["abcd"]) == (["a"], True)


def test_long_stop_strings_take_time_as_the_text_does():
    text, strings = "a" * 20_000, ["a" * 1023 + "b", *["c" * 1024] * 7]
    began = time.process_time()
    assert cut(strings, text) == ([*[""] * 1023, *"a" * 18_977, "a" * 1023], False)
    # comparing every beginning at every letter takes hundreds of times as long
    assert time.process_time() - began < 3


def test_nothing_comes_after_a_stop_string():
    stops = StopStrings(["x"])
    assert (stops.push("axb"), stops.push("c"), stops.end()) == ("a", "", "")


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.text("ab", min_size=1, max_size=3), max_size=3),
    st.lists(st.text("ab", max_size=4), max_size=6),
)
def test_pieces_are_cut_where_the_text_is(strings, parts):
    text = "".join(parts)
    told, hit = cut(strings, parts)
    places = [text.find(string) for string in strings if string in text]
    # a longer stop string that ends later does not hide one that is complete
    assert hit == bool(places)
    if not hit:
        assert "".join(told) == text
    else:
        shown = "".join(told)
        assert text.startswith(shown)
        assert all(string not in shown for string in strings)
        assert any(text[len(shown) :].startswith(string) for string in strings)
