"""What serving reads off the LM head, in one pass over its weight and without logits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gemma_ext.ops.depth_batching import head_op
from gemma_ext.ops.depth_batching.head_op import Logits
from gemma_ext.ops.depth_batching.inputs import check_like, check_shape, is_reference
from gemma_ext.ops.depth_batching.linear_inputs import check_storage, per_row
from gemma_ext.reference import depth_batching_head as formulas

MODES = ("max_prob", "margin", "entropy")
STRICT = {"max_prob": False, "margin": True, "entropy": False}
"""Whether a score at the threshold itself stays: EE-LLM leaves at >=, CALM and FREE at >."""
MOST_CANDIDATES = 1024


class HeadExit(NamedTuple):
    """Of n rows; None where not asked for.

    Attributes:
        ids: int32 [n], the best token, the lowest id among equal ones.
        top: [n, 2], the two largest logits.
        lse: [n], log sum exp of the logits.
        entropy: [n], in nats.
        exits: bool [n].
        samples: int32 [n], drawn at the row's temperature; `ids` where that is below 1e-6.
        tempered: [n], log sum exp(logit / T), or `lse` where T is below 1e-6.
        values: [n, C], the largest logits, in descending order.
        indices: int32 [n, C], their ids, ascending among equal ones.
    """

    ids: Tensor
    top: Tensor
    lse: Tensor
    entropy: Tensor
    exits: Tensor | None
    samples: Tensor | None
    tempered: Tensor | None
    values: Tensor | None
    indices: Tensor | None


def head_exit(
    h: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    plus_one: bool = False,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mode: str | None = None,
    threshold: Tensor | float | None = None,
    strict: bool | None = None,
    temperature: Tensor | float | None = None,
    keys: Tensor | None = None,
    candidates: int = 0,
    impl: str = "auto",
) -> HeadExit:
    """Best token, margin, lse, entropy, a sample and candidates of softcap(scale norm(h) W^T + b).

    W is read once for all rows (up to 128 of them), logits never reach memory, and every result of
    a row has the bits that it has alone. NaN logits count as -inf where logits are compared, make
    lse and entropy NaN, and never leave; +inf does the same to the sums. No autograd.

    Top-k, top-p, min-p, penalties and logprobs follow from candidates: the share of candidate c is
    exp(values[c] - lse), or exp(values[c] / T - tempered) at the temperature. A sample among them
    is argmax(values / T + gumbel(indices, keys)), which is `samples` where none is left out.

    Args:
        h: [n, D] float32, bfloat16 or float16: hidden rows before the final norm, or behind it.
        weight: [V, D], the head; in the dtype of h, unless a norm comes between.
        bias: [V].
        norm_weight: [D] of the final RMS norm, which is rounded to the dtype of `weight`.
        eps, plus_one: of the norm, as `gather_rms_norm` has them.
        softcap: cap of cap tanh(logit / cap).
        logit_scale: of h W^T.
        mode: leave by "max_prob" p1, "margin" p1 - p2 above the threshold, or "entropy" below it.
        threshold: [n] or one number.
        strict: whether a score at the threshold stays; by default that of the mode: margin only.
        temperature: [n] or one number; asks for samples. Below 1e-6 the best token is taken.
        keys: int64 [n, 3]: seed, request and position, which alone decide a row's noise.
        candidates: C, at most 1024; rows have min(C, V).
        impl: "auto", or "reference" for plain torch, which also takes float64 and holds logits.

    Raises:
        ValueError, TypeError: what does not fit.
        NotImplementedError: a derivative is asked for.
    """
    reference = is_reference(impl, h, "depth_head_exit")
    logits = Logits(weight, bias, norm_weight, eps, plus_one, softcap, logit_scale)
    check_head(h, logits, reference=reference)
    n = h.shape[0]
    limit, strict = check_exit(mode, threshold, strict, n, h, modes=MODES, strict_by=STRICT)
    if (temperature is None) != (keys is None):
        raise ValueError("expected temperature and keys together, got one of them")
    heat = None if temperature is None else per_row("temperature", temperature, n, h)
    if keys is not None:
        check_keys(keys, n, h)
    if not 0 <= candidates <= MOST_CANDIDATES:
        raise ValueError(f"expected candidates in [0, {MOST_CANDIDATES}], got {candidates}")
    count = min(candidates, weight.shape[0])
    if reference:
        s = formulas.head_logits(h, **logits._asdict())
        rows = formulas.head_rows(s, heat, keys, count)
        exits = None
        if mode is not None:
            exits, _ = formulas.exits_by_head(mode, rows, limit, strict=strict)
        fields = (
            rows.ids,
            rows.top,
            rows.lse,
            rows.entropy,
            exits,
            rows.samples,
            rows.tempered,
            rows.values,
            rows.indices,
        )
    else:
        fields = head_op.head_exit(h, logits, limit, heat, keys, mode, strict, count)
    drawn, wide = heat is not None, count > 0
    keep = (True,) * 4 + (mode is not None, drawn, drawn, wide, wide)
    return HeadExit(*(x if kept else None for x, kept in zip(fields, keep, strict=True)))


def gumbel(ids: Tensor, keys: Tensor, *, impl: str = "auto") -> Tensor:
    """The noise that `head_exit` adds to logit / T of token `ids` [n, C] (int32) of rows with
    `keys` int64 [n, 3]: float32 [n, C], or float64 with impl="reference".

    -log(-log(1 - u)), u = (word + 1/2) 2^-32, where word is word id % 4 of Philox4x32-10 of the key
    `seed` (its low 63 bits) and the counter (id / 4, position, request, request >> 32).

    Raises:
        ValueError, TypeError: what does not fit.
    """
    reference = is_reference(impl, ids, "depth_gumbel")
    check_shape("ids", ids, ("n", "C"))
    if ids.dtype != torch.int32:
        raise TypeError(f"expected ids in torch.int32, got it in {ids.dtype}")
    check_keys(keys, ids.shape[0], ids)
    if reference:
        return formulas.gumbel(ids, keys)
    return head_op.gumbel(ids, keys)


def check_keys(keys: Tensor, n: int, like: Tensor) -> None:
    check_shape("keys", keys, (n, 3))
    check_like("keys", keys, like, dtype=False)
    if keys.dtype != torch.int64:
        raise TypeError(f"expected keys in torch.int64, got it in {keys.dtype}")


def check_exit(
    mode: str | None,
    threshold: Tensor | float | None,
    strict: bool | None,
    n: int,
    like: Tensor,
    *,
    modes: tuple[str, ...],
    strict_by: dict[str, bool],
) -> tuple[Tensor | None, bool]:
    """(threshold [n] or None, strict)."""
    if mode is None:
        if threshold is not None:
            raise ValueError("expected a mode with threshold, got None")
        return None, False
    if mode not in modes:
        listed = ", ".join(modes[:-1]) + f" or {modes[-1]}"
        raise ValueError(f"expected mode to be {listed}, got {mode!r}")
    if threshold is None:
        raise ValueError(f"expected a threshold with mode={mode!r}, got None")
    strict = strict_by[mode] if strict is None else strict
    return per_row("threshold", threshold, n, like), strict


def check_head(h: Tensor, logits: Logits, *, reference: bool) -> None:
    weight, bias, norm_weight, _, _, softcap, _ = logits
    check_shape("h", h, ("n", "D"))
    check_storage("h", h, reference=reference)
    check_shape("weight", weight, ("V", h.shape[1]))
    check_storage("weight", weight, reference=reference)
    check_like("weight", weight, h, dtype=norm_weight is None)
    if weight.shape[0] == 0:
        raise ValueError("expected weight to have at least one row, got none")
    if bias is not None:
        check_shape("bias", bias, (weight.shape[0],))
        check_like("bias", bias, h, dtype=False)
        check_storage("bias", bias, reference=reference)
    if norm_weight is not None:
        check_shape("norm_weight", norm_weight, (h.shape[1],))
        check_like("norm_weight", norm_weight, h, dtype=False)
        check_storage("norm_weight", norm_weight, reference=reference)
    if softcap is not None and not softcap > 0:
        raise ValueError(f"expected softcap to be None or positive, got {softcap}")
