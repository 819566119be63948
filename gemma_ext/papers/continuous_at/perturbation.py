"""The loss of targets with something added to the states of prompt tokens.

What is added is packed, [P, D] in float32 for the P free tokens of a batch, row by row: there is
none at targets and in padding, and what was found for one answer fits every other answer of the
same prompts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gemma_ext.nn._blocks import decoder_layers
from gemma_ext.papers.continuous_at.embeddings import Embeddings
from gemma_ext.papers.continuous_at.prompts import Batch
from gemma_ext.papers.continuous_at.target_loss import TargetLoss

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EMBEDDINGS = -1
"""The site before the first block."""


class Perturbed:
    """Target losses of a model under perturbations of some of its sites.

    Args:
        model: causal LM.
        sites: `EMBEDDINGS`, or blocks whose output is moved, in any number.
        impl: as in `gemma_ext.linear_logprobs`.

    Raises:
        ValueError: no sites, one twice, one that is not there; a model that scales embeddings
            outside their module (`Embeddings`).
    """

    def __init__(
        self, model: PreTrainedModel, sites: Sequence[int] = (EMBEDDINGS,), impl: str = "auto"
    ) -> None:
        if not sites or len(set(sites)) != len(sites):
            raise ValueError(f"sites: expected some, each once, got {list(sites)}")
        self.model, self.sites = model, tuple(sites)
        self.blocks: nn.ModuleList | None = None
        if any(site != EMBEDDINGS for site in sites):
            self.blocks = decoder_layers(model)[1]
            for site in sites:
                if not EMBEDDINGS <= site < len(self.blocks):
                    raise ValueError(f"sites: expected -1 to {len(self.blocks) - 1}, got {site}")
        self.embeddings = Embeddings(model)
        self.loss = TargetLoss(model, impl)
        self._mean_norm: float | None = None

    def __call__(self, batch: Batch, deltas: Sequence[Tensor]) -> Tensor:
        """Negative log-likelihoods [N] of the batch's targets.

        Args:
            deltas: [P, D] for each site.
        """
        with self.applied(batch, deltas) as embeddings:
            return self.loss(batch, embeddings)

    @contextmanager
    def applied(self, batch: Batch, deltas: Sequence[Tensor]) -> Iterator[Tensor]:
        """Gives the embeddings [B, T, D] to run; blocks are perturbed within.

        Raises:
            ValueError: blocks of a model that runs them again in its backward, where nothing would
                be added.
        """
        if self.blocks is not None and self.model.training and self._checkpoints():
            raise ValueError(
                "sites: expected EMBEDDINGS alone under gradient checkpointing, got blocks"
            )
        embeddings = self.embeddings(batch.ids)
        with ExitStack() as stack:
            for site, delta in zip(self.sites, deltas, strict=True):
                if site == EMBEDDINGS:
                    embeddings = added(embeddings, batch, delta)
                else:
                    stack.enter_context(_adding(self.blocks[site], batch, delta))
            yield embeddings

    @torch.no_grad()
    def norms(self, batch: Batch) -> list[Tensor]:
        """What a relative radius is relative to, [P] for each site: the mean norm of the
        vocabulary's embeddings, and of a block each token's own state without perturbation.
        """
        found: dict[int, Tensor] = {}
        blocks = [site for site in self.sites if site != EMBEDDINGS]
        if blocks:
            with ExitStack() as stack:
                for site in blocks:
                    stack.enter_context(_measuring(self.blocks[site], batch, found, site))
                self.loss(batch, self.embeddings(batch.ids))
        if EMBEDDINGS in self.sites:
            # embeddings that are trained move
            if self._mean_norm is None or self.embeddings.module.weight.requires_grad:
                self._mean_norm = self.embeddings.mean_norm()
            count = len(batch.places[0])
            found[EMBEDDINGS] = torch.full((count,), self._mean_norm, device=batch.device)
        return [found[site] for site in self.sites]

    def width(self, site: int) -> int:
        """D of a site."""
        if site == EMBEDDINGS:
            return self.embeddings.width
        return self.model.config.get_text_config().hidden_size

    def _checkpoints(self) -> bool:
        return any(getattr(m, "gradient_checkpointing", False) for m in self.model.modules())


def added(states: Tensor, batch: Batch, delta: Tensor) -> Tensor:
    """States [B, T, D] with delta [P, D] added in its precision to those of free tokens."""
    moved = states[batch.places] + delta
    return states.index_put(batch.places, moved.to(states.dtype))


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient inside the block; afterwards those that did do again."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def _adding(block: nn.Module, batch: Batch, delta: Tensor) -> Iterator[None]:
    def change(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (added(output[0], batch, delta), *output[1:])
        return added(output, batch, delta)

    handle = block.register_forward_hook(change)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _measuring(
    block: nn.Module, batch: Batch, found: dict[int, Tensor], site: int
) -> Iterator[None]:
    def read(module: nn.Module, args: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        found[site] = states[batch.places].float().norm(dim=-1)

    handle = block.register_forward_hook(read)
    try:
        yield
    finally:
        handle.remove()
