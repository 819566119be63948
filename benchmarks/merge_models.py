"""Checkpoints in the shape of Gemma-2-2B, a base and fine-tunes of it, for bench_merge."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from gemma_ext.files import new_folder

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM = 2304, 9216, 8, 4, 256
BASE_STD, DELTA_STD = 0.02, 4e-4  # of a Gemma's matrices, and of an ordinary fine-tune's changes
SHARD_BYTES = 1 << 30
BLOCK = 1 << 24  # elements made at once


def shapes(layers: int, vocab: int) -> dict[str, tuple[int, ...]]:
    """Tensors of a Gemma-2 with tied embeddings."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, HIDDEN)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            found[f"{prefix}.{norm}_layernorm.weight"] = (HIDDEN,)
        found |= {
            f"{prefix}.mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
            f"{prefix}.mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
            f"{prefix}.mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
            f"{prefix}.self_attn.q_proj.weight": (HEADS * HEAD_DIM, HIDDEN),
            f"{prefix}.self_attn.k_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
            f"{prefix}.self_attn.v_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
            f"{prefix}.self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD_DIM),
        }
    return {**found, "model.norm.weight": (HIDDEN,)}


def model_bytes(layers: int, vocab: int) -> int:
    return 2 * sum(math.prod(shape) for shape in shapes(layers, vocab).values())


def make_models(root: Path, layers: int, vocab: int, count: int) -> list[Path]:
    """Folders of the base and `count` fine-tunes, made once; bf16, in files of about 1 GiB."""
    folder = root / f"gemma2-{layers}-layers-{vocab}"
    paths = [folder / name for name in ("base", *(f"model{m}" for m in range(count)))]
    for m, path in enumerate(paths):
        if not path.is_dir():
            _write(path, layers, vocab, m)
    return paths


def _write(path: Path, layers: int, vocab: int, model: int) -> None:
    groups = list(_groups(layers, vocab))
    places = {}
    with new_folder(path) as beside:
        for i, group in enumerate(groups):
            file = f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors"
            save_file(
                {name: _tensor(name, shape, model) for name, shape in group.items()},
                beside / file,
                metadata={"format": "pt"},
            )
            places |= dict.fromkeys(group, file)
        index = {"metadata": {"total_size": model_bytes(layers, vocab)}, "weight_map": places}
        (beside / "model.safetensors.index.json").write_text(json.dumps(index))
        (beside / "config.json").write_text(json.dumps(_config(layers, vocab)))


def _groups(layers: int, vocab: int) -> Iterator[dict[str, tuple[int, ...]]]:
    group: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes(layers, vocab).items():
        size = 2 * sum(math.prod(s) for s in (*group.values(), shape))
        if group and size > SHARD_BYTES:
            yield group
            group = {}
        group[name] = shape
    yield group


def _tensor(name: str, shape: tuple[int, ...], model: int) -> Tensor:
    """The base's, or that plus a change, on the lattice of bf16."""
    own = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    change = torch.Generator().manual_seed(zlib.crc32(f"{model} {name}".encode()))
    out = torch.empty(math.prod(shape), dtype=torch.bfloat16)
    for block in out.split(BLOCK):
        block.copy_(torch.randn(len(block), generator=own) * BASE_STD)
        if model:
            block.copy_(torch.randn(len(block), generator=change).mul_(DELTA_STD).add_(block))
    return out.view(shape)


def _config(layers: int, vocab: int) -> dict:
    return {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": vocab,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
