"""What the released code computes where that is not the method it is named after.

- Localize-and-Stitch: every expert's masked delta stays in the base that the next delta is taken
  from and that the stitched deltas are added to; of the overlaps, only the one with the last other
  expert divides.
- Fisher: the gradient of the most probable token after the last position of a batch, while an
  optimiser moves the weights.
- RegMean: Gram matrices, their products and the solution in bfloat16.
- Consensus: the same lambda of 0.2 for every task, whatever is asked for.

Read in the released sources; for comparison beside the methods, never instead of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

Weights = Mapping[str, Tensor]
CONSENSUS_LAMBDA = 0.2
FISHER_RATE = 1e-5


def localize_and_stitch(
    base: Weights, experts: Sequence[Weights], sparsity: float
) -> dict[str, Tensor]:
    """base' + sum_i c_i mask_i (theta_i - base'), base' the base that all localizers have written.

    Args:
        base: by name, any shapes; not changed.
        experts: M mappings of the same names and shapes.
        sparsity: share of all elements that each mask keeps; ties at the threshold are kept.
    """
    flat, tuned = _flat(base), [_flat(expert) for expert in experts]
    flat = flat.clone()
    masks = []
    for vector in tuned:
        delta = vector - flat
        keep = int(sparsity * delta.numel())
        threshold = delta.abs().topk(keep).values.min() if keep else torch.inf
        masks.append(delta.abs() >= threshold)
        flat += delta * masks[-1]
    stitched = torch.zeros_like(flat)
    for i, (vector, mask) in enumerate(zip(tuned, masks, strict=True)):
        others = [other for j, other in enumerate(masks) if j != i]
        shared = mask & others[-1] if others else torch.zeros_like(mask)
        stitched += mask / (1 + shared.to(flat.dtype)) * (vector - flat)
    return _unflat(flat + stitched, base)


def moving_fisher(model: nn.Module, batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """sum over batches of the squared gradient of the arg-max label after the last position.

    Args:
        model: a causal LM; the copy that is trained meanwhile is thrown away.
        batches: [B, T] token ids.
    """
    import copy

    moving = copy.deepcopy(model).train().requires_grad_(True)
    optimizer = torch.optim.AdamW(moving.parameters(), lr=FISHER_RATE, weight_decay=0.0)
    squares = {name: torch.zeros_like(p) for name, p in moving.named_parameters()}
    for ids in batches:
        logits = moving(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1].float()
        loss = nn.functional.cross_entropy(logits, logits.argmax(-1))
        optimizer.zero_grad()
        loss.backward()
        for name, p in moving.named_parameters():
            if p.grad is not None:
                squares[name] += p.grad**2
        optimizer.step()
    return squares


def regmean_bfloat16(
    weights: Sequence[Tensor], grams: Sequence[Tensor], reduction: float
) -> Tensor:
    """RegMean of one layer with everything but the inverse in bfloat16.

    Args:
        weights: M tensors [out, in]. grams: M tensors [in, in].
        reduction: factor of what is off the diagonals.

    Returns:
        [out, in] bfloat16.
    """
    low = torch.bfloat16
    whole, target = 0, 0
    for weight, gram in zip(weights, grams, strict=True):
        gram = gram.to(low)
        gram = torch.where(torch.eye(len(gram), dtype=torch.bool), gram, gram * reduction)
        whole = whole + gram
        target = target + gram @ weight.to(low).T
    wide = whole.float()
    singular = bool((wide.diagonal() == 0).any()) or float(torch.linalg.cond(wide)) > 1e8
    inverse = torch.linalg.pinv(wide) if singular else torch.linalg.inv(wide)
    return (inverse.to(low) @ target).T


def _flat(weights: Weights) -> Tensor:
    return torch.cat([weights[name].flatten() for name in weights])


def _unflat(vector: Tensor, like: Weights) -> dict[str, Tensor]:
    parts = vector.split([tensor.numel() for tensor in like.values()])
    return {name: part.view_as(like[name]) for (name, part) in zip(like, parts, strict=True)}
