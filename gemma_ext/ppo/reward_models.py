"""Reward functions from their names, and modules of sequence classification as rewards."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gemma_ext.extras import require
from gemma_ext.lm.pretrained import read_pretrained
from gemma_ext.nn._models import unwrap
from gemma_ext.ppo.responses import Responses


def load_reward(source: str, device: torch.device | str = "cpu") -> tuple[Any, Any]:
    """A reward function and the tokenizer it needs, or None.

    Args:
        source: module:function, where the module is imported as from the working folder; else a
            folder or hub id of a sequence classification with one output.

    Raises:
        ValueError: there is no such module, function or folder, or one with several outputs.
    """
    module, colon, name = source.partition(":")
    if colon and not Path(source).exists():
        if "" not in sys.path:
            sys.path.insert(0, "")
        try:
            return getattr(import_module(module), name), None
        except ModuleNotFoundError as error:
            raise ValueError(f"reward: expected a module {module}, got {error}") from None
        except SyntaxError as error:
            raise ValueError(f"reward: expected Python in {module}, got {error}") from None
        except AttributeError:
            raise ValueError(f"reward: expected {name} in {module}, got none") from None
    require("a reward model", "hf", "transformers", "safetensors")
    from transformers import AutoModelForSequenceClassification

    wanted = "reward: expected module:function, a folder or a hub id"
    model, tokenizer = read_pretrained(AutoModelForSequenceClassification, source, wanted)
    if model.config.num_labels != 1:
        raise ValueError(f"reward: expected one output of {source}, got {model.config.num_labels}")
    return model.to(device), tokenizer


def padded_alike(module: nn.Module, tokenizer: Any) -> None:
    """A tokenizer without padding pads with its end, as trl's; the module is told by what.

    Raises:
        ValueError: the tokenizer has neither.
    """
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
        raise ValueError(
            f"rewards: expected a tokenizer with a token of padding or of the end for "
            f"{type(unwrap(module)).__name__}, got one with neither"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    config = getattr(unwrap(module), "config", None)
    if config is not None and config.get_text_config().pad_token_id is None:
        config.get_text_config().pad_token_id = tokenizer.pad_token_id


def score_texts(module: nn.Module, tokenizer: Any, responses: Responses, batch: int) -> Tensor:
    """[B] of whole conversations, as the module's own tokenizer has them, `batch` at a time."""
    texts = [
        prompt + completion
        if isinstance(prompt, str)
        else tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)
        for prompt, completion in zip(responses.prompts, responses.completions, strict=True)
    ]
    device = next(module.parameters()).device
    found = []
    for start in range(0, len(texts), batch):
        inputs = tokenizer(
            text=texts[start : start + batch],
            return_tensors="pt",
            padding=True,
            padding_side="right",
            add_special_tokens=isinstance(responses.prompts[0], str),
        )
        inputs = {name: value.to(device) for name, value in inputs.items()}
        found.append(module(**inputs).logits[:, 0])
    return torch.cat(found)
