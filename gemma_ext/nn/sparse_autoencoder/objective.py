"""One training loss for every variant: a reconstruction and the terms that are switched on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gemma_ext.nn.sparse_autoencoder import losses
from gemma_ext.nn.sparse_autoencoder.activations import (
    BatchTopK,
    Gated,
    GroupMax,
    JumpReLU,
    Latents,
    ReLU,
    TopK,
)
from gemma_ext.nn.sparse_autoencoder.module import SparseAutoencoder
from gemma_ext.ops.sae import decode_error, nested_errors


@dataclass(frozen=True)
class Loss:
    """A loss and what it consists of.

    Attributes:
        total: [] to call backward on.
        terms: the parts, weighted, without gradients.
        latents: what was active.
        squared: Σ_D e² of every token [N], without a gradient.
    """

    total: Tensor
    terms: dict[str, Tensor]
    latents: Latents
    squared: Tensor


@dataclass(frozen=True)
class Objective:
    """Reconstruction error plus weighted terms; a weight of 0 switches a term off.

    Args:
        error: "squared", mean_n Σ_D e² (SAELens, dictionary_learning); "fvu", Σ e² over the
            variance (OpenAI, sparsify); "norm", mean of ‖e‖ over tokens and sources (the
            crosscoder release).
        l1: weight of mean_n Σ_i f_i n_i; of the gates where the dictionary is gated.
        l0: weight of the number of active latents, by `l0_form`.
        l0_form: "step"; "quadratic" around `target_l0` (Gemma Scope 2); "tanh" with `tanh_scale`
            (Anthropic).
        auxiliary: weight of AuxK, dead latents that reconstruct the residual.
        auxiliary_k: length of its list; None for D / 2.
        auxiliary_form: "openai", over the residual's variance; "sparsify", over the target's
            variance and scaled by dead / k; "saelens", so scaled, a mean over tokens, without the
            ReLU.
        multi: weight of the error of the long list of `TopK(multi=)`; 1/8 in arXiv 2406.04093.
        pre_activation: weight of the term that lifts dead latents; 3e-6 at Anthropic.
        widths: nested prefixes (Matryoshka, arXiv 2503.17547), ascending, the last F.
        level_weights: of the prefixes; 1 each where None.
        ranks: a loss over every prefix of the token's list (HierarchicalTopK, arXiv 2505.24473),
            as a mean over prefixes.

    Raises:
        ValueError: an unknown form, or a term that its activation does not have.
    """

    error: str = "squared"
    l1: float = 0.0
    l0: float = 0.0
    l0_form: str = "step"
    target_l0: float | None = None
    tanh_scale: float = 4.0
    auxiliary: float = 0.0
    auxiliary_k: int | None = None
    auxiliary_form: str = "openai"
    multi: float = 0.0
    pre_activation: float = 0.0
    widths: tuple[int, ...] = ()
    level_weights: tuple[float, ...] | None = None
    ranks: bool = False

    _CHOICES: ClassVar = {
        "error": ("squared", "fvu", "norm"),
        "l0_form": ("step", "quadratic", "tanh"),
        "auxiliary_form": ("openai", "sparsify", "saelens"),
    }

    def __post_init__(self) -> None:
        for name, choices in self._CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: expected one of {choices}, got {getattr(self, name)!r}")
        for name in ("l1", "l0", "auxiliary", "multi", "pre_activation"):
            if not isinstance(getattr(self, name), (int, float)):
                got = type(getattr(self, name)).__name__
                raise TypeError(f"{name}: expected a number, got {got}")
        if self.l0_form == "quadratic" and self.l0 and not (self.target_l0 or 0) > 0:
            raise ValueError(f"target_l0: expected a positive number, got {self.target_l0}")
        if self.widths and self.ranks:
            raise ValueError("ranks: expected False with widths, got True")
        if (self.widths or self.ranks) and self.error != "squared":
            raise ValueError(f"error: expected squared with nested losses, got {self.error!r}")
        if self.level_weights is not None and len(self.level_weights) != len(self.widths):
            raise ValueError(
                f"level_weights: expected one for each of {len(self.widths)} widths, "
                f"got {len(self.level_weights)}"
            )

    def check(self, sae: SparseAutoencoder) -> None:
        """Raises ValueError where a term and the dictionary do not go together."""
        kind, name = type(sae.activation), type(sae.activation).__name__
        if self.l0 and self.l0_form != "tanh" and kind is not JumpReLU:
            raise ValueError(f"l0: expected JumpReLU or the tanh form, got {name}")
        if self.multi and not (kind is TopK and sae.activation.multi > 1):
            raise ValueError(f"multi: expected TopK with multi above 1, got {sae.activation}")
        if self.pre_activation and kind not in (ReLU, JumpReLU, Gated):
            raise ValueError(f"pre_activation: expected ReLU, JumpReLU or Gated, got {name}")
        if self.ranks and kind is not TopK:
            raise ValueError(f"ranks: expected TopK, got {name}")
        if self.auxiliary and kind is GroupMax:
            raise ValueError("auxiliary: GroupMax has no second list")
        if self.widths and (self.widths[-1] != sae.features or sae.transcodes):
            raise ValueError(
                f"widths: expected the last to be the {sae.features} latents of an autoencoder, "
                f"got {self.widths[-1]}"
            )

    def __call__(
        self,
        sae: SparseAutoencoder,
        x: Tensor,
        target: Tensor | None = None,
        *,
        dead: Tensor | None = None,
        warmth: float = 1.0,
    ) -> Loss:
        """Loss of a batch.

        Args:
            x: [N, D] or [N, M, D].
            target: what to reconstruct; x where None.
            dead: mask [F] of latents that AuxK and the pre-activation term may use.
            warmth: factor of the sparsity terms while they warm up.
        """
        self.check(sae)
        z, _ = sae.standardised(x)
        y = z if target is None else sae.joined(target)
        count = 0 if dead is None else int(dead.sum())
        latents = sae.latents(z, second=self._second(sae, dead, count))
        if sae.skip is not None:
            y = y - sae.joined(sae.split(z).to(sae.skip.dtype) @ sae.skip.mT)
        weight = sae.decoder_weight()
        y = y.to(weight.dtype)
        total, squared, residual = self._reconstruction(sae, weight, latents, y)
        terms = {"reconstruction": total}
        if self.l1:
            listed = latents.pre if isinstance(sae.activation, Gated) else latents.codes
            terms["l1"] = self.l1 * warmth * losses.l1(sae, listed)
        if self.l0:
            terms["l0"] = self.l0 * warmth * self._l0(sae, latents)
        if isinstance(sae.activation, Gated):
            terms["gate"] = losses.gated_auxiliary(sae, weight, latents, y)
        if self.auxiliary and latents.second is not None:
            terms["auxiliary"] = self.auxiliary * self._auxiliary(
                sae, weight, latents.second, residual, y, count
            )
        if self.multi and latents.wide is not None:
            _, wide = decode_error(
                latents.wide, weight, sae.decoder_bias, y, unit_norm=sae.unit_norm
            )
            scale = losses.variance(y) if self.error == "fvu" else wide.numel()
            terms["multi"] = self.multi * wide.sum() / scale
        if self.pre_activation and count:
            threshold = getattr(sae, "threshold", torch.zeros_like(sae.encoder_bias))
            terms["pre_activation"] = self.pre_activation * losses.pre_activation(
                sae, z, latents, dead, threshold
            )
        return Loss(
            sum(terms.values()),
            {name: value.detach() for name, value in terms.items()},
            latents,
            squared.detach(),
        )

    def _second(self, sae, dead, count):
        if not self.auxiliary or not count:
            return None
        k = self.auxiliary_k or max(1, sae.sources * sae.output_width // 2)
        return dead, min(k, count)

    def _reconstruction(self, sae, weight, latents, y):
        """Weighted error, Σ_D e² [N] and e; e is None where no term needs it."""
        bias = sae.decoder_bias
        if self.widths or self.ranks:
            levels = {"by": "rank"} if self.ranks else {"widths": self.widths}
            nested = nested_errors(
                latents.codes, weight, bias, y, unit_norm=sae.unit_norm, **levels
            )
            if self.ranks:
                return (
                    nested.mean(-1).mean(),
                    nested[..., -1],
                    self._residual(sae, weight, latents, y),
                )
            weights = self.level_weights or (1.0,) * len(self.widths)
            weighted = nested.flatten(0, -2).mean(0) @ nested.new_tensor(weights)
            return weighted, nested[..., -1], self._residual(sae, weight, latents, y)
        residual, squared = decode_error(latents.codes, weight, bias, y, unit_norm=sae.unit_norm)
        if self.error == "squared":
            return squared.mean(), squared, residual
        if self.error == "fvu":
            return squared.sum() / losses.variance(y), squared, residual
        return sae.split(residual).float().norm(dim=-1).mean(), squared, residual

    def _residual(self, sae, weight, latents, y):
        if latents.second is None:
            return None
        with torch.no_grad():
            return decode_error(latents.codes, weight, sae.decoder_bias, y)[0]

    def _l0(self, sae, latents):
        if self.l0_form == "tanh":
            return losses.tanh_l0(sae, latents.codes, self.tanh_scale)
        counts = losses.step_l0(sae, latents)
        return (
            counts.mean() if self.l0_form == "step" else losses.quadratic_l0(counts, self.target_l0)
        )

    def _auxiliary(self, sae, weight, second, residual, y, count):
        saelens = self.auxiliary_form == "saelens"
        error = losses.second_list(sae, weight, second, residual, relu=not saelens)
        if self.auxiliary_form == "openai":
            spread = losses.variance(residual.detach())
            tiny = torch.finfo(spread.dtype).tiny
            return torch.where(spread > 0, error / spread.clamp(min=tiny), 0.0)
        scale = min(1.0, count / max(1, y.shape[-1] // 2))
        per = y.numel() / y.shape[-1] if saelens else losses.variance(y)
        return scale * error / per


def default_objective(sae: SparseAutoencoder, sparsity: float | None = None) -> Objective:
    """The usual loss of an activation.

    Args:
        sparsity: weight of its sparsity term, for those that have one (ReLU, Gated: l1, 1.0 by
            default as in SAELens; JumpReLU: l0, 1.0).
    """
    weight = 1.0 if sparsity is None else sparsity
    match sae.activation:
        case ReLU() | Gated():
            return Objective(l1=weight)
        case JumpReLU():
            return Objective(l0=weight)
        case TopK(multi=multi) if multi > 1:
            return Objective("fvu", auxiliary=1 / 32, multi=1 / 8)
        case TopK() | BatchTopK():
            return Objective(auxiliary=1 / 32)
        case _:
            return Objective()
