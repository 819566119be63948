"""A Gemma-2 of a few thousand parameters in a folder, with a tokenizer of a few hundred tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from gemma_ext import pocket
from gemma_ext.pocket.tokenizer import train_tokenizer


def base(folder: Path, texts: Sequence[str]) -> Path:
    tokenizer = train_tokenizer(list(texts), 280, 64)
    size = replace(
        pocket.SIZES["nano"],
        vocab_size=280,
        hidden_size=32,
        layers=2,
        head_dim=8,
        intermediate_size=48,
        context=64,
        sliding_window=16,
    )
    pocket.build_model(size).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
