"""Crosscoders of science-of-finetuning and of the open replication of the first one.

| file                                | from                                              |
|-------------------------------------|---------------------------------------------------|
| model.safetensors with config.json  | science-of-finetuning, saved to the hub           |
| model_final.pt, or any .pt          | science-of-finetuning, saved by its trainer       |
| cc_weights.pt with cfg.json         | ckkissane/crosscoder-model-diff-replication       |

Codes of the first two are chosen by p times a norm of the decoder (`code_normalization`), and its
threshold is in those units. DECOUPLED dictionaries, which choose for each source, are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemma_ext import files
from gemma_ext.integrations import _dictionaries as dictionaries
from gemma_ext.nn.sparse_autoencoder import BatchTopK, ReLU, SparseAutoencoder

CONFIG, WEIGHTS, LAST = "config.json", "model.safetensors", "model_final.pt"
OLDER_CONFIG, OLDER_WEIGHTS = "cfg.json", "cc_weights.pt"
_NORMS = {1: "sum", 2: "joint", 3: "mixed", 4: None}  # ids of the release; 5 is DECOUPLED
_CROSSCODER = 1


def load_crosscoder(path: str | Path) -> SparseAutoencoder:
    """The crosscoder of a folder or of a .pt file.

    Raises:
        ValueError: a file or tensor is missing, or a dictionary that chooses for each source.
    """
    path = Path(path)
    if path.is_file():
        return from_crosscoder(files.read_pickle(path), where=path)
    if (path / OLDER_WEIGHTS).exists():
        return from_replication(files.read_pickle(path / OLDER_WEIGHTS), path)
    if (path / WEIGHTS).exists():
        return from_crosscoder(files.read_safetensors(path / WEIGHTS), where=path)
    return from_crosscoder(files.read_pickle(path / LAST), where=path)


def from_crosscoder(state: Mapping[str, Tensor], where: object = "state") -> SparseAutoencoder:
    """The crosscoder of a state dict; names that torch.compile has prefixed are taken too."""
    state = {name.removeprefix("_orig_mod."): value for name, value in state.items()}
    names = ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")
    encoder, bias, decoder, out = dictionaries.wanted(state, *names, where=where)
    norm = int(state.get("code_normalization_id", _CROSSCODER))
    if norm not in _NORMS:
        raise ValueError(
            f"{where}: expected one code for all sources, got code normalisation {norm} (DECOUPLED)"
        )
    found = {
        "encoder": encoder.permute(2, 0, 1).flatten(1),
        "encoder_bias": bias,
        "decoder": decoder.permute(1, 0, 2).flatten(1),
        "decoder_bias": out.flatten(),
    }
    activation: BatchTopK | ReLU = ReLU()
    if "k" in state:
        activation = BatchTopK(float(state["k"]))
        found["threshold"] = state.get("threshold", torch.tensor(-1.0))
    mean = state.get("activation_mean")
    standardises = mean is not None and not mean.isnan().any()
    if standardises:
        found["input_mean"] = mean.flatten()
        found["input_factor"] = state["activation_global_scale"]
    return dictionaries.build(
        activation,
        found,
        {},
        sources=encoder.shape[0],
        subtract_bias=False,
        score_norm=_NORMS[norm],
        standardise="affine" if standardises else "none",
    )


def from_replication(state: Mapping[str, Tensor], where: object = "state") -> SparseAutoencoder:
    """The crosscoder of W_enc [M, D, F], W_dec [F, M, D], b_enc [F], b_dec [M, D]."""
    names = ("W_enc", "b_enc", "W_dec", "b_dec")
    encoder, bias, decoder, out = dictionaries.wanted(state, *names, where=where)
    found = {
        "encoder": encoder.permute(2, 0, 1).flatten(1),
        "encoder_bias": bias,
        "decoder": decoder.flatten(1),
        "decoder_bias": out.flatten(),
    }
    return dictionaries.build(
        ReLU(), found, {}, sources=encoder.shape[0], subtract_bias=False, score_norm="sum"
    )


def save_crosscoder(sae: SparseAutoencoder, folder: str | Path) -> None:
    """Writes a folder that the release's `from_pretrained` takes.

    Raises:
        ValueError: an activation other than ReLU and BatchTopK, a bias that is subtracted from the
            input, or a standardisation other than none and affine.
    """
    if not isinstance(sae.activation, ReLU | BatchTopK):
        raise ValueError(f"activation: expected ReLU or BatchTopK, got {sae.activation}")
    if sae.subtract_bias:
        raise ValueError("subtract_bias: expected False (fold_centre first), got True")
    if sae.standardise_kind not in ("none", "affine"):
        raise ValueError(f"standardise: expected none or affine, got {sae.standardise_kind}")
    if isinstance(sae.activation, BatchTopK) and int(sae.activation.k) != sae.activation.k:
        raise ValueError(f"k: expected a whole number, got {sae.activation.k}")
    m, d = sae.sources, sae.width
    ids = {norm: number for number, norm in _NORMS.items()}
    state = {
        "encoder.weight": sae.encoder.view(-1, m, d).permute(1, 2, 0),
        "encoder.bias": sae.encoder_bias,
        "decoder.weight": sae.decoder.view(-1, m, d).permute(1, 0, 2),
        "decoder.bias": sae.decoder_bias.view(m, d),
        "code_normalization_id": torch.tensor(ids[sae.score_norm]),
    } | _normaliser(sae)
    config: dict[str, Any] = {
        "activation_dim": d,
        "dict_size": sae.features,
        "num_layers": m,
        "code_normalization": ("CROSSCODER", "SAE", "MIXED", "NONE")[ids[sae.score_norm] - 1],
    }
    kind = "CrossCoder"
    if isinstance(sae.activation, BatchTopK):
        kind = "BatchTopKCrossCoder"
        config["k"] = int(sae.activation.k)
        state |= {
            "k": torch.tensor(config["k"], dtype=torch.int),
            "threshold": sae.threshold.float(),
        }
    folder = Path(folder)
    files.write_safetensors(folder / WEIGHTS, state)
    files.write_json(folder / CONFIG, config | {"dict_class": kind})
    files.write_json(folder / "trainer_config.json", {"trainer": {"dict_class": kind}})


def _normaliser(sae: SparseAutoencoder) -> dict[str, Tensor]:
    shape = sae.sources, sae.width
    if sae.standardise_kind == "none":
        nothing = torch.full(shape, torch.nan)
        return {
            "activation_mean": nothing,
            "activation_std": nothing.clone(),
            "activation_global_scale": torch.ones(sae.sources),
            "target_rms": torch.tensor(1.0),
        }
    # any deviation that gives this factor under target_rms 1 will do
    deviation = (sae.width**0.5 * sae.input_factor).reciprocal()[:, None].expand(shape)
    return {
        "activation_mean": sae.input_mean.view(shape),
        "activation_std": deviation,
        "activation_global_scale": sae.input_factor,
        "target_rms": torch.tensor(1.0),
    }
