"""Gram matrices of what the linear layers of a model see.

G = X^T X / rows        X [rows, D] the inputs of one nn.Linear, rows are tokens without padding
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gemma_ext.progress import track
from gemma_ext.souping.scoring import unpack

Batch = Tensor | Mapping[str, Any]


class Grams:
    """Adds up Gram matrices while a module runs inside `watching`.

    Modules that are handed the very same tensor (query, key and value; gate and up) share one
    matrix.

    Args:
        modules: name to nn.Linear.
        dtype: of the sums, float32 or float64.
    """

    def __init__(self, modules: Mapping[str, nn.Linear], dtype: torch.dtype) -> None:
        self.modules = modules
        self.dtype = dtype
        self.sums: dict[str, Tensor] = {}
        self.rows: dict[str, int] = {}
        self.owner: dict[str, str] = {}
        self.seen: dict[int, tuple[str, Tensor]] = {}
        self.mask: Tensor | None = None

    @contextmanager
    def watching(self, mask: Tensor) -> Iterator[None]:
        """One forward pass over tokens with mask [B, T]."""
        self.mask = mask.bool().flatten()
        hooks = [
            module.register_forward_pre_hook(self._hook(name))
            for name, module in self.modules.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self.seen.clear()

    def _hook(self, name: str) -> Any:
        def take(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            first, _ = self.seen.setdefault(id(x), (name, x))
            if self.owner.setdefault(name, first) != first:
                raise RuntimeError(
                    f"expected {name} to share its input with {self.owner[name]} in every pass"
                )
            if first == name:
                self._add(name, x.detach())

        return take

    def _add(self, name: str, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) == len(self.mask):  # else a module that was given a choice of tokens
            rows = rows[self.mask]
        rows = rows.to(self.dtype)
        product = rows.T @ rows
        self.sums[name] = self.sums[name].add_(product) if name in self.sums else product
        self.rows[name] = self.rows.get(name, 0) + len(rows)

    def result(self) -> dict[str, Tensor]:
        """Weight name to G [D, D]; shared matrices are one object."""
        means = {name: total / max(1, self.rows[name]) for name, total in self.sums.items()}
        return {f"{name}.weight": means[owner] for name, owner in self.owner.items()}


@torch.no_grad()
def collect_grams(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    dtype: torch.dtype = torch.float32,
    show_progress: bool = False,
) -> dict[str, Tensor]:
    """Gram matrices of every linear layer of a transformers model, its output head left out.

    Args:
        model: runs as it is.
        batches: token ids [B, T] or mappings with `input_ids` and `attention_mask`.
        dtype: of the sums.
        show_progress: a bar that counts batches.

    Returns:
        Weight name (`model.layers.0.mlp.up_proj.weight`) to G [in, in].

    Raises:
        ValueError: no batch.
    """
    grams = Grams(_linears(model), dtype)
    device = next(model.parameters()).device
    for batch in track(batches, "grams", show_progress):
        ids, mask = unpack(batch, device)
        with grams.watching(mask):
            model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
    if not grams.sums:
        raise ValueError("expected at least one batch, got none")
    return grams.result()


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
