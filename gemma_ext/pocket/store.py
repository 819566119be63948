"""Making a pocket once and reading it ever after.

The folder of a size is named after a fingerprint of its recipe and of the Python whose standard
library is its text: another recipe or another Python is another folder. Two processes that ask at
once make it once.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gemma_ext.extras import require
from gemma_ext.files import write_safetensors, write_text
from gemma_ext.pocket.bigram import bigram_perplexity
from gemma_ext.pocket.cache import MANIFEST, cache_dir, verify_manifest, write_manifest
from gemma_ext.pocket.corpus import corpus_digest, documents
from gemma_ext.pocket.model import PocketSize, build_model, pocket_size
from gemma_ext.pocket.quiet import quiet_transformers
from gemma_ext.pocket.tokenizer import encode, load_tokenizer, train_tokenizer
from gemma_ext.pocket.training import perplexity, train

if TYPE_CHECKING:
    from transformers import Gemma2ForCausalLM, PreTrainedTokenizerFast

_FORMAT = 1  # of the folder; a change makes every cached pocket anew
_PACKAGES = ("transformers", "tokenizers", "safetensors", "filelock")
_TOKENS = "tokens.safetensors"
_REPORT = "report.json"
_CHECKPOINT = "training.safetensors"


@dataclass(frozen=True)
class Text:
    """What a size is trained on.

    Attributes:
        tokenizer: fast tokenizer of `transformers`, vocabulary V.
        train_ids: [n] int64 stream of <bos> document <eos> after another.
        heldout_ids: [m] int64 stream of files that are in no other way seen.
    """

    tokenizer: PreTrainedTokenizerFast
    train_ids: Tensor
    heldout_ids: Tensor


@dataclass(frozen=True)
class Pocket(Text):
    """A trained pocket.

    Attributes:
        model: Gemma2ForCausalLM in float32 on the CPU, in evaluation mode.
        report: heldout_perplexity, bigram_perplexity, train_tokens, heldout_tokens, parameters,
            seconds (of training), losses (of every step), corpus_sha256 and the versions it was
            made with.
    """

    model: Gemma2ForCausalLM
    report: dict[str, Any]


def load(size: str = "nano", *, show_progress: bool = True) -> Pocket:
    """The pocket of a size, trained on the first call and read from the cache afterwards.

    Args:
        size: "nano" (under a minute) or "small" (minutes). An interrupted call is taken up where it
            stopped.
        show_progress: a bar on stderr while training.

    Raises:
        ValueError: unknown size, or a cached file that is not as it was written.
        ImportError: transformers, tokenizers or safetensors is missing.

    Example:
        >>> pocket = gemma_ext.pocket.load("nano")
        >>> pocket.report["heldout_perplexity"] < pocket.report["bigram_perplexity"]
        True
    """
    require("the pocket", "hf", *_PACKAGES)
    from transformers import Gemma2ForCausalLM

    recipe = pocket_size(size)
    folder = _make(size, recipe, show_progress)
    report = verify_manifest(folder)["report"]
    text = _read_text(folder)
    with quiet_transformers():
        model = Gemma2ForCausalLM.from_pretrained(folder, attn_implementation="eager")
    losses = json.loads((folder / _REPORT).read_text(encoding="utf-8"))
    return Pocket(**vars(text), model=model.eval(), report={**report, **losses})


def load_text(size: str) -> Text:
    """Tokenizer and token streams of a size without training its model.

    Raises:
        ValueError, ImportError: as `load`.
    """
    require("the pocket", "hf", *_PACKAGES)
    recipe = pocket_size(size)
    folder, partial = _folders(size, recipe)
    with locked(folder):
        if (folder / MANIFEST).exists():
            verify_manifest(folder)
            return _read_text(folder)
        return _make_text(partial, recipe)[0]


def _make(size: str, recipe: PocketSize, show_progress: bool) -> Path:
    folder, partial = _folders(size, recipe)
    with locked(folder):
        if (folder / MANIFEST).exists():
            return folder
        text, corpus = _make_text(partial, recipe)
        model = build_model(recipe)
        done = train(
            model,
            text.train_ids,
            recipe,
            checkpoint=partial / _CHECKPOINT,
            show_progress=show_progress,
        )
        with quiet_transformers():
            model.save_pretrained(partial)
        scored = text.heldout_ids[: _scored(text.heldout_ids, recipe.context)]
        report = {
            "heldout_perplexity": perplexity(model, scored, recipe.context),
            "bigram_perplexity": bigram_perplexity(text.train_ids, scored, recipe.vocab_size),
            "train_tokens": text.train_ids.numel(),
            "trained_tokens": recipe.steps * recipe.batch * recipe.context,
            "heldout_tokens": scored.numel() - 1,
            "parameters": sum(p.numel() for p in model.parameters()),
            "seconds": round(done.seconds, 1),
            "corpus_sha256": corpus,
            "python": platform.python_version(),
            "torch": torch.__version__,
        }
        write_text(partial / _REPORT, json.dumps({"losses": done.losses}) + "\n")
        (partial / _CHECKPOINT).unlink()
        write_manifest(partial, size=size, recipe=asdict(recipe), report=report)
        os.replace(partial, folder)
    return folder


def _make_text(partial: Path, recipe: PocketSize) -> tuple[Text, str]:
    """Fills `partial` with tokenizer and tokens, the tokens last: they say that both are there."""
    from safetensors import safe_open

    if not (partial / _TOKENS).exists():
        partial.mkdir(parents=True, exist_ok=True)
        texts = documents(recipe.corpus_bytes)
        sides = {s: [doc.text for doc in texts if doc.split == s] for s in ("train", "heldout")}
        tokenizer = train_tokenizer(sides["train"], recipe.vocab_size, recipe.context)
        tokenizer.save_pretrained(partial)
        streams = {
            side: torch.tensor(encode(tokenizer, part), dtype=torch.int32)
            for side, part in sides.items()
        }
        write_safetensors(partial / _TOKENS, streams, {"corpus_sha256": corpus_digest(texts)})
    with safe_open(partial / _TOKENS, framework="pt") as file:
        corpus = file.metadata()["corpus_sha256"]
    return _read_text(partial), corpus


def _read_text(folder: Path) -> Text:
    from safetensors.torch import load_file

    streams = load_file(folder / _TOKENS)
    return Text(load_tokenizer(folder), streams["train"].long(), streams["heldout"].long())


def _scored(ids: Tensor, context: int) -> int:
    """Length of the stream that fills whole windows, so that both models score the same targets."""
    return (ids.numel() - 1) // context * context + 1


def pocket_folder(size: str) -> Path:
    """Where the pocket of a size is cached."""
    return _folders(size, pocket_size(size))[0]


def _folders(size: str, recipe: PocketSize) -> tuple[Path, Path]:
    python = f"{platform.python_implementation()} {platform.python_version()}"
    key = json.dumps([_FORMAT, python, asdict(recipe)], sort_keys=True)
    name = f"{size}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    root = cache_dir() / "pocket"
    return root / name, root / f"{name}.partial"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time makes a folder."""
    from filelock import FileLock

    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        yield
