"""The head through 8-bit codes that certify what they leave out."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gemma_ext.ops import _devices
from gemma_ext.ops.depth_batching import head_op
from gemma_ext.ops.depth_batching.head import STRICT, check_exit, check_head, head_exit
from gemma_ext.ops.depth_batching.head_op import Logits
from gemma_ext.ops.depth_batching.inputs import check_like, is_reference
from gemma_ext.reference import depth_batching_head as formulas

MODES = ("max_prob", "margin")
MOST_CANDIDATES = 1023


class Shortlist(NamedTuple):
    """A head W [V, D] beside codes of it, |x . W_v - scale_v x . codes_v| <= |x| slack_v.

    Attributes:
        weight: W.
        codes: int8 [V, D].
        scale: float32 [V], the largest |W_vd| / 127.
        slack: float32 [V]: |W_v - scale_v codes_v|, and what two float32 sums over D may be off.
    """

    weight: Tensor
    codes: Tensor
    scale: Tensor
    slack: Tensor


class ShortlistExit(NamedTuple):
    """Of n rows.

    Attributes:
        ids: int32 [n], the best token, as `head_exit` has it.
        top: [n], its logit.
        exits: bool [n], or None without a mode.
        certified: bool [n], rows that the codes decided; the others took the whole head.
    """

    ids: Tensor
    top: Tensor
    exits: Tensor | None
    certified: Tensor


def make_shortlist(weight: Tensor, *, rows: int = 8192) -> Shortlist:
    """Codes of a head [V, D], a quarter of its float32; built `rows` rows at a time.

    Raises:
        ValueError, TypeError: what does not fit, or is not finite.
    """
    if weight.dim() != 2 or weight.shape[0] == 0:
        raise ValueError(f"expected weight to be [V, D] with V > 0, got {list(weight.shape)}")
    if not weight.dtype.is_floating_point:
        raise TypeError(f"expected weight to be of a float dtype, got {weight.dtype}")
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale, slack = weight.new_empty((2, weight.shape[0]), dtype=torch.float32)
    for at in range(0, weight.shape[0], rows):
        part = slice(at, at + rows)
        codes[part], scale[part], slack[part] = formulas.codes_of(weight[part])
    if not bool(slack.isfinite().all()):
        raise ValueError("expected weight to be finite")
    return Shortlist(weight, codes, scale, slack)


def shortlist_head(
    h: Tensor,
    head: Shortlist,
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
    candidates: int = 64,
    impl: str = "auto",
) -> ShortlistExit:
    """Best token and exit of `head_exit`, reading a byte an element where that decides.

    The codes bound every logit; the C tokens with the highest bounds get their exact ones. A row
    is certified where its best is above all other bounds and, with a mode, where the bounds of lse
    leave no doubt of the exit. All other rows take the whole head. Which they are a card knows by
    itself: nothing waits for it, and a head that no row takes is not read.

    Args:
        h, bias, norm_weight, eps, plus_one, softcap, logit_scale, threshold, strict, impl: as
            `head_exit` takes them.
        head: of `make_shortlist`.
        mode: "max_prob" or "margin".
        candidates: C, at most 1023; rows have min(C, V).

    Raises:
        ValueError, TypeError: what does not fit.
        NotImplementedError: a derivative is asked for.
    """
    reference = is_reference(impl, h, "depth_shortlist")
    logits = Logits(head.weight, bias, norm_weight, eps, plus_one, softcap, logit_scale)
    check_head(h, logits, reference=reference)
    check_like("the codes", head.codes, h, dtype=False)
    limit, strict = check_exit(mode, threshold, strict, len(h), h, modes=MODES, strict_by=STRICT)
    if not 1 <= candidates <= MOST_CANDIDATES:
        raise ValueError(f"expected candidates in [1, {MOST_CANDIDATES}], got {candidates}")
    count = min(candidates, head.weight.shape[0])
    codes = head.codes, head.scale, head.slack
    if reference:
        found = formulas.shortlist(h, *codes, count, **logits._asdict())
    else:
        found = head_op.shortlist(h, logits, *codes, count)
    ids, top, rest, low, high = found
    best, certified = top[:, 0], top[:, 0] > rest
    exits = None
    if limit is not None:
        least, most = formulas.exit_bounds(mode, top, rest, low, high)
        exits = least > limit if strict else least >= limit
        certified &= exits | ((most <= limit) if strict else (most < limit))
    if reference or _devices.is_readable(certified):
        at = (~certified).nonzero().squeeze(-1)
        if len(at):
            whole = head_exit(
                h[at], mode=mode, threshold=None if limit is None else limit[at],
                strict=strict if mode else None, impl=impl, **logits._asdict(),
            )  # fmt: skip
            ids = ids.index_put((at,), whole.ids)
            best = best.index_put((at,), whole.top[:, 0])
            exits = exits if exits is None else exits.index_put((at,), whole.exits)
        return ShortlistExit(ids, best, exits, certified)
    whole = head_op.head_exit(h, logits, limit, None, None, mode, strict, 0, certified)
    ids = torch.where(certified, ids, whole[0])
    best = torch.where(certified, best, whole[1][:, 0])
    exits = exits if exits is None else torch.where(certified, exits, whole[4])
    return ShortlistExit(ids, best, exits, certified)
