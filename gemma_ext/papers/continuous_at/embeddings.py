"""Input embeddings in the space in which the model reads them.

Some models scale embeddings by sqrt(D) inside the embedding module, some inside their forward,
where `inputs_embeds` are scaled as well or are not. Whatever is built from `weight[ids]` is wrong
by that factor without a sign of it, so embeddings come from the module alone and the model is asked
whether it agrees.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from gemma_ext.lm.huggingface import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PROBE = 8  # tokens of the test
_ROWS = 2**14  # of the vocabulary that are measured at a time
# relative error of two orders of the same sums; a wrong scale is off by about 1
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


class Embeddings:
    """ids -> E(ids), tested against the model at construction.

    Args:
        model: causal LM.

    Raises:
        ValueError: the model's output for ids differs from that for their embeddings.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.module: nn.Module = model.get_input_embeddings()
        self.vocab, self.width = self.module.weight.shape
        _check(model, self)

    def __call__(self, ids: Tensor) -> Tensor:
        """[..., D] in the dtype of the weights, without a gradient."""
        with torch.no_grad():
            return self.module(ids)

    @torch.no_grad()
    def mean_norm(self) -> float:
        """Mean over the vocabulary of the norms of E(v)."""
        total = 0.0
        device = self.module.weight.device
        for ids in torch.arange(self.vocab, device=device).split(_ROWS):
            total += float(self.module(ids).double().norm(dim=-1).sum())
        return total / self.vocab


@torch.no_grad()
def _check(model: PreTrainedModel, embeddings: Embeddings) -> None:
    device = embeddings.module.weight.device
    ids = torch.arange(1, 1 + _PROBE, device=device) * (embeddings.vocab - 1) // (_PROBE + 1)
    ids = ids.unsqueeze(0)
    with evaluating(model):
        expected = model(input_ids=ids, use_cache=False).logits
        found = model(inputs_embeds=embeddings(ids), use_cache=False).logits
    error = float((found.double() - expected.double()).norm() / expected.double().norm())
    if not error <= _TOLERANCE[expected.dtype]:
        raise ValueError(
            "model: expected the same logits from ids as from their input embeddings, got a "
            f"relative difference of {error:.2g}; it scales or replaces embeddings outside "
            f"{type(embeddings.module).__name__}, so an attack on them would be one on other inputs"
        )
