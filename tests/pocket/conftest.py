"""A size that trains in seconds, for everything that does not need a good model."""

import dataclasses

import pytest

from gemma_ext.pocket.model import SIZES, PocketSize


@pytest.fixture
def tiny() -> PocketSize:
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
def tiny_size(tiny, monkeypatch, tmp_path) -> str:
    """The name of the tiny size in an empty cache."""
    monkeypatch.setitem(SIZES, "tiny", tiny)
    monkeypatch.setenv("GEMMA_EXT_CACHE", str(tmp_path))
    return "tiny"
