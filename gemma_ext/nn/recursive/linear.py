"""A linear whose weight is shared between depths and whose low-rank matrices are not."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DepthLinear(nn.Module):
    """y = W x + b + B (A x): W and b of a stored layer, A and B of one depth. No scale.

    Args:
        weight: [out, in], shared with other depths.
        bias: [out], shared likewise, or None.
        rank: r, cut to min(r, in, out).

    Attributes:
        lora_A: [r, in], Gaussian of deviation 1 / r; lora_B: [out, r], zero: y = W x + b until
            one of them is trained or set.

    Raises:
        ValueError: a rank below 1.
    """

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, rank: int) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank: expected a number >= 1, got {rank}")
        out_features, in_features = weight.shape
        self.rank = min(rank, in_features, out_features)
        self.weight = weight
        self.bias = bias
        like = {"dtype": weight.dtype, "device": weight.device}
        self.lora_A = nn.Parameter(torch.empty(self.rank, in_features, **like))
        self.lora_B = nn.Parameter(torch.zeros(out_features, self.rank, **like))
        nn.init.normal_(self.lora_A, std=1 / self.rank)

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        return F.linear(x, self.weight, self.bias) + F.linear(F.linear(x, self.lora_A), self.lora_B)

    def merged_weight(self) -> Tensor:
        """[out, in] W + B A, in float32 at least and then rounded to the dtype of W."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        low = self.lora_B.detach().to(wide) @ self.lora_A.detach().to(wide)
        return (self.weight.detach().to(wide) + low).to(self.weight.dtype)

    def extra_repr(self) -> str:
        return f"in={self.in_features}, out={self.out_features}, rank={self.rank}"
