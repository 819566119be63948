"""Pockets for any test: a trained one, made once in the user's cache, and a tiny recipe."""

import dataclasses

import pytest


@pytest.fixture(scope="session")
def pocket_nano():
    """`gemma_ext.pocket.load("nano")`; the model is shared, so copy it before changing it."""
    from gemma_ext.pocket import load

    return load("nano", show_progress=False)


@pytest.fixture
def tiny():
    """A recipe that trains in seconds, for everything that does not need a good model."""
    from gemma_ext.pocket import SIZES

    return dataclasses.replace(
        SIZES["nano"],
        vocab_size=400,
        hidden_size=32,
        layers=2,
        head_dim=8,
        intermediate_size=48,
        context=32,
        sliding_window=16,
        corpus_bytes=60_000,
        steps=6,
        batch=4,
    )


@pytest.fixture
def tiny_size(tiny, monkeypatch, tmp_path):
    """The name of the tiny size in an empty cache."""
    from gemma_ext.pocket import SIZES

    monkeypatch.setitem(SIZES, "tiny", tiny)
    monkeypatch.setenv("GEMMA_EXT_CACHE", str(tmp_path / "cache"))
    return "tiny"
