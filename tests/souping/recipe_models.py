"""Folders of tiny models for recipes: fine-tunes of one base, with a tokenizer where asked for."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from tiny_tokenizers import save_bpe
from transformers.utils import logging

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def save_models(
    root: Path,
    *names: str,
    kind: str = "Gemma2",
    dtype: torch.dtype = torch.bfloat16,
    words: dict[str, list[str]] | None = None,
    **sizes,
) -> None:
    """Saves a model per name: the first is the base, the others are moved away from it a little.

    Args:
        words: of a model's tokenizer; its vocabulary then has the size of that.
    """
    logging.disable_progress_bar()
    for seed, name in enumerate(names):
        own = dict(sizes)
        if words and name in words:
            tokenizer = save_bpe(root / name, words[name], ("<s>", "</s>"))
            own["vocab_size"] = len(tokenizer)
        save_model(root / name, kind, dtype, seed, **own)


def save_model(folder: Path, kind: str, dtype: torch.dtype, seed: int, **sizes) -> None:
    torch.manual_seed(0)
    config_class = getattr(transformers, f"{kind}Config")
    keys = SIZES if kind != "GPT2" else {"vocab_size": 40, "n_embd": 16, "n_layer": 4, "n_head": 2}
    config = config_class(**{**keys, **sizes})
    model = getattr(transformers, f"{kind}{'LMHeadModel' if kind == 'GPT2' else 'ForCausalLM'}")
    built = model(config).to(dtype)
    generator = torch.Generator().manual_seed(1000 + seed)
    with torch.no_grad():
        for parameter in built.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if seed:
                parameter += (0.01 * noise).to(dtype)
            elif parameter.ndim == 1:
                parameter += (0.1 * noise).to(dtype)
    built.save_pretrained(folder)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder, in float64."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        found |= load_file(path)
    return {name: tensor.double() for name, tensor in found.items()}


def generates(folder: Path) -> bool:
    """Whether transformers loads the folder without a complaint about weights and runs it."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True
    )
    if info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"]:
        raise AssertionError(info)
    out = model.generate(torch.tensor([[0, 3, 2]]), max_new_tokens=2, do_sample=False)
    return out.shape[1] in (4, 5)
