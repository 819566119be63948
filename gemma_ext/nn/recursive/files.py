"""A recursive model on disk.

config.json             the source's, L layers, and "recursive": the plan
generation_config.json  the source's, where it can generate
model.safetensors       stored layers once, under their stored index (or shards and an index)
depth_lora/             matrices of each depth, PEFT's layout, scale 1
depth_prefix.safetensors, exit_head.safetensors     where there are such
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from gemma_ext.nn.recursive._build import build, quiet
from gemma_ext.nn.recursive.exits import ExitHead
from gemma_ext.nn.recursive.parts import (
    ADAPTER,
    EXIT_HEAD,
    GENERATION,
    LORA,
    PEFT,
    PREFIX,
    WEIGHTS,
    read_part,
    read_weights,
    replace_model,
    write_adapter_config,
    write_tensors,
)
from gemma_ext.nn.recursive.plan import Plan
from gemma_ext.nn.recursive.prefix import add_prefixes, attention_of
from gemma_ext.nn.recursive.tying import decoder_layers, make_recursive


def save(model: Any, folder: str | Path) -> Path:
    """Writes a recursive model; every file beside its place, then renamed, config.json last.

    A model that the folder held is replaced.

    Raises:
        ValueError: the model is not recursive, or its depths no longer share what its plan ties.
    """
    if getattr(model.config, "recursive", None) is None:
        raise ValueError("model: expected a recursive one, got one without config.recursive")
    folder = Path(folder)
    plan = Plan.of_model(model)
    name, _ = decoder_layers(model)
    tensors = _tensors(model, plan)
    model.config.architectures = [type(model).__name__]
    model.config.dtype = model.dtype
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder, prefix="model.", suffix=".tmp") as beside:
        made = Path(beside)
        model.config.save_pretrained(made)
        if model.can_generate():
            model.generation_config.save_pretrained(made)
        for path, group in tensors.items():
            if group:
                (made / path).parent.mkdir(exist_ok=True)
                write_tensors(made / path, group)
        if (made / LORA).exists():
            write_adapter_config(made, plan, name)
        replace_model(made, folder)
    return folder


def _tensors(model: Any, plan: Plan) -> dict[Path, dict[str, Tensor]]:
    """What each file holds."""
    name, layers = decoder_layers(model)
    tied = model.config.get_text_config().tie_word_embeddings
    state: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, tensor in model.state_dict().items():
        if key.startswith(f"{name}."):
            continue
        if tensor.data_ptr() not in seen:
            state[key] = tensor
        elif not tied:  # else the head is the embedding, and is so again when it is loaded
            state[key] = tensor.clone()
        seen.add(tensor.data_ptr())
    lora, prefix = {}, {}
    for depth, layer in enumerate(layers):
        stored = plan.stored_of_depth[depth]
        for key, tensor in layer.state_dict().items():
            if ".lora_" in key:
                lora[f"{PEFT}{name}.{depth}.{key}.weight"] = tensor
            elif key.endswith(".prefix"):
                prefix[f"{depth}.prefix"] = tensor
            else:
                shared = state.setdefault(f"{name}.{stored}.{key}", tensor)
                if shared.data_ptr() != tensor.data_ptr() and not torch.equal(shared, tensor):
                    raise ValueError(
                        f"model: expected the depths {plan.depths_of(stored)} to share {key}, got "
                        f"another at depth {depth}"
                    )
    heads = [key for key in state if key.startswith("exit_head.")]
    head = {key.removeprefix("exit_head."): state.pop(key) for key in heads}
    files = {WEIGHTS: state, f"{LORA}/{ADAPTER}": lora, PREFIX: prefix, EXIT_HEAD: head}
    return {Path(path): group for path, group in files.items()}


def load(
    folder: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> Any:
    """A recursive model as `save` or a conversion wrote it; any other folder as a vanilla model.

    Args:
        folder: of the model.
        dtype: of all weights; that of the config by default, as transformers has it.

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
    stored = read_weights(folder)
    if kind := dtype or config.dtype:
        stored = {key: t.to(kind) if t.is_floating_point() else t for key, t in stored.items()}
    model = assemble(config, plan, stored)
    if (folder / GENERATION).exists():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    if plan.ranks:
        fill_lora(model, read_part(folder / LORA / ADAPTER))
    if plan.prefix:
        _fill_prefix(model, plan.prefix, read_part(folder / PREFIX))
    if (folder / EXIT_HEAD).exists():
        _fill_exit_head(model, read_part(folder / EXIT_HEAD))
    return model.to(device).eval()


def assemble(config: Any, plan: Plan, stored: Mapping[str, Tensor]) -> Any:
    """The recursive model of a config whose tensors are `stored`, by stored index.

    Parameters have the dtypes of the tensors, see `build`; matrices of depths are as of
    `DepthLinear`.

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


def fill_lora(model: Any, found: Mapping[str, Tensor]) -> None:
    """Sets the matrices of all depths from tensors named as in the adapter's file.

    Raises:
        ValueError: one is missing, left over or of another shape.
    """
    name, layers = decoder_layers(model)
    own = {
        f"{PEFT}{name}.{key}.weight": p for key, p in layers.named_parameters() if ".lora_" in key
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


def _transformers() -> Any:
    try:
        import safetensors  # noqa: F401
        import transformers
    except ImportError:
        raise ImportError(
            "recursive models need transformers: pip install 'gemma_ext[hf]'"
        ) from None
    return transformers
