"""K and V of loops that a token has skipped: by copying, or by sharing a depth."""

from __future__ import annotations

from torch import Tensor

from gemma_ext.ops.depth_batching import kv_op
from gemma_ext.ops.depth_batching.inputs import check_ints, check_marks, check_rows, is_reference
from gemma_ext.reference import depth_batching as formulas
from gemma_ext.reference.depth_batching import PAGE

__all__ = ["PAGE", "kv_copy", "kv_depths", "unfilled"]


def kv_depths(policy: str, loops: int, keep: int = 1) -> list[int]:
    """Which of a layer's depths each loop writes and reads.

    | policy | loop j has depth |
    |---|---|
    | "own" | j |
    | "single" | 0, overwritten at every loop |
    | "first_then_shared" | min(j, keep) |
    | "modulo" (Huginn) | j mod keep |
    """
    if policy not in ("own", "single", "first_then_shared", "modulo"):
        raise ValueError(
            f"expected policy to be own, single, first_then_shared or modulo, got {policy!r}"
        )
    if loops < 1 or keep < 1:
        raise ValueError(f"expected loops and keep of at least 1, got {loops} and {keep}")
    if policy == "single":
        return [0] * loops
    if policy == "first_then_shared":
        return [min(j, keep) for j in range(loops)]
    if policy == "modulo":
        return [j % keep for j in range(loops)]
    return list(range(loops))


def kv_copy(
    kv_pool: Tensor,
    block_tables: Tensor,
    row_req: Tensor,
    row_pos: Tensor,
    row_loop: Tensor,
    depths: Tensor,
    *,
    fill_mark: Tensor | None = None,
    impl: str = "auto",
) -> None:
    """Give the loops that a row has skipped the K and V of its last one, all layers in one launch.

    A depth that an earlier loop of the row wrote keeps what it has.

    Args:
        kv_pool: [L, pages, 2, n_kv, 16, hd], written in place.
        block_tables: int32 [R, max_pages].
        row_req: int32 [n], a row of block_tables; -1: nothing is written.
        row_pos: int32 [n].
        row_loop: int32 [n], the last loop that a row ran, in [0, B).
        depths: int32 [K, B], the depth in kv_pool of every stored layer at each loop (`kv_depths`).
        fill_mark: uint8 [pages, 16], raised to B.
        impl: "auto" or "reference".

    Raises:
        ValueError, TypeError: what does not fit.
    """
    check_rows(kv_pool, block_tables, row_req, row_pos, row_loop)
    check_ints("depths", depths, ("K", "B"), kv_pool)
    check_marks(fill_mark, kv_pool)
    reference = is_reference(impl, kv_pool, "kv_copy")
    copy = formulas.kv_copy if reference else kv_op.kv_copy
    copy(kv_pool, block_tables, row_req, row_pos, row_loop, depths, fill_mark)


def unfilled(
    fill_mark: Tensor,
    block_tables: Tensor,
    row_req: Tensor,
    row_pos: Tensor,
    row_loop: Tensor,
    *,
    window: Tensor | None = None,
) -> Tensor:
    """bool [n]: rows that would read K or V which nobody has written; for tests, it waits for a
    device.

    Args:
        fill_mark: uint8 [pages, 16], loops whose K and V a token has.
        block_tables, row_req, row_pos, row_loop, window: as `paged_attn_mixed_depth` takes them.
    """
    return formulas.unfilled(fill_mark, block_tables, row_req, row_pos, row_loop, window)
