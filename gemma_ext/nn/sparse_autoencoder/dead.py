"""Which latents have not fired for a while."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gemma_ext.ops.sae import Codes

WINDOW = 10_000_000  # tokens; arXiv 2406.04093, dictionary_learning, sparsify


class DeadLatents(nn.Module):
    """Tokens since every latent fired last, counted over all ranks.

    Args:
        features: F.
        window: a latent is dead after as many tokens without firing.

    Attributes:
        since [F] int64; fired [F] int64, how often a latent fired; tokens [] int64.
    """

    def __init__(self, features: int, window: int = WINDOW) -> None:
        super().__init__()
        self.window = window
        self.register_buffer("since", torch.zeros(features, dtype=torch.int64))
        self.register_buffer("fired", torch.zeros(features, dtype=torch.int64))
        self.register_buffer("tokens", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self, codes: Codes) -> None:
        """Counts a batch; values that are not 0 have fired."""
        tokens = torch.Size(codes.shape).numel()
        where = codes.indices[codes.values != 0].long()
        counts = torch.bincount(where, minlength=self.since.numel())
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(counts)
            tokens *= torch.distributed.get_world_size()
        self.tokens += tokens
        self.fired += counts
        self.since += tokens
        self.since[counts > 0] = 0

    def mask(self) -> Tensor:
        """[F] bool."""
        return self.since >= self.window
