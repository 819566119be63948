"""An object to put where SAELens users have an `SAE`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gemma_ext.integrations.saelens import CONFIG, WEIGHTS, load_saelens, save_saelens, to_saelens
from gemma_ext.nn.sparse_autoencoder import SparseAutoencoder, fold_norms
from gemma_ext.ops.sae import Codes

HOOKS = (
    "hook_sae_input",
    "hook_sae_acts_pre",
    "hook_sae_acts_post",
    "hook_sae_output",
    "hook_sae_recons",
    "hook_sae_error",
)


class Metadata(dict):
    """A dict whose keys are attributes too; a missing one is None, as in SAELens."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.get(name)


class Config:
    """Configuration of SAELens as attributes."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._architecture = values["architecture"]
        for name, value in values.items():
            if name != "architecture":
                setattr(self, name, Metadata(value) if name == "metadata" else value)

    def architecture(self) -> str:
        return self._architecture

    def to_dict(self) -> dict[str, Any]:
        values = {k: v for k, v in vars(self).items() if k != "_architecture"}
        return values | {"architecture": self._architecture, "metadata": dict(self.metadata)}


class SAELensDictionary(nn.Module):
    """A `SparseAutoencoder` with the interface of `sae_lens.SAE`.

    `encode` gives the dense [..., F] that SAELens promises; `forward` and `encode_sparse` hold no
    such tensor, unless somebody listens at `hook_sae_acts_post`. Activations [..., heads, d_head]
    of a `hook_z` are flattened on the way in and split on the way out.

    Args:
        sae: BatchTopK is shown as the jumprelu that SAELens would save.
        use_error_term: `forward` adds what the reconstruction misses, as a constant.

    Example:
        >>> sae = SAELensDictionary.load_from_disk("out/sae")
        >>> sae.encode(x).shape, sae.cfg.metadata.hook_name
    """

    def __init__(self, sae: SparseAutoencoder, *, use_error_term: bool = False) -> None:
        super().__init__()
        self.sae = sae
        self.cfg = Config(to_saelens(sae)[0])
        self.use_error_term = use_error_term
        self.__dict__["hook_dict"] = {name: _hook_point(name) for name in HOOKS}
        for name, point in self.hook_dict.items():
            setattr(self, name, point)
        self._back: Any = None
        self._heads: torch.Size | None = None

    @classmethod
    def load_from_disk(
        cls, path: str | Path, device: str = "cpu", dtype: str | None = None
    ) -> SAELensDictionary:
        """Of a folder of SAELens."""
        sae = load_saelens(path).to(device)
        return cls(sae if dtype is None else sae.to(getattr(torch, dtype)))

    @property
    def W_enc(self) -> Tensor:
        return self.sae.encoder.mT

    @property
    def W_dec(self) -> Tensor:
        return self.sae.decoder

    @property
    def b_enc(self) -> Tensor:
        return self.sae.encoder_bias

    @property
    def b_dec(self) -> Tensor:
        return self.sae.decoder_bias

    @property
    def threshold(self) -> Tensor:
        return self.sae.threshold

    @property
    def dtype(self) -> torch.dtype:
        return self.sae.encoder.dtype

    @property
    def device(self) -> torch.device:
        return self.sae.encoder.device

    def encode_sparse(self, x: Tensor) -> Codes:
        """Active latents, in the units of SAELens: times the decoder's norm where it rescales."""
        z, self._back = self.sae.standardised(self._joined(x))
        return self._scaled(self.sae.latents(z).codes)

    def encode(self, x: Tensor) -> Tensor:
        """Latents [..., F], dense."""
        x = self.hook_sae_input(x)
        return self.hook_sae_acts_post(self.encode_sparse(x).dense().to(self.dtype))

    def decode(self, feature_acts: Tensor | Codes) -> Tensor:
        """Reconstruction of latents, dense or as lists; of the tokens that were encoded last."""
        norms = self._norms()
        if isinstance(feature_acts, Codes):
            if norms is not None:
                inverse = norms.reciprocal()[feature_acts.indices.long()]
                feature_acts = feature_acts.with_values(feature_acts.values * inverse)
            out = self.sae.decode(feature_acts)
        else:
            if norms is not None:
                feature_acts = feature_acts / norms.to(feature_acts.dtype)
            out = feature_acts @ self.sae.decoder + self.sae.decoder_bias
        return self._split(self._undo(self.hook_sae_recons(out)))

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction of x, in the dtype of the dictionary."""
        if _listens(self.hook_sae_acts_post) or _listens(self.hook_sae_recons):
            out = self.decode(self.encode(x))
            if self.sae.skip is not None:
                out = out + x.to(self.dtype) @ self.sae.skip.mT
        else:
            rows = self._joined(self.hook_sae_input(x))
            out = self._split(self.sae(rows.to(self.dtype)))
        if self.use_error_term:
            with torch.no_grad():
                missing = x - self._split(self.sae(self._joined(x).to(self.dtype)))
            out = out + self.hook_sae_error(missing)
        return self.hook_sae_output(out)

    @torch.no_grad()
    def fold_W_dec_norm(self) -> None:
        """Decoder rows of norm 1, latents that grow by it."""
        fold_norms(self.sae)
        self.cfg = Config(to_saelens(self.sae)[0])

    def save_model(self, path: str | Path) -> tuple[Path, Path]:
        """Writes the folder; gives the paths of weights and configuration."""
        save_saelens(self.sae, path)
        return Path(path) / WEIGHTS, Path(path) / CONFIG

    def _norms(self) -> Tensor | None:
        shown = getattr(self.cfg, "rescale_acts_by_decoder_norm", False)
        folded = self.cfg.architecture() == "jumprelu" and self.sae.score_norm is not None
        return self.sae.score_scale() if shown or folded else None

    def _scaled(self, codes: Codes) -> Codes:
        norms = self._norms()
        if norms is None:
            return codes
        return codes.with_values(codes.values * norms[codes.indices.long()])

    def _undo(self, out: Tensor) -> Tensor:
        back, self._back = self._back, None
        return out if back is None else back(out)

    def _joined(self, x: Tensor) -> Tensor:
        self._heads = None
        if x.shape[-1] != self.sae.width and x.shape[-2:].numel() == self.sae.width:
            self._heads = x.shape[-2:]
            x = x.flatten(-2)
        return x.to(self.dtype)

    def _split(self, y: Tensor) -> Tensor:
        return y if self._heads is None else y.unflatten(-1, self._heads)


def _hook_point(name: str) -> nn.Module:
    try:
        from transformer_lens.hook_points import HookPoint
    except ImportError:
        return nn.Identity()
    point = HookPoint()
    point.name = name
    return point


def _listens(point: nn.Module) -> bool:
    return bool(point._forward_hooks or point._backward_hooks)
