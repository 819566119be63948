"""Files of openai/sparse_autoencoder: one pickled state dict.

TopK stands for a layer norm of every token too, undone after the decoder. A tied decoder is the
encoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gemma_ext import files
from gemma_ext.integrations import _dictionaries as dictionaries
from gemma_ext.nn.sparse_autoencoder import ReLU, SparseAutoencoder, TopK


def load_openai(path: str | Path) -> SparseAutoencoder:
    """The dictionary of a .pt file.

    Raises:
        ValueError: a tensor is missing, or an activation other than ReLU and TopK.
    """
    return from_openai(files.read_pickle(Path(path)), path)


def from_openai(state: Mapping[str, Any], where: object = "state") -> SparseAutoencoder:
    """The dictionary of a state dict."""
    names = ("encoder.weight", "latent_bias", "pre_bias")
    encoder, latent_bias, pre_bias = dictionaries.wanted(state, *names, where=where)
    decoder = state["decoder.weight"].mT if "decoder.weight" in state else encoder
    kind = state.get("activation", "ReLU")
    if kind == "TopK":
        options = state["activation_state_dict"]
        after = options.get("postact_fn", "ReLU")
        if after not in ("ReLU", "Identity"):
            raise ValueError(f"{where}: expected postact_fn ReLU or Identity, got {after!r}")
        activation = TopK(int(options["k"]), relu=after == "ReLU")
    elif kind == "ReLU":
        activation = ReLU()
    else:
        raise ValueError(f"{where}: expected the activation ReLU or TopK, got {kind!r}")
    return dictionaries.build(
        activation,
        {
            "encoder": encoder,
            "encoder_bias": latent_bias,
            "decoder": decoder,
            "decoder_bias": pre_bias,
        },
        {},
        standardise="layer_norm" if kind == "TopK" else "none",
    )


def save_openai(sae: SparseAutoencoder, path: str | Path) -> None:
    """Writes a file that `sparse_autoencoder.Autoencoder.from_state_dict` takes.

    Raises:
        ValueError: anything but a TopK under a layer norm or a plain ReLU, which is all it has.
    """
    topk = isinstance(sae.activation, TopK)
    kind = "layer_norm" if topk else "none"
    if not topk and not isinstance(sae.activation, ReLU):
        raise ValueError(f"activation: expected ReLU or TopK, got {sae.activation}")
    for name, value, known in (
        ("standardise", sae.standardise_kind, kind),
        ("sources", sae.sources, 1),
        ("score_norm", sae.score_norm, None),
        ("subtract_bias", sae.subtract_bias, True),
    ):
        if value != known:
            raise ValueError(f"{name}: expected {known}, which is all the format has, got {value}")
    state: dict[str, Any] = {
        "pre_bias": sae.decoder_bias.detach().cpu(),
        "latent_bias": sae.encoder_bias.detach().cpu(),
        "encoder.weight": sae.encoder.detach().cpu(),
        "decoder.weight": sae.decoder.detach().mT.cpu().contiguous(),
        "stats_last_nonzero": torch.zeros(sae.features, dtype=torch.long),
        "latents_activation_frequency": torch.ones(sae.features),
        "latents_mean_square": torch.zeros(sae.features),
        "activation": "TopK" if topk else "ReLU",
    }
    if topk:
        after = "ReLU" if sae.activation.relu else "Identity"
        state["activation_state_dict"] = {"k": sae.activation.k, "postact_fn": after}
    files.write_pickle(Path(path), state)
