"""Merging coefficients that learn: theta = theta_0 + sum_m lambda_gm delta_m, g the tensor's group.

AdaMerging (arXiv 2310.02575) chooses them without labels, by the mean entropy of what the merged
model predicts on texts of all tasks. Gradients reach lambda through `ops.souping.soup`, whose
backward is one inner product per tensor and model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gemma_ext.ops.souping import Part, soup
from gemma_ext.progress import track
from gemma_ext.souping.live import Model, like, parameters_of
from gemma_ext.souping.scoring import IGNORED, Scores, unpack

PER = ("model", "layer", "tensor")
_LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")


class Coefficients(nn.Module):
    """Coefficients of M task vectors, one per model, per layer or per tensor.

    Args:
        base: what the task vectors start from.
        experts: M of the same names and shapes.
        per: "model"; "layer", with everything outside of the layers as one more; or "tensor".
        start: of every coefficient; 0.3 is AdaMerging's.

    Attributes:
        values: float32 parameter [G, M].
        groups: what each row of it is for.

    Raises:
        ValueError: an unknown `per`, no expert, or one that does not fit.
    """

    def __init__(
        self, base: Model, experts: Sequence[Model], *, per: str = "layer", start: float = 0.3
    ) -> None:
        super().__init__()
        if per not in PER:
            raise ValueError(f"expected per to be one of {', '.join(PER)}, got {per!r}")
        if not experts:
            raise ValueError("expected at least one expert, got none")
        self.base = parameters_of(base)
        self.experts = [like(self.base, x, f"experts[{i}]") for i, x in enumerate(experts)]
        keys = [_group(name, per) for name in self.base]
        self.groups = list(dict.fromkeys(keys))
        rows = [self.groups.index(key) for key in keys]
        self.register_buffer("rows", torch.tensor(rows), persistent=False)
        device = next(iter(self.base.values())).device
        self.values = nn.Parameter(torch.full((len(self.groups), len(experts)), start))
        self.to(device)

    def tensors(self) -> dict[str, Tensor]:
        """The merged parameters, differentiable in `values`, in the dtypes of the base."""
        parts = [
            Part([expert[name] for expert in self.experts], tensor, name=name)
            for name, tensor in self.base.items()
        ]
        return dict(zip(self.base, soup(parts, self.values[self.rows]), strict=True))

    def call(self, module: nn.Module, *args: Any, prefix: str = "", **kwargs: Any) -> Any:
        """module(*args, **kwargs) with the merged parameters in the place of its own.

        Args:
            module: holds parameters of the base's names after `prefix`; it is not changed.
        """
        merged = {f"{prefix}{name}": tensor for name, tensor in self.tensors().items()}
        return functional_call(module, merged, args, kwargs)

    @torch.no_grad()
    def write_(self, model: nn.Module) -> None:
        """Copies the merged parameters into a model."""
        live = parameters_of(model)
        for name, tensor in like(live, self.tensors(), "the merge").items():
            live[name].copy_(tensor)


def _group(name: str, per: str) -> str:
    if per == "tensor":
        return name
    found = _LAYER.search(f".{name}") if per == "layer" else None
    return f"layer {found[1]}" if found else ("outside" if per == "layer" else "model")


def minimise(
    coefficients: Coefficients,
    loss: Callable[[int], Tensor],
    *,
    steps: int,
    lr: float = 1e-3,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    show_progress: bool = False,
) -> list[float]:
    """Adam on the coefficients.

    Args:
        loss: of step number 0, 1, ..; calls the model through `coefficients.call`.
        steps: how many.
        lr: AdaMerging's.
        bounds: coefficients are put back into after each step; None: no bounds.
        show_progress: a bar that counts steps.

    Returns:
        The loss of every step.
    """
    optimizer = torch.optim.Adam([coefficients.values], lr=lr)
    history = []
    for step in track(range(steps), "coefficients", show_progress):
        optimizer.zero_grad()
        value = loss(step)
        value.backward()
        optimizer.step()
        if bounds is not None:
            with torch.no_grad():
                coefficients.values.clamp_(*bounds)
        history.append(float(value.detach()))
    return history


def adamerging(
    model: nn.Module,
    coefficients: Coefficients,
    batches: Sequence[Tensor | Mapping[str, Any]],
    *,
    steps: int = 500,
    lr: float = 1e-3,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    show_progress: bool = False,
) -> list[float]:
    """Chooses coefficients by the entropy of the merged model's predictions; no label is looked at.

    The N x V logits are never held. Memory: the merged parameters and their gradients, beside the
    base and the experts.

    Args:
        model: transformers causal LM that is run; it is not changed.
        coefficients: of a base and experts with the model's parameter names.
        batches: token ids [B, T] or mappings with `input_ids` and `attention_mask`, taken in turn:
            interleave the tasks.
        steps, lr, bounds, show_progress: see `minimise`; 500 and 1e-3 are the paper's.

    Returns:
        Mean entropy per token in nats, of every step.

    Raises:
        ValueError: no batch.
    """
    if not batches:
        raise ValueError("expected at least one batch, got none")
    scores = Scores(model)
    device = coefficients.values.device

    def loss(step: int) -> Tensor:
        ids, mask = unpack(batches[step % len(batches)], device)
        labels = ids.masked_fill(mask == 0, IGNORED)
        _, entropy = coefficients.call(scores, ids, mask, labels, prefix="model.")
        return entropy.sum() / (labels[:, 1:] != IGNORED).sum()

    return minimise(
        coefficients, loss, steps=steps, lr=lr, bounds=bounds, show_progress=show_progress
    )
