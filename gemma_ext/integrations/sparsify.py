"""Folders of sparsify (cfg.json, sae.safetensors), and its kernels replaced by ours.

    with fast_sparsify():
        trainer.fit()        # sparsify's own trainer

sparsify's encoder holds [N, F] pre-activations and loses the gradient of what AuxK and Multi-TopK
take from them; ours holds them only when a loss asks, and keeps the gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn import functional

from gemma_ext import files
from gemma_ext.integrations import _dictionaries as dictionaries
from gemma_ext.nn.sparse_autoencoder import GroupMax, SparseAutoencoder, TopK
from gemma_ext.ops.sae import Codes, decode, encode_group_max, encode_topk

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"


def load_sparsify(folder: str | Path) -> SparseAutoencoder:
    """The dictionary of one hook point's folder.

    It follows sparsify's own forward: W_dec is [F, D], and the bias is subtracted from the input
    unless it transcodes.

    Raises:
        ValueError: a file or tensor is missing.
    """
    folder = Path(folder)
    config = files.read_json(folder / CONFIG)
    state = files.read_safetensors(folder / WEIGHTS)
    names = ("encoder.weight", "encoder.bias", "W_dec", "b_dec")
    encoder, bias, decoder, out = dictionaries.wanted(state, *names, where=folder)
    found = {
        "encoder": encoder,
        "encoder_bias": bias,
        "decoder": decoder,
        "decoder_bias": out,
    }
    if "W_skip" in state:
        found["skip"] = state["W_skip"]
    transcodes = bool(config.get("transcode"))
    kind = config.get("activation", "topk")
    if kind not in ("topk", "groupmax"):
        raise ValueError(f"{folder}: expected the activation topk or groupmax, got {kind!r}")
    k = int(config["k"])
    multi = 4 if config.get("multi_topk") else 1
    return dictionaries.build(
        TopK(k, multi) if kind == "topk" else GroupMax(k),
        found,
        {"hook_name": folder.name},
        transcodes=transcodes,
        subtract_bias=not transcodes,
        unit_norm=bool(config.get("normalize_decoder", True)) and not transcodes,
        skip="skip" in found,
    )


def save_sparsify(sae: SparseAutoencoder, folder: str | Path) -> None:
    """Writes a folder that `SparseCoder.load_from_disk` takes.

    Raises:
        ValueError: what the format has no word for.
    """
    kinds = {TopK: "topk", GroupMax: "groupmax"}
    if type(sae.activation) not in kinds or not getattr(sae.activation, "relu", True):
        raise ValueError(f"activation: expected TopK or GroupMax, got {sae.activation}")
    for name, value, known in (
        ("sources", sae.sources, 1),
        ("score_norm", sae.score_norm, None),
        ("standardise", sae.standardise_kind, "none"),
        ("subtract_bias", sae.subtract_bias, not sae.transcodes),
        ("output_width", sae.output_width, sae.width),
    ):
        if value != known:
            raise ValueError(f"{name}: expected {known}, which is all the format has, got {value}")
    tensors = {
        "encoder.weight": sae.encoder,
        "encoder.bias": sae.encoder_bias,
        "W_dec": sae.decoder,
        "b_dec": sae.decoder_bias,
    }
    if sae.skip is not None:
        tensors["W_skip"] = sae.skip
    folder = Path(folder)
    files.write_safetensors(folder / WEIGHTS, tensors)
    config = {
        "activation": kinds[type(sae.activation)],
        "expansion_factor": max(1, sae.features // sae.width),
        "normalize_decoder": sae.unit_norm,
        "num_latents": sae.features,
        "k": sae.activation.k,
        "multi_topk": getattr(sae.activation, "multi", 1) > 1,
        "skip_connection": sae.skip is not None,
        "transcode": sae.transcodes,
        "d_in": sae.width,
    }
    files.write_json(folder / CONFIG, config)


class EncoderOutput(NamedTuple):
    """As of sparsify: top_acts and top_indices [N, k], pre_acts [N, F] once somebody looks."""

    top_acts: Tensor
    top_indices: Tensor
    pre_acts: Any


def fused_encoder(
    input: Tensor, weight: Tensor, bias: Tensor, k: int, activation: str
) -> EncoderOutput:
    """relu(input weightᵀ + bias) and its k best, by the ops of this package; arguments of sparsify.

    Raises:
        ValueError: an activation other than topk and groupmax.
    """
    if activation == "topk":
        codes = encode_topk(input, weight, bias, k=k).codes
    elif activation == "groupmax":
        codes = encode_group_max(input, weight, bias, groups=k)
    else:
        raise ValueError(f"activation: expected topk or groupmax, got {activation!r}")
    shape = (*codes.shape, k)
    values = codes.values.relu().to(input.dtype).view(shape)
    return EncoderOutput(values, codes.indices.long().view(shape), PreActs(input, weight, bias))


def decoder_impl(top_indices: Tensor, top_acts: Tensor, W_dec: Tensor) -> Tensor:
    """Σ_j acts_j W_dec[:, index_j]: the decoder's product [N, D] of sparsify, W_dec [D, F]."""
    leading, k = top_indices.shape[:-1], top_indices.shape[-1]
    codes = Codes(
        top_acts.float().reshape(-1, k),
        top_indices.int().reshape(-1, k),
        None,
        leading,
        W_dec.shape[1],
    )
    return decode(codes, W_dec.mT)


class PreActs:
    """relu(x Wᵀ + b) [N, F] that exists once a torch function or a method asks for it."""

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor) -> None:
        self._parts, self._dense = (x, weight, bias), None

    def dense(self) -> Tensor:
        """The tensor, with its gradient."""
        if self._dense is None:
            self._dense = functional.linear(*self._parts).relu()
        return self._dense

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.dense(), name)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        def real(value: Any) -> Any:
            return value.dense() if isinstance(value, PreActs) else value

        return func(*map(real, args), **{k: real(v) for k, v in (kwargs or {}).items()})


@contextmanager
def fast_sparsify() -> Iterator[None]:
    """sparsify with this package's encoder and decoder, until the block ends.

    Raises:
        ImportError: sparsify is missing.
    """
    try:
        from sparsify import sparse_coder
    except ImportError:
        raise ImportError("fast_sparsify needs sparsify: pip install eai-sparsify") from None
    before = sparse_coder.fused_encoder, sparse_coder.decoder_impl
    sparse_coder.fused_encoder, sparse_coder.decoder_impl = fused_encoder, decoder_impl
    try:
        yield
    finally:
        sparse_coder.fused_encoder, sparse_coder.decoder_impl = before
