"""Log-probabilities and entropies of a causal language model without its N x V logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gemma_ext import linear_logprobs

IGNORED = -100
_ROWS = 64  # of logits that are held at once while sampling


class Scores(nn.Module):
    """A transformers causal LM whose forward gives what its head says of given tokens.

    The head's weight is read at every call, so that `torch.func.functional_call` with other
    parameters reaches it too.

    Args:
        model: with `base_model`, `get_output_embeddings()` and a config that may carry
            `final_logit_softcapping`, `logit_scale` or `logits_scaling`.

    Raises:
        ValueError: what is computed from the head differs from the model's own logits.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        config = model.config.get_text_config()
        self.softcap = getattr(config, "final_logit_softcapping", None)
        self.logit_scale = getattr(config, "logit_scale", None) or 1.0
        self.logit_scale /= getattr(config, "logits_scaling", None) or 1.0
        self._check()

    def forward(self, ids: Tensor, mask: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probability of labels [B, T] after the tokens before them, and the entropy there.

        Args:
            ids: [B, T] int64. mask: [B, T], 0 at padding.
            labels: [B, T] int64, position t judged by what stands before it; -100 takes no part.

        Returns:
            (logprobs, entropy), float32 [B, T - 1] in nats, differentiable, 0 where ignored.
        """
        return linear_logprobs(
            self.hidden(ids, mask),
            self.head.weight,
            labels,
            bias=getattr(self.head, "bias", None),
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            ignore_index=IGNORED,
            shift=True,
            impl="exact",
        )

    @property
    def head(self) -> nn.Module:
        return self.model.get_output_embeddings()

    def hidden(self, ids: Tensor, mask: Tensor) -> Tensor:
        """[B, T, D] states that the head reads."""
        out = self.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
        return out.last_hidden_state

    @torch.no_grad()
    def sample(self, ids: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
        """[B, T] labels drawn from the model itself; -100 at position 0 and at padding."""
        hidden = self.hidden(ids, mask)[:, :-1]
        rows = hidden.reshape(-1, hidden.shape[-1]).split(_ROWS)
        drawn = [torch.multinomial(self._p(row), 1, generator=generator)[:, 0] for row in rows]
        labels = F.pad(torch.cat(drawn).view(hidden.shape[:2]), (1, 0), value=IGNORED)
        return labels.masked_fill(mask == 0, IGNORED)

    def _p(self, hidden: Tensor) -> Tensor:
        return self._logits(hidden).softmax(-1)

    def _logits(self, hidden: Tensor) -> Tensor:
        logits = F.linear(hidden, self.head.weight).float() * self.logit_scale
        bias = getattr(self.head, "bias", None)
        if bias is not None:
            logits = logits + bias.float()
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits

    @torch.no_grad()
    def _check(self) -> None:
        ids = torch.arange(2, device=self.head.weight.device)[None]
        own = self.model(input_ids=ids, use_cache=False).logits.float()
        ours = self._logits(self.hidden(ids, torch.ones_like(ids)))
        # two roundings of the head's dtype apart at most, in units of the largest logit
        bound = 4 * torch.finfo(self.head.weight.dtype).eps * float(own.abs().amax())
        if not torch.allclose(own, ours, rtol=0, atol=bound):
            raise ValueError(
                f"expected the logits of {type(self.model).__name__} to be its head's product, "
                f"scaled and capped as its config says, got others"
            )


def unpack(batch: Tensor | Mapping[str, Any], device: torch.device) -> tuple[Tensor, Tensor]:
    """(ids, mask), both [B, T] int64, of token ids or of what a tokenizer returns."""
    if isinstance(batch, Tensor):
        batch = {"input_ids": batch}
    ids = batch["input_ids"].to(device)
    if ids.dim() != 2:
        raise ValueError(f"expected input_ids to be [B, T], got {list(ids.shape)}")
    mask = batch.get("attention_mask")
    return ids, torch.ones_like(ids) if mask is None else mask.to(device)
