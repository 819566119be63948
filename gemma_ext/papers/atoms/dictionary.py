"""The threshold-activated SAE: W_enc = D' S, f = z 1[z >= tau], x^ = b + D f.

The support it finds is exact inside the window of `windows`; its codes keep the crosstalk of the
other active atoms. `refit` solves for the codes on the support that was found,

    delta_S = argmin_delta || m - b - D_S delta ||_S,

which leaves the support and never makes the error larger.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemma_ext.extras import require
from gemma_ext.files import read_safetensors, write_json, write_safetensors
from gemma_ext.ops import sae
from gemma_ext.papers.atoms.product import AtomicProduct

_ROOM = 1 << 26  # elements of gathered atoms at a time


@dataclass(frozen=True)
class Dictionary:
    """Atoms with the product they are read with.

    Attributes:
        atoms: [F, D] rows d_i.
        product: of width D.
        threshold: [F] tau, in the units of the codes.
        bias: [D] b; the paper has none, which is zero.
    """

    atoms: Tensor
    product: AtomicProduct
    threshold: Tensor
    bias: Tensor

    @staticmethod
    def of(
        atoms: Tensor,
        product: AtomicProduct,
        threshold: float | Tensor,
        bias: Tensor | None = None,
    ) -> Dictionary:
        """A dictionary with one threshold for all, or one each; no bias is zero.

        Raises:
            ValueError: shapes that do not fit together.
        """
        if atoms.dim() != 2:
            raise ValueError(f"atoms: expected [F, D], got {list(atoms.shape)}")
        features, width = atoms.shape
        if product.factor.shape[0] != width:
            raise ValueError(
                f"product: expected one of width {width}, got {product.factor.shape[0]}"
            )
        tau = torch.as_tensor(threshold, dtype=torch.float32, device=atoms.device)
        if tau.dim() > 1 or (tau.dim() == 1 and tau.numel() != features):
            raise ValueError(f"threshold: expected a number or [{features}], got {list(tau.shape)}")
        if bias is None:
            bias = atoms.new_zeros(width)
        if bias.shape != (width,):
            raise ValueError(f"bias: expected [{width}], got {list(bias.shape)}")
        return Dictionary(atoms, product, tau.expand(features).contiguous(), bias)

    def encode(self, x: Tensor) -> sae.Codes:
        """Codes z_i >= tau_i of rows [..., D], by ascending atom."""
        rows, shift = self.encoder()
        return sae.encode_threshold(
            x.float(), rows, shift, threshold=self.threshold, inclusive=True
        ).codes

    def encoder(self) -> tuple[Tensor, Tensor]:
        """Rows [F, D] and bias [F] of z, float32."""
        rows = self.product.encoder(self.atoms)
        return rows.float(), -(rows @ self.bias.double()).float()

    def decode(self, codes: sae.Codes) -> Tensor:
        """[..., D] float32 reconstructions."""
        return sae.decode(codes, self.atoms.float(), self.bias.float())

    @torch.no_grad()
    def refit(self, x: Tensor, codes: sae.Codes) -> sae.Codes:
        """The codes that are best under S on the support of `codes`; they may be negative.

        Where the atoms of a support depend on each other, the shortest of the best codes.

        Args:
            x: [..., D] the rows that were encoded; float64 rows give float64 codes.
        """
        white = self.product.whiten(self.atoms)
        norms = white.norm(dim=-1)
        unit = white / norms[:, None]
        target = self.product.whiten((x.double() - self.bias.double()).reshape(-1, x.shape[-1]))
        values = codes.values.double()
        offsets, indices = codes.offsets, codes.indices.long()
        counts = offsets.diff()
        for count in counts.unique().tolist():
            if count == 0:
                continue
            tokens = (counts == count).nonzero().squeeze(1)
            for part in tokens.split(max(1, _ROOM // (count * unit.shape[1]))):
                slots = offsets[part][:, None] + torch.arange(count, device=part.device)
                chosen = unit[indices[slots]]
                moments = (chosen @ target[part][:, :, None]).squeeze(-1)
                solved = _solve(chosen @ chosen.mT, moments)
                values[slots] = solved / norms[indices[slots]]
        return codes.with_values(values if x.dtype == torch.float64 else values.float())

    def save(self, folder: Path | str, facts: dict[str, Any]) -> None:
        """Writes atoms.safetensors {D, L, tau, aip_norm, bias} and atoms.json with `facts`.

        Raises:
            ImportError: safetensors is missing.
        """
        require("dictionaries on disk", "hf", "safetensors")
        folder = Path(folder)
        tensors = {
            "D": self.atoms,
            "L": self.product.factor,
            "tau": self.threshold,
            "aip_norm": self.product.norms(self.atoms),
            "bias": self.bias,
        }
        write_safetensors(folder / "atoms.safetensors", tensors)
        write_json(folder / "atoms.json", {**facts, "condition": self.product.condition})


def load(folder: Path | str) -> tuple[Dictionary, dict[str, Any]]:
    """What `Dictionary.save` wrote, and its facts."""
    require("dictionaries on disk", "hf", "safetensors")
    folder = Path(folder)
    facts = json.loads((folder / "atoms.json").read_text(encoding="utf-8"))
    tensors = read_safetensors(folder / "atoms.safetensors")
    product = AtomicProduct(tensors["L"], facts.pop("condition"))
    return Dictionary(tensors["D"], product, tensors["tau"], tensors["bias"]), facts


def _solve(gram: Tensor, right: Tensor) -> Tensor:
    """Normal equations [B, K, K], [B, K]; the pseudo-inverse where atoms are dependent."""
    factor, failed = torch.linalg.cholesky_ex(gram)
    solved = torch.cholesky_solve(right[..., None], factor).squeeze(-1)
    weak = (failed != 0) | (factor.diagonal(dim1=-2, dim2=-1).amin(-1) < 1e-6)
    if weak.any():
        inverse = torch.linalg.pinv(gram[weak], hermitian=True)
        solved[weak] = (inverse @ right[weak][..., None]).squeeze(-1)
    return solved
