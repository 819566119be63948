"""The baseline a language model has to beat: a bigram model with interpolated Kneser-Ney smoothing.

Absolute discounting with one discount per order, estimated from the counts of counts, d = n1 / (n1
+ 2 n2) (Ney, Essen and Kneser 1994); the lower order is the continuation distribution, interpolated
with the uniform one (Chen and Goodman 1999, section 2.7):

    p(w | v) = max(c(v, w) - d, 0) / c(v) + d N1+(v, .) / c(v) * p_c(w)
    p_c(w)   = max(N1+(., w) - d', 0) / N1+(., .) + d' N / N1+(., .) / V
"""

from __future__ import annotations

import torch
from torch import Tensor


def bigram_perplexity(train_ids: Tensor, heldout_ids: Tensor, vocab_size: int) -> float:
    """Held-out perplexity of a bigram model counted on the training tokens.

    Args:
        train_ids: [n] int64 training stream.
        heldout_ids: [m] int64 held-out stream; positions 1..m-1 are predicted from the token
            before.
        vocab_size: V.

    Returns:
        exp of the mean negative log-likelihood in nats.

    Raises:
        ValueError: a stream with fewer than two tokens, or an id outside [0, V).
    """
    for name, ids in (("train_ids", train_ids), ("heldout_ids", heldout_ids)):
        if ids.dim() != 1 or ids.numel() < 2:
            raise ValueError(f"{name}: expected [n] with n >= 2, got {list(ids.shape)}")
        if int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
            raise ValueError(f"{name}: expected ids in [0, {vocab_size}), got one outside")

    train_ids, heldout_ids = train_ids.to(torch.int64), heldout_ids.to(torch.int64)
    pairs, counts = torch.unique(
        train_ids[:-1] * vocab_size + train_ids[1:], sorted=True, return_counts=True
    )
    left, right = pairs // vocab_size, pairs % vocab_size
    seen = torch.bincount(train_ids[:-1], minlength=vocab_size).double()
    followers = torch.bincount(left, minlength=vocab_size).double()
    predecessors = torch.bincount(right, minlength=vocab_size).double()

    d_low = _discount(predecessors)
    continuation = (predecessors - d_low).clamp_min(0) / pairs.numel()
    continuation += d_low * int((predecessors > 0).sum()) / pairs.numel() / vocab_size

    previous, target = heldout_ids[:-1], heldout_ids[1:]
    key = previous * vocab_size + target
    at = torch.searchsorted(pairs, key).clamp_max(pairs.numel() - 1)
    count = torch.where(pairs[at] == key, counts[at], 0).double()
    d_high = _discount(counts.double())
    total = seen[previous].clamp_min(1)
    # a context never seen has no discounted mass to give away: all of it goes to the lower order
    backoff = torch.where(seen[previous] > 0, d_high * followers[previous] / total, 1.0)
    p = (count - d_high).clamp_min(0) / total + backoff * continuation[target]
    return float(torch.exp(-p.log().mean()))


def _discount(counts: Tensor) -> float:
    once, twice = float((counts == 1).sum()), float((counts == 2).sum())
    return once / (once + 2 * twice) if once + twice > 0 else 0.5
