"""Sparse dictionaries of activations: one module for every variant, crosscoders included.

    z = standardise(x)                          [..., M*D]
    p = (z - decoder_bias) encoderᵀ + encoder_bias
    f = activation(p)                           the active ones only, as lists
    x̂ = back(f decoder + decoder_bias)

No [N, F] tensor exists: the encoder's product goes straight to lists (`gemma_ext.ops.sae`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gemma_ext.nn.sparse_autoencoder import standardise
from gemma_ext.nn.sparse_autoencoder.activations import Activation, Latents, Second
from gemma_ext.nn.sparse_autoencoder.centre import centred_bias
from gemma_ext.ops.sae import Codes, decode

SCORE_NORMS = ("sum", "joint", "mixed")
_LEAST_NORM = 1e-8


class SparseAutoencoder(nn.Module):
    """A dictionary of `features` latents over activations of `width`.

    With `sources` M > 1 it is a crosscoder: shared latents over M models or layers, x [..., M, D].
    With `output_width` it is a transcoder: its target is another activation than its input.

    Args:
        width: D, of one source.
        features: F.
        activation: chooses the active latents: ReLU, TopK, BatchTopK, JumpReLU, ...
        sources: M.
        subtract_bias: the decoder's bias is taken off the input (SAELens: apply_b_dec_to_input).
        score_norm: latents are chosen by p times the norm of their decoder: "sum" of the norms of
            the sources, norm of the "joint" row, or "mixed" (joint + 0.1 sum, as the crosscoder
            release has it); None for p itself.
        unit_norm: decoder rows are kept at norm 1: gradients lose their parallel component, and
            `constrain` renormalises.
        standardise: kind of `gemma_ext.nn.sparse_autoencoder.standardise`.
        output_width: D of the target; None for an autoencoder.
        skip: add x @ skipᵀ, skip [output_width, D].

    Attributes:
        encoder [F, M*D], encoder_bias [F], decoder [F, M*D_out], decoder_bias [M*D_out].
        metadata: what is known of model and hook point; goes along with saved files.

    Raises:
        ValueError: sizes below 1, more active latents than there are, an unknown kind, or a bias
            that does not fit the input. TypeError: what is no activation.

    Example:
        >>> sae = SparseAutoencoder(2304, 16384, TopK(64))
        >>> codes = sae.encode(x)                    # [N, 64] values and indices
        >>> x_hat = sae.decode(codes)
    """

    def __init__(
        self,
        width: int,
        features: int,
        activation: Activation,
        *,
        sources: int = 1,
        subtract_bias: bool | None = None,
        score_norm: str | None = None,
        unit_norm: bool = False,
        standardise: str = "none",
        output_width: int | None = None,
        skip: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("width", width), ("features", features), ("sources", sources)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if not isinstance(activation, Activation):
            raise TypeError(f"activation: expected an Activation, got {type(activation).__name__}")
        if getattr(activation, "k", 0) > features:
            raise ValueError(f"k: expected at most the {features} features, got {activation.k}")
        transcodes = output_width is not None
        if subtract_bias and transcodes:
            raise ValueError("subtract_bias: expected False with output_width, got True")
        if transcodes and standardise_kind(standardise) != "none":
            raise ValueError(f"standardise: expected none with output_width, got {standardise}")
        if score_norm is not None and score_norm not in SCORE_NORMS:
            raise ValueError(f"score_norm: expected one of {SCORE_NORMS}, got {score_norm!r}")
        self.width, self.features, self.sources = width, features, sources
        self.output_width = width if output_width is None else output_width
        self.transcodes = transcodes
        self.activation = activation
        self.subtract_bias = not transcodes if subtract_bias is None else subtract_bias
        self.score_norm, self.unit_norm = score_norm, unit_norm
        self.standardise_kind = standardise_kind(standardise)
        self.metadata: dict[str, Any] = {}

        made = {"dtype": dtype, "device": device}
        self.encoder = nn.Parameter(torch.empty(features, sources * width, **made))
        self.encoder_bias = nn.Parameter(torch.zeros(features, **made))
        self.decoder = nn.Parameter(torch.empty(features, sources * self.output_width, **made))
        self.decoder_bias = nn.Parameter(torch.zeros(sources * self.output_width, **made))
        self.skip = nn.Parameter(torch.zeros(self.output_width, width, **made)) if skip else None
        for name, value in activation.parameters(features).items():
            self.register_parameter(name, nn.Parameter(value.to(device)))
        for name, value in activation.buffers(features).items():
            self.register_buffer(name, value.to(device))
        if self.standardise_kind == "affine":
            self.register_buffer("input_mean", torch.zeros(sources * width, device=device))
            self.register_buffer("input_factor", torch.ones(sources, device=device))
        if self.encoder.device.type != "meta":
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(
        self,
        generator: torch.Generator | None = None,
        *,
        norm: float = 1.0,
        equal_sources: bool = True,
    ) -> None:
        """Random directions of length `norm` in every source; the encoder is the decoder's copy.

        Args:
            equal_sources: a latent of a crosscoder starts with one direction in all sources.
        """
        sources = 1 if equal_sources else self.sources
        shape = (self.features, sources, self.width)
        rows = torch.randn(shape, generator=generator).div_(math.sqrt(self.width))
        rows *= norm / rows.norm(dim=-1, keepdim=True).clamp(min=_LEAST_NORM)
        rows = rows.expand(self.features, self.sources, self.width).flatten(1)
        self.encoder.copy_(rows)
        if self.transcodes:
            self.decoder.zero_()
        else:
            self.decoder.copy_(rows)
        self.encoder_bias.zero_()
        self.decoder_bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction of x [..., D] or [..., M, D], in x's shape and dtype."""
        z, back = self.standardised(x)
        return back(self.decode(self.latents(z).codes, z)).to(x.dtype)

    def encode(self, x: Tensor) -> Codes:
        """Active latents of x [..., D] or [..., M, D]."""
        return self.latents(self.standardised(x)[0]).codes

    def decode(self, codes: Codes, z: Tensor | None = None) -> Tensor:
        """Reconstruction [..., M*D_out] of codes, in standardised units.

        Args:
            z: standardised input, which a `skip` needs.
        """
        y = decode(codes, self.decoder_weight(), self.decoder_bias, unit_norm=self.unit_norm)
        y = self.split(y)
        if self.skip is None:
            return y
        if z is None:
            raise ValueError("z: expected the input of a dictionary with a skip, got None")
        return y + self.split(z).to(self.skip.dtype) @ self.skip.mT

    def latents(self, z: Tensor, *, second: Second | None = None) -> Latents:
        """Active latents of standardised z [..., M*D], with all that losses need.

        Args:
            second: mask [F] and length k: also the k best latents among the mask (AuxK).
        """
        if z.shape[-1] != self.sources * self.width:
            z = self.joined(z)
        z = z.to(self.encoder.dtype)
        return self.activation.latents(self, self.centred(z), self.input_bias(), second)

    def observe(self, latents: Latents) -> None:
        """Let the activation learn from the selection of a training step."""
        self.activation.observe(self, latents)

    @torch.no_grad()
    def constrain(self) -> None:
        """After an optimiser's step: unit rows of the decoder, thresholds that are not negative."""
        if self.unit_norm:
            self.decoder /= self.decoder.norm(dim=-1, keepdim=True).clamp(min=_LEAST_NORM)
        if isinstance(getattr(self, "threshold", None), nn.Parameter):
            self.threshold.clamp_(min=0)

    def standardised(self, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """z [..., M*D] of x [..., D] or [..., M, D], and the way back to x's shape."""
        if not isinstance(x, Tensor):
            raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
        if x.shape[-1:] != (self.width,) or (
            self.sources > 1 and x.shape[-2:-1] != (self.sources,)
        ):
            last = f"[..., {self.sources}, {self.width}]" if self.sources > 1 else self.width
            raise ValueError(f"x: expected a last dimension {last}, got shape {list(x.shape)}")
        match self.standardise_kind:
            case "layer_norm":
                z, back = standardise.layer_norm(x)
            case "unit_norm":
                z, back = standardise.unit_norm(x)
            case "affine":
                z, back = standardise.affine(x, self._each_source(self.input_mean), self._factor())
            case _:
                z, back = x, lambda y: y
        return self.joined(z), back

    def centred(self, z: Tensor) -> Tensor:
        """z less the decoder's bias; the bias gets its gradient through `input_bias`."""
        return z - self.decoder_bias.detach().to(z.dtype) if self.subtract_bias else z

    def input_bias(self) -> Tensor:
        """Bias of the encoder's product [F], which carries the gradient of the centre."""
        if not self.subtract_bias:
            return self.encoder_bias
        return centred_bias(self.encoder_bias, self.decoder_bias, self.encoder)

    def decoder_norms(self) -> Tensor:
        """Norms [F, M] of the decoder's rows in every source; their gradient at 0 is 0."""
        return self.decoder.view(self.features, self.sources, self.output_width).norm(dim=-1)

    def score_scale(self) -> Tensor | None:
        """What scores are multiplied with [F], without a gradient; None for nothing."""
        if self.score_norm is None:
            return None
        norms = self.decoder_norms().detach().float()
        joint, total = norms.norm(dim=-1), norms.sum(dim=-1)
        return {"sum": total, "joint": joint, "mixed": joint + 0.1 * total}[self.score_norm]

    def decoder_weight(self) -> Tensor:
        """The decoder in the dtype of the products: that of autocast where it is on."""
        kind = self.decoder.device.type
        if torch.is_autocast_enabled(kind):
            return self.decoder.to(torch.get_autocast_dtype(kind))
        return self.decoder

    def joined(self, x: Tensor) -> Tensor:
        """[..., M, D] as [..., M*D]; one source is as it is."""
        return x.flatten(-2) if self.sources > 1 else x

    def split(self, y: Tensor) -> Tensor:
        """[..., M*D_out] as [..., M, D_out]; one source is as it is."""
        return y.unflatten(-1, (self.sources, -1)) if self.sources > 1 else y

    def extra_repr(self) -> str:
        return f"{self.width}, {self.features}, {self.activation}, sources={self.sources}"

    def _each_source(self, values: Tensor) -> Tensor:
        return values.view(self.sources, -1) if self.sources > 1 else values

    def _factor(self) -> Tensor:
        return self.input_factor[:, None] if self.sources > 1 else self.input_factor

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseAutoencoder:
        # thresholds and statistics stay in float32 under .to(bfloat16): steps of the size of a
        # learning rate would be rounded away
        exact = [*self.activation.parameters(1), *self.activation.buffers(1)]
        exact += [name for name in ("input_mean", "input_factor") if hasattr(self, name)]
        before = {name: getattr(self, name).detach().clone() for name in exact}
        super()._apply(fn, recurse)
        for name, value in before.items():
            now = getattr(self, name)
            narrower = torch.promote_types(now.dtype, value.dtype) != now.dtype
            if narrower and value.device.type != "meta":
                now.data = value.to(now.device)
        return self


def standardise_kind(kind: str) -> str:
    """The kind, if there is one of this name.

    Raises:
        ValueError: there is not.
    """
    if kind not in standardise.KINDS:
        raise ValueError(f"standardise: expected one of {standardise.KINDS}, got {kind!r}")
    return kind
