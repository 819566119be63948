"""Where rows go after a block: up one loop, to the head, or out."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gemma_ext.ops.depth_batching import kv_op
from gemma_ext.ops.depth_batching.inputs import check_ints, is_reference
from gemma_ext.reference import depth_batching as formulas

MOST_LOOPS = 64


class Compacted(NamedTuple):
    """Rows of the next step, all int32 on the device of the rows.

    Attributes:
        order: [n] a permutation of the rows: first those that run on, by loop; then those that
            leave for the head; then those that are dropped. Rows of one kind keep their order.
        next_loop: [n] the loop that row order[i] runs next, ascending; -1 behind those that run on.
        seg_offsets: [loops + 1] where each loop begins in `order`.
        counts: [3] rows that run on, leave, are dropped.
    """

    order: Tensor
    next_loop: Tensor
    seg_offsets: Tensor
    counts: Tensor


def depth_compact(
    loop: Tensor,
    leave: Tensor,
    loops: int,
    *,
    drop: Tensor | None = None,
    impl: str = "auto",
) -> Compacted:
    """Sort rows by the loop they run next; a stable counting sort that no host waits for.

    Args:
        loop: int32 [n], the loop each row has just run, in [0, loops); -1 for a row that enters,
            which runs loop 0 next. Any other value is dropped, so that a launch can be filled up.
        leave: bool [n], rows whose exit test said so. Those of the last loop leave anyway; of a row
            that enters it is not read.
        loops: B, at most 64.
        drop: bool [n], rows that go nowhere: cancelled, or a fill that ends here.
        impl: "auto" or "reference".

    Raises:
        ValueError, TypeError: what does not fit.
    """
    check_ints("loop", loop, ("n",), loop)
    for name, mask in (("leave", leave), ("drop", drop)):
        if mask is None:
            continue
        if mask.dtype != torch.bool:
            raise TypeError(f"expected {name} to be bool, got {mask.dtype}")
        if mask.shape != loop.shape or mask.device != loop.device:
            raise ValueError(
                f"expected {name} to be {list(loop.shape)} on {loop.device}, "
                f"got {list(mask.shape)} on {mask.device}"
            )
    if not 1 <= loops <= MOST_LOOPS:
        raise ValueError(f"expected loops in [1, {MOST_LOOPS}], got {loops}")
    if is_reference(impl, loop, "depth_compact"):
        return Compacted(*formulas.depth_compact(loop, leave, drop, loops))
    return Compacted(*kv_op.depth_compact(loop, leave, drop, loops))
