"""Folders of dictionary_learning: ae.pt, a state dict, and config.json.

| dict_class             | activation      | subtracts its bias |
|------------------------|-----------------|--------------------|
| AutoEncoder            | ReLU            | yes                |
| AutoEncoderNew         | ReLU            | no                 |
| GatedAutoEncoder       | Gated           | yes                |
| JumpReluAutoEncoder    | JumpReLU        | no                 |
| AutoEncoderTopK        | TopK            | yes                |
| BatchTopKSAE           | BatchTopK       | yes                |
| MatryoshkaBatchTopKSAE | BatchTopK       | yes                |

The threshold that AutoEncoderTopK keeps and the group sizes of Matryoshka are in the metadata.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemma_ext import files
from gemma_ext.integrations import _dictionaries as dictionaries
from gemma_ext.nn.sparse_autoencoder import (
    BatchTopK,
    Gated,
    JumpReLU,
    ReLU,
    SparseAutoencoder,
    TopK,
    fold_standardise,
)

WEIGHTS, CONFIG = "ae.pt", "config.json"
_TRAINER = {
    "AutoEncoder": "StandardTrainer",
    "AutoEncoderNew": "StandardTrainerAprilUpdate",
    "GatedAutoEncoder": "GatedSAETrainer",
    "JumpReluAutoEncoder": "JumpReluTrainer",
    "AutoEncoderTopK": "TopKTrainer",
    "BatchTopKSAE": "BatchTopKTrainer",
    "MatryoshkaBatchTopKSAE": "MatryoshkaBatchTopKTrainer",
}
# ours: theirs, and whether theirs is transposed
_LINEAR = {"encoder": ("encoder.weight", False), "decoder": ("decoder.weight", True)}
_PLAIN = {"encoder": ("W_enc", True), "decoder": ("W_dec", False)}
_BATCH = {"threshold": ("threshold", False)}
_NAMES = {
    "AutoEncoder": _LINEAR
    | {"encoder_bias": ("encoder.bias", False), "decoder_bias": ("bias", False)},
    "AutoEncoderNew": _LINEAR
    | {"encoder_bias": ("encoder.bias", False), "decoder_bias": ("decoder.bias", False)},
    "GatedAutoEncoder": _LINEAR
    | {
        "encoder_bias": ("gate_bias", False),
        "decoder_bias": ("decoder_bias", False),
        "r_mag": ("r_mag", False),
        "magnitude_bias": ("mag_bias", False),
    },
    "JumpReluAutoEncoder": _PLAIN
    | {"encoder_bias": ("b_enc", False), "decoder_bias": ("b_dec", False)}
    | _BATCH,
    "AutoEncoderTopK": _LINEAR
    | {"encoder_bias": ("encoder.bias", False), "decoder_bias": ("b_dec", False)},
    "BatchTopKSAE": _LINEAR
    | {"encoder_bias": ("encoder.bias", False), "decoder_bias": ("b_dec", False)}
    | _BATCH,
    "MatryoshkaBatchTopKSAE": _PLAIN
    | {"encoder_bias": ("b_enc", False), "decoder_bias": ("b_dec", False)}
    | _BATCH,
}


def load_dictionary_learning(folder: str | Path) -> SparseAutoencoder:
    """The dictionary of a folder.

    Raises:
        ValueError: a file or tensor is missing, or a class that is not in the table.
    """
    folder = Path(folder)
    config = files.read_json(folder / CONFIG)
    return from_dictionary_learning(config, files.read_pickle(folder / WEIGHTS), folder)


def from_dictionary_learning(
    config: Mapping[str, Any], state: Mapping[str, Tensor], where: object = "config"
) -> SparseAutoencoder:
    """The dictionary of config.json and the state dict of ae.pt."""
    trainer = dict(config.get("trainer", {}))
    kind = trainer.get("dict_class")
    if kind not in _NAMES:
        raise ValueError(f"{where}: expected a dict_class of {', '.join(_NAMES)}, got {kind!r}")
    theirs = [name for name, _ in _NAMES[kind].values()]
    values = dictionaries.wanted(state, *theirs, where=where)
    found = {
        ours: value.mT if transposed else value
        for (ours, (_, transposed)), value in zip(_NAMES[kind].items(), values, strict=True)
    }
    metadata = {"dict_class": kind} | {
        ours: trainer[name]
        for ours, name in (
            ("model_name", "lm_name"),
            ("layer", "layer"),
            ("site", "submodule_name"),
        )
        if trainer.get(name) is not None
    }
    if kind == "AutoEncoderTopK" and "threshold" in state:
        metadata["threshold"] = float(state["threshold"])
    if "group_sizes" in state:
        metadata["group_sizes"] = state["group_sizes"].tolist()
    return dictionaries.build(
        _activation(kind, state, trainer),
        found,
        metadata,
        subtract_bias=kind not in ("AutoEncoderNew", "JumpReluAutoEncoder"),
    )


def save_dictionary_learning(sae: SparseAutoencoder, folder: str | Path) -> None:
    """Writes a folder that `dictionary_learning.utils.load_dictionary` takes.

    Raises:
        ValueError: what the format has no word for.
    """
    if sae.standardise_kind == "affine":
        sae = fold_standardise(dictionaries.clone(sae))
    for name, value, known in (
        ("sources", sae.sources, 1),
        ("score_norm", sae.score_norm, None),
        ("standardise", sae.standardise_kind, "none"),
        ("output_width", sae.output_width if sae.transcodes else None, None),
    ):
        if value != known:
            raise ValueError(f"{name}: expected {known}, which is all the format has, got {value}")
    kind = _dict_class(sae)
    state = {
        theirs: getattr(sae, ours).detach().mT if transposed else getattr(sae, ours).detach()
        for ours, (theirs, transposed) in _NAMES[kind].items()
    }
    state = {name: value.cpu().contiguous() for name, value in state.items()}
    trainer = {
        "trainer_class": _TRAINER[kind],
        "dict_class": kind,
        "activation_dim": sae.width,
        "dict_size": sae.features,
        "lm_name": sae.metadata.get("model_name"),
        "layer": sae.metadata.get("layer"),
        "submodule_name": sae.metadata.get("site"),
    }
    if kind in ("AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        trainer["k"] = int(sae.activation.k)
        state["k"] = torch.tensor(trainer["k"], dtype=torch.int)
    if kind == "AutoEncoderTopK":
        state["threshold"] = torch.tensor(float(sae.metadata.get("threshold", -1.0)))
    if kind == "MatryoshkaBatchTopKSAE":
        trainer["group_sizes"] = sae.metadata["group_sizes"]
        state["group_sizes"] = torch.tensor(trainer["group_sizes"])
    folder = Path(folder)
    files.write_pickle(folder / WEIGHTS, state)
    files.write_json(folder / CONFIG, {"trainer": trainer, "buffer": {}})


def _activation(kind: str, state: Mapping[str, Tensor], trainer: Mapping[str, Any]) -> Any:
    if kind == "GatedAutoEncoder":
        return Gated()
    if kind == "JumpReluAutoEncoder":
        return JumpReLU(bandwidth=trainer.get("bandwidth", 0.001))
    if kind in ("AutoEncoder", "AutoEncoderNew"):
        return ReLU()
    k = int(state["k"]) if "k" in state else int(trainer["k"])
    return TopK(k) if kind == "AutoEncoderTopK" else BatchTopK(k)


def _dict_class(sae: SparseAutoencoder) -> str:
    match sae.activation:
        case ReLU():
            return "AutoEncoder" if sae.subtract_bias else "AutoEncoderNew"
        case Gated() if sae.subtract_bias:
            return "GatedAutoEncoder"
        case JumpReLU(inclusive=False) if not sae.subtract_bias:
            return "JumpReluAutoEncoder"
        case TopK(relu=True) if sae.subtract_bias:
            return "AutoEncoderTopK"
        case BatchTopK(k=k) if sae.subtract_bias and int(k) == k:
            nested = "group_sizes" in sae.metadata
            return "MatryoshkaBatchTopKSAE" if nested else "BatchTopKSAE"
    raise ValueError(
        f"activation: dictionary_learning has no {sae.activation} with "
        f"subtract_bias={sae.subtract_bias}"
    )
