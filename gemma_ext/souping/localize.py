"""Masks of the elements that a task needs, trained (Localize-and-Stitch, arXiv 2408.13656).

    minimise over S:   loss(theta_0 + sigmoid(S) delta) + l1 mean(sigmoid(S))

S starts at +bias on the largest |delta| of the model and at -bias elsewhere; the gradient of S is
(d loss / d theta) delta sigmoid'(S), of the mean loss over all data at once; in the end the mask is
sigmoid(S) > 1/2. The penalty pulls gates towards 0; in both released codes its sign pushes them
away. `methods.localize.Stitch` merges with the masks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gemma_ext.ops.souping import Magnitudes, Part
from gemma_ext.progress import track
from gemma_ext.souping.live import Model, like, parameters_of
from gemma_ext.souping.scoring import IGNORED, Scores, unpack


def localize(
    model: nn.Module,
    expert: Model,
    batches: Sequence[Tensor | Mapping[str, Any]],
    *,
    density: float = 0.1,
    bias: float = 3.0,
    lr: float = 1e8,
    epochs: int = 1,
    l1: float = 0.0,
    trained: Callable[[str], bool] = lambda name: True,
    show_progress: bool = False,
) -> dict[str, Tensor]:
    """Masks of one task.

    Args:
        model: transformers causal LM that holds the base; it is not changed.
        expert: the fine-tune, same names and shapes.
        batches: a few labelled examples of the task: token ids [B, T], or mappings with
            `input_ids`, `attention_mask` and optionally `labels`.
        density: share of the elements that the masks start from.
        bias, lr, epochs, l1: as above; the defaults are MergeBench's. The rate is that large
            because the mean loss hardly depends on one element of a model.
        trained: which parameters have masks; the others stay the base's.
        show_progress: a bar that counts epochs.

    Returns:
        Parameter name to mask, 0 or 1 in bfloat16.

    Raises:
        ValueError: no batch, or an expert that does not fit.
    """
    if not batches:
        raise ValueError("expected at least one batch, got none")
    base = {name: x for name, x in parameters_of(model).items() if trained(name)}
    tuned = like(base, expert, "expert")
    deltas = {name: tuned[name].float() - base[name].float() for name in base}
    gates = {
        name: torch.where(mask, bias, -bias) for name, mask in largest(base, tuned, density).items()
    }
    scores = Scores(model)
    for _ in track(range(epochs), "localize", show_progress):
        slopes = _slopes(scores, base, deltas, gates, batches)
        count = sum(gate.numel() for gate in gates.values())
        for name, gate in gates.items():
            open_ = gate.sigmoid()
            gradient = slopes[name] * deltas[name] + l1 / count
            gate -= lr * gradient * open_ * (1 - open_)
    return {name: (gate > 0).bfloat16() for name, gate in gates.items()}


def largest(
    base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], density: float
) -> dict[str, Tensor]:
    """Bool masks of the int(density D) largest deltas of the model, equals at the end kept."""
    parts = [Part([tuned[name]], base[name], name=name) for name in base]
    count = int(density * sum(x.numel() for x in base.values()))
    cut = Magnitudes(1).find(parts, count).cut()
    threshold = float(cut.bits.view(torch.float32))  # NaN where nothing is kept
    moved = {name: (tuned[name].float() - x.float()).abs() for name, x in base.items()}
    return {name: (x >= threshold) & (x > 0) for name, x in moved.items()}


def _slopes(
    scores: Scores,
    base: Mapping[str, Tensor],
    deltas: Mapping[str, Tensor],
    gates: Mapping[str, Tensor],
    batches: Sequence[Tensor | Mapping[str, Any]],
) -> dict[str, Tensor]:
    """d (mean loss per token) / d theta at theta_0 + sigmoid(S) delta, float32."""
    leaves = {
        f"model.{name}": (x.float() + gates[name].sigmoid() * deltas[name]).to(x.dtype)
        for name, x in base.items()
    }
    for leaf in leaves.values():
        leaf.requires_grad_()
    total = {name: torch.zeros_like(delta) for name, delta in deltas.items()}
    tokens = 0
    for batch in batches:
        ids, mask = unpack(batch, next(iter(base.values())).device)
        given = batch.get("labels") if isinstance(batch, Mapping) else None
        labels = ids.masked_fill(mask == 0, IGNORED) if given is None else given.to(ids.device)
        logprobs, _ = functional_call(scores, leaves, (ids, mask, labels))
        gradients = torch.autograd.grad(-logprobs.sum(), list(leaves.values()), allow_unused=True)
        for name, gradient in zip(base, gradients, strict=True):
            if gradient is not None:
                total[name] += gradient.float()
        tokens += int((labels[:, 1:] != IGNORED).sum())
    return {name: slope / max(1, tokens) for name, slope in total.items()}
