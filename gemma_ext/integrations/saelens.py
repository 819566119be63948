"""Folders of SAELens 6: cfg.json and sae_weights.safetensors.

| architecture                           | activation                  |
|----------------------------------------|-----------------------------|
| standard, transcoder                   | ReLU                        |
| jumprelu, jumprelu_(skip_)transcoder   | JumpReLU                    |
| gated                                  | Gated                       |
| topk, abstopk                          | TopK, AbsTopK               |
| batchtopk, matryoshka_batchtopk        | BatchTopK (training folder) |

Its `W_enc [D, F]` is our `encoder [F, D]` transposed. BatchTopK is saved as jumprelu with folded
norms, as SAELens itself does. Folders of SAELens before 6 are read too.
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
    AbsTopK,
    Activation,
    BatchTopK,
    Gated,
    JumpReLU,
    ReLU,
    SparseAutoencoder,
    TopK,
    as_jumprelu,
    fold_norms,
    fold_standardise,
    fold_whitening,
)

CONFIG, WEIGHTS, SPARSITY = "cfg.json", "sae_weights.safetensors", "sparsity.safetensors"
VERSION = "6.0.0"  # of the format that is written
_RENAMED = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}
_OLD_METADATA = (
    "model_name", "hook_name", "hook_head_index", "prepend_bos", "context_size", "dataset_path",
    "neuronpedia_id", "exclude_special_tokens", "seqpos_slice", "model_from_pretrained_kwargs",
)  # fmt: skip
_STANDARDISE = {
    "none": "none",
    "layer_norm": "layer_norm",
    "constant_norm_rescale": "unit_norm",
    "expected_average_only_in": "affine",
    "covariance_whitening": "none",
}


def load_saelens(folder: str | Path) -> SparseAutoencoder:
    """The dictionary of a folder.

    Scalings and whitenings that a training folder keeps beside its weights are part of it.

    Raises:
        ValueError: a file or tensor is missing, an architecture that is not in the table.
    """
    folder = Path(folder)
    config = upgraded(files.read_json(folder / CONFIG))
    tensors = files.read_safetensors(folder / WEIGHTS)
    sae = from_saelens(config, tensors, folder)
    if config["normalize_activations"] == "expected_average_only_in":
        beside = folder / "activation_scaler.json"
        factor = files.read_json(beside)["scaling_factor"] if beside.exists() else None
        sae.input_factor.fill_(1.0 if factor is None else factor)
    if config["normalize_activations"] == "covariance_whitening":
        found = files.read_safetensors(folder / "activation_whitening.safetensors")
        if sae.score_norm is not None:
            fold_norms(sae)
        fold_whitening(sae, found["mean"], found["matrix"], found["inverse_matrix"])
    return sae


def from_saelens(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: object = "cfg"
) -> SparseAutoencoder:
    """The dictionary of a configuration and a state dict of SAELens 6."""
    architecture = config["architecture"]
    rescaled = config.get("rescale_acts_by_decoder_norm")
    found: dict[str, Tensor] = {}
    encoder, decoder, bias = dictionaries.wanted(tensors, "W_enc", "W_dec", "b_dec", where=where)
    found |= {"encoder": encoder.mT, "decoder": decoder, "decoder_bias": bias}
    activation = _activation(architecture, config, where)
    if architecture == "gated":
        names = ("b_gate", "b_mag", "r_mag")
        gate, magnitude, ratio = dictionaries.wanted(tensors, *names, where=where)
        found |= {"encoder_bias": gate, "magnitude_bias": magnitude, "r_mag": ratio}
    else:
        found["encoder_bias"] = dictionaries.wanted(tensors, "b_enc", where=where)[0]
    if isinstance(activation, JumpReLU):
        if "log_threshold" in tensors:
            found["threshold"] = tensors["log_threshold"].exp()
        else:
            found["threshold"] = dictionaries.wanted(tensors, "threshold", where=where)[0]
    if isinstance(activation, BatchTopK):
        found["threshold"] = tensors.get("topk_threshold", torch.tensor(-1.0))
        rescaled = True if rescaled is None else rescaled
    if "W_skip" in tensors:
        found["skip"] = tensors["W_skip"]
    scale = tensors.get("scaling_factor")
    if scale is not None and not torch.all(scale == 1):
        raise ValueError(f"{where}: finetuning scaling factors other than 1 are not supported")
    return dictionaries.build(
        activation,
        found,
        config.get("metadata", {}),
        transcodes="transcoder" in architecture,
        subtract_bias=bool(config.get("apply_b_dec_to_input", True))
        and "transcoder" not in architecture,
        score_norm="joint" if rescaled else None,
        standardise=_STANDARDISE[config["normalize_activations"]],
        skip="skip" in found,
    )


def save_saelens(
    sae: SparseAutoencoder, folder: str | Path, *, sparsity: Tensor | None = None
) -> None:
    """Writes a folder that `sae_lens.SAE.load_from_disk` takes.

    Args:
        sparsity: share of tokens that every latent fires on [F]; its logarithm goes along.

    Raises:
        ValueError: something that the format has no word for.
    """
    config, tensors = to_saelens(sae)
    folder = Path(folder)
    files.write_safetensors(folder / WEIGHTS, tensors)
    if sparsity is not None:
        log = (sparsity.float() + 1e-10).log10()
        files.write_safetensors(folder / SPARSITY, {"sparsity": log})
    files.write_json(folder / CONFIG, config)


def to_saelens(sae: SparseAutoencoder) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and state dict of SAELens 6; `sae` stays as it is."""
    if sae.sources > 1:
        raise ValueError(
            f"sources: expected 1, since SAELens has no crosscoders, got {sae.sources}"
        )
    changed = isinstance(sae.activation, BatchTopK) or sae.standardise_kind == "affine"
    if changed:
        sae = dictionaries.clone(sae)
    if sae.standardise_kind == "affine":
        fold_standardise(sae)
    if isinstance(sae.activation, BatchTopK):
        as_jumprelu(sae)
    architecture = _architecture(sae)
    tensors = {
        "W_enc": sae.encoder.mT,
        "W_dec": sae.decoder,
        "b_dec": sae.decoder_bias,
    }
    if isinstance(sae.activation, Gated):
        tensors |= {
            "b_gate": sae.encoder_bias,
            "b_mag": sae.magnitude_bias,
            "r_mag": sae.r_mag,
        }
    else:
        tensors["b_enc"] = sae.encoder_bias
    if isinstance(sae.activation, JumpReLU):
        tensors["threshold"] = sae.threshold
    if sae.skip is not None:
        tensors["W_skip"] = sae.skip
    config = {
        "architecture": architecture,
        "d_in": sae.width,
        "d_sae": sae.features,
        "dtype": str(sae.encoder.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": sae.subtract_bias,
        "normalize_activations": _normalisation(sae),
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": VERSION} | sae.metadata,
    }
    if sae.transcodes:
        config["d_out"] = sae.output_width
    if isinstance(sae.activation, TopK | AbsTopK):
        config["k"] = sae.activation.k
        config["rescale_acts_by_decoder_norm"] = sae.score_norm is not None
    dtype = sae.encoder.dtype
    return config, {name: value.detach().to(dtype) for name, value in tensors.items()}


def upgraded(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration in the words of SAELens 6, from 6 or from before."""
    config = {_RENAMED.get(key, key): value for key, value in config.items()}
    config.setdefault("architecture", "standard")
    arguments = config.get("activation_fn_kwargs") or {}
    if config.get("activation_fn") == "topk" and "k" in arguments:
        config |= {"architecture": "topk", "k": arguments["k"]}
    normalise = config.get("normalize_activations") or "none"
    normalise = "expected_average_only_in" if normalise is True else normalise
    if normalise not in _STANDARDISE:
        raise ValueError(
            f"normalize_activations: expected one of {', '.join(_STANDARDISE)}, got {normalise!r}"
        )
    config["normalize_activations"] = normalise
    if "metadata" not in config:
        config["metadata"] = {k: config[k] for k in _OLD_METADATA if config.get(k) is not None}
    return config


def _activation(architecture: str, config: Mapping[str, Any], where: object) -> Activation:
    match architecture:
        case "standard" | "transcoder" | "skip_transcoder":
            return ReLU()
        case "jumprelu" | "jumprelu_transcoder" | "jumprelu_skip_transcoder":
            return JumpReLU(bandwidth=config.get("jumprelu_bandwidth", 0.05))
        case "gated":
            return Gated()
        case "topk":
            return TopK(int(config["k"]))
        case "abstopk":
            return AbsTopK(int(config["k"]))
        case "batchtopk" | "matryoshka_batchtopk":
            return BatchTopK(config["k"])
    raise ValueError(f"{where}: expected a known architecture, got {architecture!r}")


def _architecture(sae: SparseAutoencoder) -> str:
    kind = type(sae.activation)
    names = {
        ReLU: "standard",
        JumpReLU: "jumprelu",
        Gated: "gated",
        TopK: "topk",
        AbsTopK: "abstopk",
    }
    if kind not in names or (kind is JumpReLU and sae.activation.inclusive):
        raise ValueError(f"activation: SAELens has no {sae.activation}")
    if kind is TopK and not sae.activation.relu:
        raise ValueError("activation: SAELens has no TopK without a ReLU")
    if not sae.transcodes:
        if sae.skip is not None:
            raise ValueError("skip: SAELens has it in transcoders only")
        return names[kind]
    middle = "skip_" if sae.skip is not None else ""
    if kind not in (ReLU, JumpReLU):
        raise ValueError(f"activation: SAELens has no transcoder with {sae.activation}")
    return f"jumprelu_{middle}transcoder" if kind is JumpReLU else f"{middle}transcoder"


def _normalisation(sae: SparseAutoencoder) -> str:
    kinds = {"none": "none", "layer_norm": "layer_norm", "unit_norm": "constant_norm_rescale"}
    return kinds[sae.standardise_kind]
