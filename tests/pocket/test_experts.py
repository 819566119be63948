"""Domains cover their text once, and experts are made once and taken up where they stopped."""

import dataclasses

import pytest
import torch

from gemma_ext import pocket
from gemma_ext.pocket import corpus, domains, experts


@pytest.fixture(scope="module")
def texts():
    return pocket.documents()


def test_every_domain_has_text_on_every_side(pocket_nano):
    for name in pocket.DOMAINS:
        text = pocket.load_domain(name, pocket_nano.tokenizer)
        assert text.train.dtype == torch.int64
        assert text.train.numel() > 50_000
        assert min(text.validation.numel(), text.test.numel()) > 5_000


def test_a_document_is_in_one_domain(texts):
    named = [domains.domain_of(doc) for doc in texts]
    assert set(named) == {*pocket.DOMAINS, None}
    assert all(
        doc.kind == ("prose" if name == "prose" else "code")
        for doc, name in zip(texts, named, strict=True)
        if name not in (None, "manual")
    )


def test_pieces_are_the_text(texts):
    longest = max(texts, key=lambda doc: len(doc.text)).text
    cut = list(domains.pieces(longest))
    assert "".join(cut) == longest
    assert len(cut) > 10
    assert list(domains.pieces("")) == []


def test_no_piece_is_on_two_sides(pocket_nano, texts):
    cut = {p for doc in texts if domains.domain_of(doc) == "gui" for p in domains.pieces(doc.text)}
    sides = [domains._side(piece) for piece in cut]
    assert all(abs(sides.count(side) / len(sides) - 0.1) < 0.06 for side in ("validation", "test"))


def test_unknown_domain(pocket_nano):
    with pytest.raises(ValueError, match=r"domain: expected one of prose, manual.*got 'poetry'"):
        pocket.load_domain("poetry", pocket_nano.tokenizer)


@pytest.fixture
def short_texts(monkeypatch):
    """A corpus of one document per domain that encodes in no time."""
    paths = {"prose": "abc.py", "manual": "pydoc_data/topics.py", "network": "ssl.py"}
    docs = [
        corpus.Document(
            path, "prose" if name == "prose" else "code", "train", f"{name} x = 1\n" * 2000
        )
        for name, path in paths.items()
    ]
    monkeypatch.setattr(domains, "documents", lambda: docs)


@pytest.mark.usefixtures("short_texts")
def test_an_expert_knows_its_domain_better(tiny_size):
    recipe = pocket.ExpertRecipe(steps=4, batch=2)
    base = pocket.load(tiny_size, show_progress=False)
    text = pocket.load_domain("network", base.tokenizer)
    expert = pocket.load_expert("network", tiny_size, recipe, show_progress=False)
    assert pocket.perplexity(expert, text.train, 16) < pocket.perplexity(base.model, text.train, 16)


@pytest.mark.usefixtures("short_texts")
def test_an_expert_is_made_once_per_recipe(tiny_size, monkeypatch):
    recipe = pocket.ExpertRecipe(steps=1, batch=1)
    folder = pocket.expert_folder("manual", tiny_size, recipe, show_progress=False)
    other = dataclasses.replace(recipe, seed=1)
    assert pocket.expert_folder("manual", tiny_size, other, show_progress=False) != folder

    def fail(*args, **kwargs):
        raise AssertionError("trained again")

    monkeypatch.setattr(experts, "train", fail)
    assert pocket.expert_folder("manual", tiny_size, recipe, show_progress=False) == folder
