"""Three tiers of the same subtraction, and a file that says which.

    x'_t = x_t - sum_j g_tj alpha_j s_j d_j            d_j: decoder row of latent j

| tier      | g_tj                                                                        |
|-----------|-----------------------------------------------------------------------------|
| constant  | 1                                                                           |
| per_input | 1 where any chosen latent fires in the input: in the prompt (scope "prompt"),|
|           | up to t ("causal"), or among the last tokens ("window")                      |
| per_token | 1 where latent j fires at t                                                 |

s_j is the largest activation seen, M_j, by default, so that alpha 1 takes away the most that latent
j ever writes, whatever part of its scale is in the decoder's rows.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from gemma_ext.files import write_json
from gemma_ext.nn.sparse_autoencoder import SparseAutoencoder, latent_steering
from gemma_ext.ops.sae import Steering

TIERS = ("constant", "per_input", "per_token")
MODES = ("add", "ablate", "clamp", "min_clamp", "scale", "project")


@dataclass(frozen=True)
class Latent:
    """One latent that is held down.

    Attributes:
        id: in [0, F).
        alpha: its strength, in units of ref_max.
        ref_max: s_j.
    """

    id: int
    alpha: float = 1.0
    ref_max: float = 1.0


@dataclass(frozen=True)
class Intervention:
    """Everything that a run steers by; one file of JSON.

    Attributes:
        model, layer, sae: names of the model and of the dictionary of the block's output.
        latents: that are steered.
        mode: "add" subtracts alpha ref_max of the decoder row; the other modes of `Steering`
            change the latent's code and take alpha as the share of the change.
        tier: when, as above.
        input_scope: of per_input.
        window: tokens of the scope "window".
        gate_threshold: an activation above it fires.
        positions, skip_bos: as of `gemma_ext.nn.steering.steer_hook`.

    Raises:
        ValueError: no latents, an unknown tier or mode.
    """

    model: str
    layer: int
    sae: str
    latents: tuple[Latent, ...]
    mode: str = "add"
    tier: str = "per_token"
    input_scope: str = "causal"
    window: int | None = None
    gate_threshold: float = 0.0
    positions: str = "all"
    skip_bos: bool = True

    def __post_init__(self) -> None:
        if not self.latents:
            raise ValueError("latents: expected at least one, got none")
        for name, values in (("tier", TIERS), ("mode", MODES)):
            if getattr(self, name) not in values:
                raise ValueError(
                    f"{name}: expected one of {', '.join(values)}, got {getattr(self, name)!r}"
                )

    def steering(self, sae: SparseAutoencoder) -> Steering:
        """For `steer_hook` and sweeps, whose factors multiply every alpha."""
        alpha = torch.tensor([latent.alpha for latent in self.latents])
        reference = torch.tensor([latent.ref_max for latent in self.latents])
        per_input = {"scope": self.input_scope, "window": self.window}
        return latent_steering(
            sae,
            [latent.id for latent in self.latents],
            strength=-alpha * reference if self.mode == "add" else alpha,
            mode=self.mode,
            gate=self.tier,
            gate_threshold=self.gate_threshold,
            **(per_input if self.tier == "per_input" else {}),
        )

    def write(self, path: str | Path) -> None:
        write_json(path, asdict(self))

    @classmethod
    def read(cls, path: str | Path) -> Intervention:
        """Raises ValueError for a file that does not hold one."""
        try:
            given = json.loads(Path(path).read_text(encoding="utf-8"))
            given["latents"] = tuple(Latent(**latent) for latent in given["latents"])
            return cls(**given)
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}: expected an intervention, {error}") from error


def latents(
    ids: Sequence[int] | Tensor, reference: Sequence[float] | Tensor, *, alpha: float = 1.0
) -> tuple[Latent, ...]:
    """Latents of one strength, each with its own s_j.

    Raises:
        ValueError: as many references as latents are needed.
    """
    pairs = zip(torch.as_tensor(ids).tolist(), torch.as_tensor(reference).tolist(), strict=True)
    return tuple(Latent(int(i), alpha, float(s)) for i, s in pairs)
