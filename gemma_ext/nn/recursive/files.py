"""A recursive model on disk.

config.json             the source's, L layers, and "recursive": the plan
model.safetensors       stored layers once, under their stored index (or shards and an index)
depth_lora/             matrices of each depth, PEFT's layout, scale 1
depth_prefix.safetensors, exit_head.safetensors     where there are such
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemma_ext.nn.recursive._build import build, quiet
from gemma_ext.nn.recursive.exits import ExitHead
from gemma_ext.nn.recursive.plan import Plan
from gemma_ext.nn.recursive.prefix import add_prefixes, attention_of
from gemma_ext.nn.recursive.tying import decoder_layers, make_recursive

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
LORA, ADAPTER, ADAPTER_CONFIG = "depth_lora", "adapter_model.safetensors", "adapter_config.json"
PREFIX, EXIT_HEAD = "depth_prefix.safetensors", "exit_head.safetensors"
_PEFT = "base_model.model."


def save(model: Any, folder: str | Path) -> Path:
    """Writes a recursive model; every file beside its place, then renamed.

    A recursive model that the folder held is replaced.

    Raises:
        ValueError: the model is not recursive.
    """
    if getattr(model.config, "recursive", None) is None:
        raise ValueError("model: expected a recursive one, got one without config.recursive")
    folder = Path(folder)
    plan = Plan.of_model(model)
    name, layers = decoder_layers(model)
    state, seen = {}, set()
    for key, tensor in model.state_dict().items():
        if not key.startswith(f"{name}.") and tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())  # a tied head is the embedding
            state[key] = tensor
    lora, prefix = {}, {}
    for depth, layer in enumerate(layers):
        stored = plan.stored_of_depth[depth]
        for key, tensor in layer.state_dict().items():
            if ".lora_" in key:
                lora[f"{_PEFT}{name}.{depth}.{key}.weight"] = tensor
            elif key.endswith(".prefix"):
                prefix[f"{depth}.prefix"] = tensor
            else:
                state.setdefault(f"{name}.{stored}.{key}", tensor)
    head = {key.removeprefix("exit_head."): state.pop(key) for key in _exit_keys(state)}
    folder.mkdir(parents=True, exist_ok=True)
    model.config.architectures = [type(model).__name__]
    model.config.dtype = model.dtype
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    write_tensors(folder / WEIGHTS, state)
    for path, tensors in (
        (folder / LORA / ADAPTER, lora),
        (folder / PREFIX, prefix),
        (folder / EXIT_HEAD, head),
    ):
        path.unlink(missing_ok=True)
        if tensors:
            path.parent.mkdir(exist_ok=True)
            write_tensors(path, tensors)
    if lora:
        write_adapter_config(folder, plan, name)
    return folder


def load(
    folder: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> Any:
    """A recursive model as `save` or a conversion wrote it; any other folder as a vanilla model.

    Args:
        folder: of the model.
        dtype: of the weights; as stored by default.

    Returns:
        the model in evaluation mode; its layers share Parameters.

    Raises:
        ValueError: a file is missing or does not fit the plan.
        ImportError: transformers or safetensors is missing.
    """
    transformers = _transformers()
    folder = Path(folder)
    config = transformers.AutoConfig.from_pretrained(folder)
    if getattr(config, "recursive", None) is None:
        with quiet():
            vanilla = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype or "auto"
            )
        return vanilla.to(device).eval()
    plan = Plan.from_dict(config.recursive)
    stored = {k: t if dtype is None else t.to(dtype) for k, t in read_weights(folder).items()}
    model = assemble(config, plan, stored)
    if plan.ranks:
        fill_lora(model, _read(folder / LORA / ADAPTER))
    if plan.prefix:
        _fill_prefix(model, plan.prefix, _read(folder / PREFIX))
    if (folder / EXIT_HEAD).exists():
        _fill_exit_head(model, _read(folder / EXIT_HEAD))
    return model.to(device).eval()


def assemble(config: Any, plan: Plan, stored: Mapping[str, Tensor]) -> Any:
    """The recursive model of a config whose tensors are `stored`, by stored index.

    The tensors become its Parameters as they are. Matrices of depths are as of `DepthLinear`.

    Raises:
        ValueError: a tensor is missing, left over or of another shape.
    """
    transformers = _transformers()
    config = copy.deepcopy(config)
    if hasattr(config, "recursive"):
        del config.recursive
    cls = transformers.AutoModelForCausalLM._model_mapping[type(config)]
    with torch.device("meta"):
        name, _ = decoder_layers(cls(config))
    state = {key: t for key, t in stored.items() if not key.startswith(f"{name}.")}
    for depth, s in enumerate(plan.stored_of_depth):
        start = f"{name}.{s}."
        for key in (key for key in stored if key.startswith(start)):
            state[f"{name}.{depth}.{key.removeprefix(start)}"] = stored[key]
    known = tuple(f"{name}.{s}." for s in range(plan.stored_layers))
    for key in stored:
        if key.startswith(f"{name}.") and not key.startswith(known):
            raise ValueError(f"weights: expected {plan.stored_layers} stored layers, got {key}")
    model = build(cls, config, state)
    return make_recursive(model, plan)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of `model.safetensors` or its shards.

    Raises:
        ValueError: neither is there.
    """
    from safetensors.torch import load_file

    if (folder / INDEX).exists():
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        names = sorted(set(index["weight_map"].values()))
        return {k: t for name in names for k, t in load_file(folder / name).items()}
    if not (folder / WEIGHTS).exists():
        raise ValueError(f"{folder}: expected {WEIGHTS} or {INDEX}, got neither")
    return load_file(folder / WEIGHTS)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file, written beside its place and renamed."""
    from safetensors.torch import save_file

    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    save_file(plain, beside, {"format": "pt"})
    os.replace(beside, path)


def write_adapter_config(folder: Path, plan: Plan, layers: str) -> None:
    """`adapter_config.json` with which PEFT puts the matrices on L tied layers, at scale 1.

    Args:
        folder: of the model.
        layers: name of its list of layers.
    """
    ranks = {name: rank for name, rank in plan.ranks.items() if rank}
    most = max(ranks.values())
    record = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": most,
        "lora_alpha": most,
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "target_modules": sorted(ranks),
        "layers_to_transform": [
            depth
            for depth in range(plan.layers)
            if any(plan.rank_of(depth, linear) for linear in ranks)
        ],
        "layers_pattern": layers.rsplit(".", 1)[-1],
    }
    path = folder / LORA / ADAPTER_CONFIG
    path.parent.mkdir(exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    beside.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    os.replace(beside, path)


def lora_key(layers: str, depth: int, linear: str, factor: str) -> str:
    """The name of a matrix in the adapter's file; `factor` is "A" or "B"."""
    return f"{_PEFT}{layers}.{depth}.{linear}.lora_{factor}.weight"


