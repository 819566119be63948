"""Two synthetic models with known concepts, and the toys that show why L1 misleads.

    x^m = sum_c f_c s_c^m u_c + noise

u_c are unit directions, f_c the strength of concept c in a token, s_c^m how much of it model m has:
(1, 1) for a shared concept, (1, 0) or (0, 1) for an exclusive one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TwoModels:
    """A world of C concepts.

    Attributes:
        directions: [C, D] unit rows.
        strength: [C, 2] s of base and chat.
        rate: [C] share of tokens that a concept is active in.
        noise: standard deviation of an entry.
    """

    directions: Tensor
    strength: Tensor
    rate: Tensor
    noise: float = 0.01

    def draw(self, tokens: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Activations [N, 2, D] float32 and strengths of concepts [N, C]."""
        c, d = self.directions.shape
        on = torch.rand(tokens, c, generator=generator) < self.rate
        f = on * (0.5 + torch.rand(tokens, c, generator=generator))
        x = torch.einsum("nc,cm,cd->nmd", f, self.strength, self.directions)
        return x + self.noise * torch.randn(tokens, 2, d, generator=generator), f


def two_models(
    width: int,
    shared: int,
    exclusive: int,
    rate: float,
    generator: torch.Generator,
    rare: float | None = None,
    weak: int = 0,
    share: float = 0.25,
) -> TwoModels:
    """Shared concepts, then those of the base alone, of the chat model alone, and weak ones.

    Directions are orthogonal where there is room.

    Args:
        exclusive: of each model.
        rate: of concepts; rare: of exclusive ones, `rate` where None.
        weak: concepts of the chat model that the base has to a `share` of their strength: L1 takes
            them for exclusive.
    """
    count = shared + 2 * exclusive + weak
    directions = torch.randn(count, width, generator=generator)
    if count <= width:
        directions = torch.linalg.qr(directions.T).Q.T.contiguous()
    directions = torch.nn.functional.normalize(directions, dim=1)
    strength = torch.ones(count, 2)
    strength[shared : shared + exclusive, 1] = 0
    strength[shared + exclusive : shared + 2 * exclusive, 0] = 0
    strength[shared + 2 * exclusive :, 0] = share
    rates = torch.full((count,), rate)
    if rare is not None:
        rates[shared : shared + 2 * exclusive] = rare
    return TwoModels(directions, strength, rates)


def matched(decoder: Tensor, world: TwoModels, threshold: float = 0.9) -> Tensor:
    """The latent of each concept [C] by the cosine of its joint decoder; -1 where none is close.

    Args:
        decoder: [F, 2, D] in the units of the world.
    """
    joint = torch.nn.functional.normalize(decoder.flatten(1), dim=1)
    target = (world.strength[:, :, None] * world.directions[:, None]).flatten(1)
    target = torch.nn.functional.normalize(target, dim=1)
    best, place = (target @ joint.T).max(1)
    return torch.where(best > threshold, place, -1)


def shrunk(strength: float, f: float, mu: float) -> float:
    """The base decoder's length under L1: argmin_s f^2 (a - s)^2 / 2 + mu f s = max(0, a - mu / f).

    A concept that the base model has with strength a <= mu / f looks exclusive to the chat model.
    """
    return max(0.0, strength - mu / f)
