"""A model with its tokenizer and its text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gemma_ext.extras import require
from gemma_ext.lm.pretrained import read_pretrained
from gemma_ext.sae.sites import capture, find_site
from gemma_ext.sae.tokens import pack, read_texts, rows_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_HELD_OUT = 20  # one row of so many, where no other text is given


@dataclass(frozen=True)
class Opened:
    """A model with its tokenizer and rows of tokens for training and for what comes after.

    Attributes:
        others: models of the same vocabulary that a crosscoder is shared with.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    train: Tensor
    heldout: Tensor
    others: tuple[PreTrainedModel, ...] = ()

    @property
    def models(self) -> list[PreTrainedModel]:
        """The model and the others."""
        return [self.model, *self.others]


def open_model(
    name: str,
    *,
    text: str | None = None,
    heldout: str | None = None,
    context: int = 128,
    tokens: int | None = None,
    device: str = "cpu",
    dtype: str = "auto",
    against: Sequence[str] = (),
) -> Opened:
    """A model of the hub, of a folder, or the pocket, with text.

    Args:
        name: "pocket" or "pocket:small", which bring their own text; else as transformers takes it.
        text, heldout: sources of `read_texts`; without `heldout`, each twentieth row of `text`.
        context: T of the rows.
        tokens: to read from `text`, at most.
        against: more models, of the hub or of folders, that read the same tokens.

    Raises:
        ValueError: no text, or another vocabulary in `against`.
    """
    size = pocket_of(name)
    if size is None and text is None:
        raise ValueError(f"text: expected a source of text for {name}, got none")
    model, tokenizer = load_model(name, device=device, dtype=dtype)
    if text is None:
        from gemma_ext import pocket

        own = pocket.load_text(size)
        bos = tokenizer.bos_token_id
        train, held = (rows_of(ids, context, bos) for ids in (own.train_ids, own.heldout_ids))
    else:
        train = pack(read_texts(text), tokenizer, context, tokens=tokens)
        each = torch.arange(len(train)) % _HELD_OUT == _HELD_OUT - 1
        if heldout is None and not each.any():
            raise ValueError(f"text: expected at least {_HELD_OUT} rows, got {len(train)}")
        train, held = (train[~each], train[each]) if heldout is None else (train, train[:0])
    if heldout is not None:
        held = pack(read_texts(heldout), tokenizer, context)
    others = tuple(_other(each, model, device, dtype) for each in against)
    return Opened(name, model, tokenizer, train, held, others)


def _other(name: str, model: PreTrainedModel, device: str, dtype: str) -> PreTrainedModel:
    import transformers

    other = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    expected, found = (m.config.get_text_config().vocab_size for m in (model, other))
    if expected != found:
        raise ValueError(f"against: expected a vocabulary of {expected}, got {found} in {name}")
    return other.to(device).eval()


def load_model(
    name: str, *, device: str = "cpu", dtype: torch.dtype | str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model in evaluation mode and its tokenizer.

    Args:
        name: "pocket" or "pocket:small", a folder, or a name on the hub.
        dtype: of the weights, "auto" as they are stored; a pocket is in float32.

    Raises:
        ImportError: transformers is missing.
        ValueError: there is no model of that name.
    """
    require("a model of transformers", "hf", "transformers", "tokenizers", "safetensors")
    size = pocket_of(name)
    if size is not None:
        from gemma_ext import pocket

        made = pocket.load(size)
        model, tokenizer = made.model, made.tokenizer
    else:
        from transformers import AutoModelForCausalLM

        wanted = "model: expected pocket, a folder or a hub id"
        model, tokenizer = read_pretrained(AutoModelForCausalLM, name, wanted, dtype=dtype)
    return model.to(device).eval(), tokenizer


def pocket_of(name: str) -> str | None:
    """The size of a pocket's name, None for other names."""
    kind, _, size = name.partition(":")
    return (size or "nano") if kind == "pocket" else None


def width_of(model: PreTrainedModel, site: str | int) -> int:
    """D at a site that `find_site` knows; runs the model on one token."""
    ids = torch.zeros(1, 1, dtype=torch.int64, device=model.get_input_embeddings().weight.device)
    return capture(model, ids, [find_site(model, site)])[0].shape[-1]
