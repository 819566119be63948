"""State propagation: K and V of skipped loops from the hidden state that a token left with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from gemma_ext.ops.depth_batching import kv_op
from gemma_ext.ops.depth_batching.inputs import (
    check_ints,
    check_like,
    check_marks,
    check_rows,
    check_shape,
    is_reference,
)
from gemma_ext.ops.depth_batching.linear import Projection
from gemma_ext.ops.depth_batching.rope import check_norm, check_rope
from gemma_ext.reference import depth_batching as formulas


@dataclass(frozen=True)
class DeeperLayer:
    """What of a stored layer makes K and V.

    Attributes:
        norm: RMSNorm weight before the projections, [D], or [B, D] by loop.
        k, v: projections to n_kv * hd, in the dtype of kv_pool.
        depth_of, rope_of, k_norm: as `rope_kv_write` takes them.
    """

    norm: Tensor
    k: Projection
    v: Projection
    depth_of: Tensor
    rope_of: Tensor | None = None
    k_norm: Tensor | None = None


def kv_propagate(
    h: Tensor,
    layers: Sequence[DeeperLayer],
    kv_pool: Tensor,
    block_tables: Tensor,
    row_req: Tensor,
    row_pos: Tensor,
    row_loop: Tensor,
    *,
    rope: Tensor | None = None,
    eps: float = 1e-6,
    plus_one: bool = False,
    fill_mark: Tensor | None = None,
    impl: str = "auto",
) -> None:
    """Write K and V of every loop after a row's last one, in every layer, as if h were its input.

    What CALM calls state propagation: exact only where blocks change nothing. Norms, and what the
    projections give, are rounded to the dtype of kv_pool. On a card all layers and loops share the
    launches. Of loops that share a depth the last one's K and V stay.

    Args:
        h: [n, D], the hidden state after the last loop, in the dtype of kv_pool.
        layers: every stored layer of the block.
        kv_pool, block_tables, row_req, row_pos: as `rope_kv_write` takes them.
        row_loop: int32 [n], the last loop that a row ran.
        rope, fill_mark: as `rope_kv_write` takes them; fill_mark is raised to B.
        eps, plus_one: of every norm.
        impl: "auto" or "reference".

    Raises:
        ValueError, TypeError: what does not fit.
    """
    n = check_rows(kv_pool, block_tables, row_req, row_pos, row_loop)
    check_shape("h", h, (n, "D"))
    check_like("h", h, kv_pool)
    if not layers:
        raise ValueError("expected at least one layer, got none")
    check_ints("depth_of", layers[0].depth_of, ("B",), kv_pool)
    loops = layers[0].depth_of.shape[0]
    for layer in layers:
        _check_layer(layer, loops, h, kv_pool)
    if rope is not None:
        rope = check_rope(rope, kv_pool.shape[5])
    check_marks(fill_mark, kv_pool)
    places = block_tables, row_req, row_pos, row_loop
    if not is_reference(impl, h, "kv_propagate"):
        kv_op.kv_propagate(h, layers, kv_pool, places, rope, eps, plus_one, fill_mark)
        return
    given = [
        (
            layer.norm.reshape(-1, h.shape[1]),
            *((p.weight, p.bias, p.lora_a, p.lora_b) for p in (layer.k, layer.v)),
            layer.depth_of,
            layer.rope_of,
            check_norm("k_norm", layer.k_norm, loops, kv_pool.shape[5]),
        )
        for layer in layers
    ]
    formulas.kv_propagate(h, given, kv_pool, *places, rope, eps, plus_one, fill_mark)


def _check_layer(layer: DeeperLayer, loops: int, h: Tensor, kv_pool: Tensor) -> None:
    width, features = h.shape[1], kv_pool.shape[3] * kv_pool.shape[5]
    check_norm("norm", layer.norm, loops, width)
    check_like("norm", layer.norm, h, dtype=False)
    for name, p in (("k", layer.k), ("v", layer.v)):
        check_shape(f"the weight of {name}", p.weight, (features, width))
        check_like(f"the weight of {name}", p.weight, h)
        if p.loops not in (None, loops):
            raise ValueError(f"expected adapters of {name} for {loops} loops, got {p.loops}")
    check_ints("depth_of", layer.depth_of, (loops,), kv_pool)
    if layer.rope_of is not None:
        check_ints("rope_of", layer.rope_of, (loops,), kv_pool)
    check_norm("k_norm", layer.k_norm, loops, kv_pool.shape[5])
