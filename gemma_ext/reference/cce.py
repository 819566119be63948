"""Cut cross-entropy from the formulas, with the logits materialised.

    a_nv = logit_scale * e_n . c_v + bias_v
    s_nv = softcap * tanh(a_nv / softcap) / temperature      (s = a / temperature without a cap)
    lse_n = log sum_v exp(s_nv),  p_nv = exp(s_nv - lse_n)
    nll_n = lse_n - s_{n, target_n},  m_n = sum_v p_nv s_nv,  entropy_n = lse_n - m_n

N tokens, V vocabulary, D model width. Everything is computed in float64 when `e` is float64 and in
float32 otherwise; memory is several N x V matrices, so this is for checking, not for training.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def logits(
    e: Tensor,
    c: Tensor,
    bias: Tensor | None = None,
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    """Scaled, biased, capped and tempered logits s, [..., V], float64 if `e` is, else float32."""
    dtype = torch.float64 if e.dtype == torch.float64 else torch.float32
    with torch.autocast("cpu" if e.is_meta else e.device.type, enabled=False):
        a = logit_scale * (e.to(dtype) @ c.to(dtype).T)
        if bias is not None:
            a = a + bias.to(dtype)
        if softcap is not None:
            a = softcap * torch.tanh(a / softcap)
        return a / temperature


def losses(s: Tensor, label: Tensor, owned: Tensor) -> tuple[Tensor, Tensor]:
    """(nll, lse), [...], of scores s [..., V]; nll is lse where a row does not own its label.

    Relative to the largest score of a row, so that a number common to all costs no digits, and nll
    from the labels' rivals, so that neither it nor its gradient is a difference of near numbers.
    """
    top = s.detach().amax(-1, keepdim=True)
    top = torch.where(torch.isneginf(top), 0.0, top)  # of a shard that its bias masks
    s = s - top
    top = top.squeeze(-1)
    lse = torch.logsumexp(s, dim=-1) + top
    label = label.unsqueeze(-1)
    rivals = s.scatter(-1, label, -torch.inf)
    alone = torch.isneginf(rivals.detach()).all(-1, keepdim=True)
    rivals = torch.logsumexp(torch.where(alone, 0.0, rivals), dim=-1)
    nll = functional.softplus(rivals - s.gather(-1, label).squeeze(-1), threshold=40.0)
    nll = torch.where(alone.squeeze(-1), 0.0, nll)
    return torch.where(owned, nll, lse), lse


def rows(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    ignore_index: int = -100,
    class_weight: Tensor | None = None,
    want_entropy: bool = False,
    want_argmax: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Twin of `gemma_ext.ops.cce.cce_rows`; differentiable by plain autograd.

    Args:
        e: [N, D] hidden states. c: [V, D] classifier. bias: [V] or None.
        targets: [N] int32 or int64 labels.
        class_weight: [V]; asks for `weighted_logit_sum`.

    Returns:
        The first five fields of `gemma_ext.ops.cce.Rows`, in its order. A row whose label lies
        outside [0, V) has no target, nll = lse.
    """
    vocab = c.shape[0]
    valid = targets != ignore_index
    owned = valid & (targets >= 0) & (targets < vocab)
    # Ignored rows may hold NaN; 0 * NaN would reach c's gradient through the matrix product.
    e = torch.where(valid.unsqueeze(-1), e, torch.zeros_like(e))
    s = logits(e, c, bias, softcap=softcap, logit_scale=logit_scale, temperature=temperature)
    zero = s.new_zeros(())
    label = torch.where(owned, targets, torch.zeros_like(targets)).long()
    nll, lse = losses(s, label, owned)
    mean_logit = None
    if want_entropy:
        p = torch.softmax(s, -1)
        finite = torch.where(torch.isneginf(s), zero, s)  # 0 * -inf of a masked column is 0
        mean_logit = torch.where(valid, (p * finite).sum(-1), zero)
    weighted = None
    if class_weight is not None:
        weighted = torch.where(valid, s @ class_weight.to(s.dtype), zero)
    argmax = None
    if want_argmax:
        argmax = torch.where(valid, s.argmax(-1), torch.full_like(targets, -1, dtype=torch.int64))
    return (
        torch.where(valid, nll, zero),
        torch.where(valid, lse, zero),
        mean_logit,
        weighted,
        argmax,
    )