def fill_lora(model: Any, found: Mapping[str, Tensor]) -> None:
    """Sets the matrices of all depths from tensors named as in the adapter's file.

    Raises:
        ValueError: one is missing, left over or of another shape.
    """
    name, layers = decoder_layers(model)
    own = {
        f"{_PEFT}{name}.{key}.weight": p for key, p in layers.named_parameters() if ".lora_" in key
    }
    _fill(ADAPTER, own, found)


def _fill_prefix(model: Any, count: int, found: Mapping[str, Tensor]) -> None:
    add_prefixes(model, count)
    own = {
        f"{depth}.prefix": attention_of(layer).prefix
        for depth, layer in enumerate(decoder_layers(model)[1])
    }
    _fill(PREFIX, own, found)


def _fill_exit_head(model: Any, found: Mapping[str, Tensor]) -> None:
    weight = model.get_output_embeddings().weight
    model.exit_head = ExitHead(weight, found["lora_A"].shape[0])
    _fill(EXIT_HEAD, dict(model.exit_head.named_parameters()), found)


def _fill(file: str, own: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    shapes = [{key: tuple(t.shape) for key, t in group.items()} for group in (own, found)]
    if shapes[0] != shapes[1]:
        key = sorted(key for key in {*own, *found} if shapes[0].get(key) != shapes[1].get(key))[0]
        raise ValueError(
            f"{file}: expected {key} of {shapes[0].get(key)}, got {shapes[1].get(key)}"
        )
    with torch.no_grad():
        for key, parameter in own.items():
            parameter.copy_(found[key])


def _read(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    if not path.exists():
        raise ValueError(f"expected the file {path}, which the plan asks for, got none")
    return load_file(path)


def _exit_keys(names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith("exit_head.")]


def _transformers() -> Any:
    try:
        import safetensors  # noqa: F401
        import transformers
    except ImportError:
        raise ImportError(
            "recursive models need transformers: pip install 'gemma_ext[hf]'"
        ) from None
    return transformers
