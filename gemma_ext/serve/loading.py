"""From the name of a model to its weights and its tokenizer, where it computes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def load_model(
    name: str, device: torch.device, dtype: torch.dtype | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal LM in evaluation mode, recursive where its folder says so, and its tokenizer.

    Args:
        name: "pocket", "pocket:nano", a folder, or the id of a hub.
        dtype: of the weights; None for the stored one.

    Raises:
        ValueError: nothing of that name, or something that cannot be read.
    """
    kind, _, size = name.partition(":")
    if kind == "pocket":
        from gemma_ext import pocket

        if size and size not in pocket.SIZES:
            raise ValueError(
                f"model: expected pocket:{' or pocket:'.join(pocket.SIZES)}, got {name!r}"
            )
        made = pocket.load(size or "small")
        return made.model.to(device, dtype).eval(), made.tokenizer
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from gemma_ext.nn import recursive

    folder = Path(name).is_dir()
    wanted = f"model: expected pocket, a folder or the id of a hub, got {name!r}"
    if not folder and name.startswith(("/", ".", "~")):
        raise ValueError(wanted)
    if folder and not (Path(name) / "config.json").is_file():
        raise ValueError(f"model: expected a folder with a config.json, got {name!r}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        if folder:
            return recursive.load(name, dtype=dtype, device=device), tokenizer
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype or "auto")
    except (OSError, ValueError, SafetensorError) as error:
        why = str(error).partition("\n")[0]
        raise ValueError(f"{wanted}: {why}") from error
    return model.to(device).eval(), tokenizer


def served_name(model: str) -> str:
    """ "pocket" for the pocket, the folder's own name for a folder, the id for a hub's model."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def ends_of_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Tokens that end a text: of the generation config, the config or the tokenizer."""
    for holder in (model.generation_config, model.config, tokenizer):
        ends = getattr(holder, "eos_token_id", None)
        if ends is not None:
            return tuple(ends) if isinstance(ends, (list, tuple)) else (ends,)
    return ()


def device_of(name: str) -> torch.device:
    """cpu, cuda, cuda:1, or a card if there is one for "auto".

    Raises:
        ValueError: a device of another kind, or a card that is not there.
    """
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if cards else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected cpu, cuda, cuda:1 or auto, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= cards:
        raise ValueError(f"device: expected one of the {cards} cards that are there, got {name!r}")
    return device


def dtype_of(name: str, device: torch.device) -> torch.dtype | None:
    """Of `DTYPES`; for "auto" float32 on a CPU, None for the stored one elsewhere.

    Raises:
        ValueError: another name.
    """
    if name == "auto":
        return torch.float32 if device.type == "cpu" else None
    if name not in DTYPES:
        raise ValueError(f"dtype: expected auto, {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]
