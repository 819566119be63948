"""Which model a latent belongs to, by the norms of its decoders alone.

    Delta_j = 1/2 ((||d_j^chat|| - ||d_j^base||) / max(||d_j^chat||, ||d_j^base||) + 1)

| tag       | Delta       |
|-----------|-------------|
| base only | <= 0.1      |
| shared    | [0.4, 0.6)  |
| chat only | >= 0.9      |
| other     | the rest    |
"""

from __future__ import annotations

import torch
from torch import Tensor

BASE, CHAT = 0, 1
TAGS = ("base only", "shared", "chat only", "other")


def difference(norms: Tensor) -> Tensor:
    """Delta [F] in [0, 1] of decoder norms [F, 2]; nan where both are 0.

    The release stores 1 - Delta as `dec_norm_diff`.

    Raises:
        ValueError: not two sources.
    """
    if norms.dim() != 2 or norms.shape[1] != 2:
        raise ValueError(f"norms: expected [F, 2], got {list(norms.shape)}")
    base, chat = norms.double().unbind(1)
    return 0.5 * ((chat - base) / norms.double().amax(1) + 1)


def tags(delta: Tensor) -> Tensor:
    """Place in `TAGS` of each Delta [F]; nan is other."""
    found = torch.full_like(delta, TAGS.index("other"), dtype=torch.int64)
    found[delta <= 0.1] = TAGS.index("base only")
    found[(delta >= 0.4) & (delta < 0.6)] = TAGS.index("shared")
    found[delta >= 0.9] = TAGS.index("chat only")
    return found