@torch.no_grad()
def moments(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    """(log sum_v p_nv^2, sum_v s_nv / V), [N] each, without gradient and 0 in ignored rows."""
    valid = targets != ignore_index
    e = torch.where(valid.unsqueeze(-1), e, torch.zeros_like(e))
    s = logits(e, c, bias, softcap=softcap, logit_scale=logit_scale, temperature=temperature)
    squares = torch.logsumexp(2 * torch.log_softmax(s, -1), -1)
    zero = torch.zeros_like(squares)
    return torch.where(valid, squares, zero), torch.where(valid, s.mean(-1), zero)


def linear_cross_entropy(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    reduction: str = "mean",
    shift: int = 0,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    weight: Tensor | None = None,
    token_weights: Tensor | None = None,
    num_items_in_batch: int | Tensor | None = None,
) -> Tensor:
    """Loss of an LM head, row by row as written:

        l_n = t_n [ (1 - a) w_y nll_n + (a / V) sum_v w_v (lse_n - s_nv) + z lse_n^2 ]

    with a = `label_smoothing`, w = `weight`, z = `z_loss`, t = `token_weights`. "mean" divides
    sum_n l_n by sum_n t_n w_{y_n} over the rows that are not ignored, or by `num_items_in_batch`.

    Args:
        e: [..., T, D]; c: [V, D]; targets: [..., T]; bias, weight: [V]; token_weights: [..., T].
        shift: position t is scored against target t + shift of the same sequence.

    Returns:
        0-d loss, or [..., T - shift] with reduction "none"; zero at ignored positions.
    """
    if shift:
        e, targets = e[..., :-shift, :], targets[..., shift:]
        token_weights = None if token_weights is None else token_weights[..., shift:]
    vocab = c.shape[0]
    valid = targets != ignore_index
    label = torch.where(valid, targets, torch.zeros_like(targets)).long()
    e = torch.where(valid.unsqueeze(-1), e, torch.zeros_like(e))
    s = logits(e, c, bias, softcap=softcap, logit_scale=logit_scale, temperature=temperature)
    nll, lse = losses(s, label, torch.ones_like(valid))
    w = s.new_ones(vocab) if weight is None else weight.to(s.dtype)
    t = torch.ones_like(lse) if token_weights is None else token_weights.to(s.dtype)
    t = torch.where(valid, t, torch.zeros_like(t))
    row = (1 - label_smoothing) * w[label] * nll + z_loss * lse**2
    if label_smoothing:
        row = row + label_smoothing / vocab * ((lse.unsqueeze(-1) - s) * w).sum(-1)
    row = t * row
    if reduction == "none":
        return row
    if reduction == "sum":
        return row.sum()
    divisor = (t * w[label]).sum() if num_items_in_batch is None else num_items_in_batch
    divisor = torch.as_tensor(divisor, dtype=s.dtype, device=s.device)
    return row.sum() / torch.where(divisor == 0, torch.ones_like(divisor), divisor)


def linear_logprobs(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    shift: int = 0,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Target log-probability and entropy, both [..., T - shift], 0 at ignored positions."""
    if shift:
        e, targets = e[..., :-shift, :], targets[..., shift:]
    valid = targets != ignore_index
    label = torch.where(valid, targets, torch.zeros_like(targets)).long()
    e = torch.where(valid.unsqueeze(-1), e, torch.zeros_like(e))
    s = logits(e, c, bias, softcap=softcap, logit_scale=logit_scale, temperature=temperature)
    logp = torch.log_softmax(s, dim=-1)
    entropy = -(logp.exp() * torch.where(torch.isneginf(logp), 0.0, logp)).sum(-1)
    nll, _ = losses(s, label, torch.ones_like(valid))
    zero = torch.zeros_like(nll)
    return torch.where(valid, -nll, zero), torch.where(valid, entropy, zero)
