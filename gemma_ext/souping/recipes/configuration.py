"""config.json of the output: that of one model, with what the merge changes set anew."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

DEPTH_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers")
_DTYPE_KEYS = ("dtype", "torch_dtype")
_TOKEN_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")

Config = dict[str, Any]


def read_json(path: Path) -> Config:
    """A JSON object.

    Raises:
        ValueError: it is none, in one sentence.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: expected JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(found).__name__}")
    return found


def read_config(folder: Path) -> Config | None:
    """The config.json of a model's folder; None without one.

    Raises:
        ValueError: no JSON, or a model that is quantised, but not into fp8 weights and scales.
    """
    path = folder / "config.json"
    if not path.is_file():
        return None
    config = read_json(path)
    quantised = config.get("quantization_config")
    if quantised and not _is_fp8(quantised):
        kind = quantised.get("quant_method", "quantised")
        raise ValueError(f"{path}: expected plain weights, got {kind} ones; merge the original")
    return config


def _is_fp8(quantised: Config) -> bool:
    return (
        quantised.get("quant_method") in ("fp8", "fbgemm_fp8")
        or quantised.get("format") == "float-quantized"
    )


def set_depth(
    config: Config,
    old: int,
    layers: Sequence[tuple[Config | None, int]],
    part: str | None = None,
) -> None:
    """Sets the number of layers, and what the config lists layer by layer.

    Args:
        old: number of layers in the models.
        layers: of the output: the config and the layer each one comes from.
        part: the module that is meant, where the config has one for each.

    Raises:
        ValueError: no number of layers that is `old`.
    """
    own = _sections_of_depth(config, old, part)
    if not own:
        raise ValueError(f"config.json: expected one of {', '.join(DEPTH_KEYS)} to be {old}")
    section = own[0]
    for key in [key for key in DEPTH_KEYS if section.get(key) == old]:
        section[key] = len(layers)
    for key, value in section.items():
        if isinstance(value, list) and len(value) == old:
            section[key] = [_layer_value(source, key, value, layer) for source, layer in layers]


def set_rows(config: Config, old: int, new: int) -> None:
    """Sets the size of the vocabulary wherever it was `old`."""
    for section in _sections(config):
        if section.get("vocab_size") == old:
            section["vocab_size"] = new


def set_dtype(config: Config, name: str) -> None:
    """Sets the dtype, under the key that the config has for it."""
    for section in _sections(config):
        for key in _DTYPE_KEYS:
            if key in section:
                section[key] = name
    if not any(key in config for key in _DTYPE_KEYS):
        config["dtype"] = name


def move_tokens(config: Config, old: Mapping[str, int], new: Mapping[str, int]) -> None:
    """Gives the special tokens in a config the ids that their texts have in another vocabulary.

    A token that the new vocabulary lacks is left out.
    """
    texts = {index: text for text, index in old.items()}
    for section in _sections(config):
        for key in _TOKEN_KEYS:
            ids = section.get(key)
            if ids is None:
                continue
            several = ids if isinstance(ids, list) else [ids]
            moved = [new[texts[i]] for i in several if texts.get(i) in new]
            section[key] = moved if isinstance(ids, list) else next(iter(moved), None)


def _sections(config: Config) -> Iterator[Config]:
    yield config
    for value in config.values():
        if isinstance(value, dict):
            yield from _sections(value)


def _sections_of_depth(config: Config, depth: int, part: str | None) -> list[Config]:
    """Sections with that number of layers, those named after `part` before others."""
    named = [
        value
        for key, value in config.items()
        if part and isinstance(value, dict) and part.split("_")[0] in key
    ]
    ordered = [*named, *_sections(config)]
    return [s for s in ordered if any(s.get(key) == depth for key in DEPTH_KEYS)]


def _layer_value(source: Config | None, key: str, default: list[Any], layer: int) -> Any:
    """Entry `layer` of a list in a source's config, else of the output's own."""
    for section in _sections(source or {}):
        value = section.get(key)
        if isinstance(value, list) and layer < len(value):
            return value[layer]
    return default[min(layer, len(default) - 1)]
