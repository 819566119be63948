"""Gemma Scope (params.npz) and Gemma Scope 2 (params.safetensors with config.json).

All are JumpReLU dictionaries that take raw activations and do not subtract the decoder's bias.
Scope 2 has transcoders too, some with an affine skip, and cross-layer transcoders, whose decoder
[F, L, D] is one of L*D outputs here (`metadata["output_layers"]` is L).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemma_ext import files
from gemma_ext.integrations import _dictionaries as dictionaries
from gemma_ext.nn.sparse_autoencoder import (
    JumpReLU,
    SparseAutoencoder,
    as_jumprelu,
    fold_centre,
    fold_standardise,
)

ARRAYS, PARAMETERS, CONFIG = "params.npz", "params.safetensors", "config.json"
_HOOKS = {
    "resid_post": "blocks.{}.hook_resid_post",
    "attn_out": "blocks.{}.attn.hook_z",
    "mlp_out": "blocks.{}.hook_mlp_out",
    "transcoder": "blocks.{}.hook_mlp_in",
    "clt": "blocks.{}.hook_mlp_in",
    "-res": "blocks.{}.hook_resid_post",
    "-mlp": "blocks.{}.hook_mlp_out",
    "-att": "blocks.{}.attn.hook_z",
}


def load_gemma_scope(path: str | Path) -> SparseAutoencoder:
    """The dictionary of a folder, or of a .npz or .safetensors file.

    Embedding dictionaries of Gemma Scope (a folder `embedding` in the path) were trained on
    embeddings times sqrt(D); the factor is folded, so that they take what the others take.

    Raises:
        ValueError: a file or tensor is missing.
    """
    path = Path(path)
    if path.is_dir():
        present = [path / name for name in (ARRAYS, PARAMETERS) if (path / name).exists()]
        if not present:
            raise ValueError(f"{path}: expected {ARRAYS} or {PARAMETERS}")
        path = present[0]
    arrays = _read_npz(path) if path.suffix == ".npz" else files.read_safetensors(path)
    beside = path.with_name(CONFIG)
    config = files.read_json(beside) if beside.exists() else {}
    sae = from_gemma_scope(arrays, config, path)
    if "embedding" in path.parts:
        with torch.no_grad():
            sae.encoder /= sae.width**0.5
            sae.decoder *= sae.width**0.5
    layer = re.search(r"layer_(\d+)", str(path))
    if layer and "hook_name" not in sae.metadata:
        site = next((hook for part, hook in _HOOKS.items() if part in str(path)), None)
        if site:
            sae.metadata["hook_name"] = site.format(layer[1])
    return sae


def from_gemma_scope(
    arrays: Mapping[str, Tensor], config: Mapping[str, Any], where: object = "params"
) -> SparseAutoencoder:
    """The dictionary of arrays W_enc, W_dec, b_enc, b_dec, threshold, in either case."""
    arrays = {name.lower(): value for name, value in arrays.items()}
    architecture = config.get("architecture", "jump_relu")
    if architecture != "jump_relu":
        raise ValueError(f"{where}: expected the architecture jump_relu, got {architecture!r}")
    names = ("w_enc", "w_dec", "b_enc", "b_dec", "threshold")
    encoder, decoder, bias, out, threshold = dictionaries.wanted(arrays, *names, where=where)
    scale = arrays.get("scaling_factor")
    if scale is not None and not torch.all(scale == 1):
        raise ValueError(f"{where}: scaling factors other than 1 are not supported")
    metadata = {k: v for k, v in config.items() if k != "architecture"}
    if decoder.dim() == 3:
        metadata["output_layers"] = decoder.shape[1]
    found = {
        "encoder": encoder.mT,
        "decoder": decoder.flatten(1),
        "encoder_bias": bias,
        "decoder_bias": out.flatten(),
        "threshold": threshold,
    }
    skip = arrays.get("affine_skip_connection")
    if skip is not None:
        found["skip"] = skip.mT
    transcodes = "hf_hook_point_out" in config or decoder.dim() == 3 or skip is not None
    return dictionaries.build(
        JumpReLU(),
        found,
        metadata,
        subtract_bias=False,
        transcodes=transcodes or decoder.shape[1] != encoder.shape[0],
        skip=skip is not None,
    )


def save_gemma_scope(sae: SparseAutoencoder, folder: str | Path, *, version: int = 1) -> None:
    """Writes a folder of Gemma Scope (`version` 1, float32 arrays) or Gemma Scope 2.

    ReLU and BatchTopK dictionaries are written as the JumpReLU that they are at inference.

    Raises:
        ValueError: what the format has no word for.
    """
    if version not in (1, 2):
        raise ValueError(f"version: expected 1 or 2, got {version}")
    if sae.sources > 1:
        raise ValueError(f"sources: expected 1, got {sae.sources}")
    if version == 1 and sae.transcodes and sae.skip is not None:
        raise ValueError("skip: only version 2 has it")
    sae = dictionaries.clone(sae)
    if sae.standardise_kind == "affine":
        fold_standardise(sae)
    if sae.standardise_kind != "none":
        raise ValueError(f"standardise: expected none or affine, got {sae.standardise_kind}")
    fold_centre(as_jumprelu(sae))
    if sae.activation.inclusive:
        raise ValueError("activation: Gemma Scope has no inclusive thresholds")
    layers = sae.metadata.get("output_layers")
    decoder, out = sae.decoder, sae.decoder_bias
    if layers:
        decoder, out = decoder.unflatten(1, (layers, -1)), out.unflatten(0, (layers, -1))
    arrays = {
        "W_enc": sae.encoder.mT,
        "W_dec": decoder,
        "b_enc": sae.encoder_bias,
        "b_dec": out,
        "threshold": sae.threshold,
    }
    folder = Path(folder)
    if version == 1:
        _write_npz(folder / ARRAYS, arrays)
        return
    if sae.skip is not None:
        arrays["affine_skip_connection"] = sae.skip.mT
    files.write_safetensors(
        folder / PARAMETERS, {name.lower(): value for name, value in arrays.items()}
    )
    known = {k: v for k, v in sae.metadata.items() if k != "output_layers"}
    known["affine_connection"] = sae.skip is not None
    if sae.transcodes:
        known.setdefault("hf_hook_point_out", None)
    files.write_json(folder / CONFIG, {"architecture": "jump_relu"} | known)


def _read_npz(path: Path) -> dict[str, Tensor]:
    import numpy

    with numpy.load(path) as data:
        return {name: torch.from_numpy(data[name]) for name in data}


def _write_npz(path: Path, arrays: Mapping[str, Tensor]) -> None:
    import numpy

    with files.replacing(path) as beside, beside.open("wb") as file:
        numpy.savez(file, **{k: v.detach().float().cpu().numpy() for k, v in arrays.items()})
