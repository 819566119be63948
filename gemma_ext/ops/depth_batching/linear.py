"""Linear layers of rows at different loops: one shared weight, low-rank parts by loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from gemma_ext.ops.depth_batching import linear_op
from gemma_ext.ops.depth_batching.inputs import check_like, check_shape, is_reference
from gemma_ext.ops.depth_batching.linear_inputs import check_index, check_storage
from gemma_ext.reference import depth_batching_linear as formulas

ACTIVATIONS = formulas.ACTIVATIONS
MOST_PROJECTIONS = 4


@dataclass(frozen=True)
class Projection:
    """y = x W^T + bias + scale (x A_j^T) B_j^T for rows of loop j.

    Attributes:
        weight: [F, D], shared by all loops.
        bias: [F] or None.
        lora_a: A [B, r, D] of every loop; None, or r = 0, where the layer has none.
        lora_b: B [B, F, r].

    Raises:
        ValueError, TypeError: what does not fit.
    """

    weight: Tensor
    bias: Tensor | None = None
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None

    def __post_init__(self) -> None:
        check_shape("weight", self.weight, ("F", "D"))
        features, width = self.weight.shape
        if self.bias is not None:
            check_shape("bias", self.bias, (features,))
            check_like("bias", self.bias, self.weight)
        if (self.lora_a is None) != (self.lora_b is None):
            raise ValueError("expected lora_a and lora_b together, got one of them")
        if self.lora_a is not None:
            check_shape("lora_a", self.lora_a, ("B", "r", width))
            check_like("lora_a", self.lora_a, self.weight)
            loops, rank, _ = self.lora_a.shape
            check_shape("lora_b", self.lora_b, (loops, features, rank))
            check_like("lora_b", self.lora_b, self.weight)

    @property
    def loops(self) -> int | None:
        """B, or None without adapters."""
        return None if self.lora_a is None or self.lora_a.shape[1] == 0 else self.lora_a.shape[0]


def seg_depth_lora(
    x: Tensor,
    projections: Sequence[Projection],
    seg_offsets: Tensor | None = None,
    *,
    scale: float = 1.0,
    impl: str = "auto",
) -> tuple[Tensor, ...]:
    """y = x W^T + bias + scale (x A_j^T) B_j^T of every projection, j the loop of each row.

    The projections of one input (q, k and v) share a call. Sums are float32; what comes between A
    and B is rounded to the dtype of x, and y once. A row has the bits that it has alone, whatever
    rows stand beside it. Bounds of segments are read on the device. No autograd.

    Args:
        x: [n, D] float32, bfloat16 or float16; rows sorted by loop.
        projections: their weights in the dtype of x; ranks may differ, and be 0.
        seg_offsets: int32 [B + 1]: rows seg_offsets[j] .. seg_offsets[j + 1] are at loop j. Rows
            behind the last have no adapter. Needed with adapters.
        scale: of the adapters.
        impl: "auto", or "reference" for plain torch, which also takes float64.

    Returns:
        One [n, F] in the dtype of x for each projection: columns of one tensor [n, sum of F].

    Raises:
        ValueError, TypeError: what does not fit; on the CPU also offsets that do not ascend from 0
            to at most n.
        NotImplementedError: a derivative is asked for.
    """
    reference = _check(x, projections, seg_offsets, impl)
    if reference:
        given = [(p.weight, p.bias, p.lora_a, p.lora_b) for p in projections]
        return tuple(formulas.seg_depth_lora(x, given, seg_offsets, scale, None))
    y = linear_op.depth_linear(x, projections, seg_offsets, scale, None)
    if len(projections) == 1:
        return (y,)
    return y.split([p.weight.shape[0] for p in projections], dim=1)


def seg_depth_gated(
    x: Tensor,
    gate: Projection,
    up: Projection,
    seg_offsets: Tensor | None = None,
    *,
    activation: str = "gelu_tanh",
    scale: float = 1.0,
    impl: str = "auto",
) -> Tensor:
    """act(gate(x)) * up(x) of two projections as `seg_depth_lora` has them, rounded once.

    Args:
        x: [n, D].
        gate, up: of one F.
        seg_offsets, scale, impl: as in `seg_depth_lora`.
        activation: "gelu_tanh" (GeGLU with the tanh form, Gemma) or "silu" (SwiGLU, Llama).

    Returns:
        [n, F] in the dtype of x.

    Raises:
        ValueError, TypeError, NotImplementedError: as `seg_depth_lora`.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"expected activation to be 'gelu_tanh' or 'silu', got {activation!r}")
    reference = _check(x, (gate, up), seg_offsets, impl)
    check_shape("the weight of up", up.weight, (gate.weight.shape[0], "D"))
    if reference:
        given = [(p.weight, p.bias, p.lora_a, p.lora_b) for p in (gate, up)]
        return formulas.seg_depth_lora(x, given, seg_offsets, scale, activation)[0]
    return linear_op.depth_linear(x, (gate, up), seg_offsets, scale, activation)


def _check(
    x: Tensor, projections: Sequence[Projection], seg_offsets: Tensor | None, impl: str
) -> bool:
    """Whether plain torch is asked for."""
    reference = is_reference(impl, x, "depth_linear")
    check_shape("x", x, ("n", "D"))
    check_storage("x", x, reference=reference)
    if not projections:
        raise ValueError("expected at least one projection, got none")
    if len(projections) > MOST_PROJECTIONS:
        raise ValueError(f"expected 1 to {MOST_PROJECTIONS} projections, got {len(projections)}")
    for p in projections:
        if not isinstance(p, Projection):
            raise TypeError(f"expected projections of type Projection, got {type(p).__name__}")
        check_shape("a projection's weight", p.weight, ("F", x.shape[1]))
        check_like("a projection's weight", p.weight, x)
    loops = {p.loops for p in projections} - {None}
    if len(loops) > 1:
        raise ValueError(f"expected projections of one number of loops, got {sorted(loops)}")
    if loops and seg_offsets is None:
        raise ValueError("expected seg_offsets with adapters, got None")
    if seg_offsets is not None and loops:
        check_index("seg_offsets", seg_offsets, loops.pop() + 1, x)
    return reference
