"""The diagonal of the Fisher information of a model's parameters.

    F = E_x E_{y ~ p(y|x)} [ (d log p(y|x) / d theta)^2 ]

One backward pass per sequence, squared before it is added: the square of a batch's summed gradient
is another quantity. Of a causal LM, y is one token drawn after every prefix of the text; draws at
different positions are independent with gradients of mean zero, so the square of their sum has the
expectation of the sum of their squares.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gemma_ext.progress import track
from gemma_ext.souping.scoring import IGNORED, Scores, unpack

LABELS = ("model", "data")


def squared_scores(
    parameters: Mapping[str, Tensor], scores: Iterable[tuple[Tensor, float]]
) -> dict[str, Tensor]:
    """sum of weight * (d score / d theta)^2 over scores.

    Args:
        parameters: by name, requiring gradients.
        scores: pairs of a 0-d log-probability and its weight; one that is yielded lazily frees the
            graph of the one before it. The exact expectation over few classes is every class's
            log-probability with its probability as the weight.

    Returns:
        By name, float32 of each parameter's shape.
    """
    names, leaves = list(parameters), list(parameters.values())
    squares = [torch.zeros_like(leaf, dtype=torch.float32) for leaf in leaves]
    for score, weight in scores:
        gradients = torch.autograd.grad(score, leaves, allow_unused=True)
        for square, gradient in zip(squares, gradients, strict=True):
            if gradient is not None:
                gradient = gradient.float()
                square.addcmul_(gradient, gradient, value=weight)
    return dict(zip(names, squares, strict=True))


def fisher_diagonal(
    model: nn.Module,
    batches: Iterable[Tensor | Mapping[str, Any]],
    *,
    labels: str = "model",
    seed: int = 0,
    show_progress: bool = False,
) -> dict[str, Tensor]:
    """Fisher diagonal of a transformers causal LM, per sequence of the data.

    Memory: one float32 copy of the parameters and the gradients of one sequence.

    Args:
        model: what requires a gradient is estimated; its weights are not changed.
        batches: token ids [B, T] or mappings with `input_ids` and `attention_mask`.
        labels: "model" draws y from the model; "data" takes the text itself (the empirical Fisher,
            which is no Fisher information but what many merges have used).
        seed: of the draws.
        show_progress: a bar that counts sequences.

    Raises:
        ValueError: an unknown `labels`, or no sequence.
    """
    if labels not in LABELS:
        raise ValueError(f"expected labels to be one of {', '.join(LABELS)}, got {labels!r}")
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    scores = Scores(model)
    device = next(iter(parameters.values())).device
    generator = torch.Generator(device).manual_seed(seed)
    count = 0

    def sequences() -> Iterable[tuple[Tensor, float]]:
        nonlocal count
        for batch in track(batches, "fisher", show_progress):
            for ids, mask in zip(*unpack(batch, device), strict=True):
                ids, mask = ids[None], mask[None]
                if labels == "model":
                    target = scores.sample(ids, mask, generator)
                else:
                    target = ids.masked_fill(mask == 0, IGNORED)
                count += 1
                yield scores(ids, mask, target)[0].sum(), 1.0

    squares = squared_scores(parameters, sequences())
    if count == 0:
        raise ValueError("expected at least one sequence in batches, got none")
    return {name: square / count for name, square in squares.items()}
