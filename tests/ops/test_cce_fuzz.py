"""Shapes, layouts, dtypes and options drawn at random."""

from __future__ import annotations

import torch
from cce_impls import IMPLS
from cce_oracle import IGNORE, Problem, check, expected, problem, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@st.composite
def layouts(draw, t: torch.Tensor) -> torch.Tensor:
    """The same values behind other strides and offsets; what lies between is NaN."""
    steps = [draw(st.integers(1, 3)) for _ in t.shape]
    pads = [draw(st.integers(0, 2)) for _ in t.shape]
    order = draw(st.permutations(range(t.dim())))
    sizes = [t.shape[i] * steps[i] + pads[i] for i in order]
    fill = float("nan") if t.is_floating_point() else -7
    store = torch.full(sizes, fill, dtype=t.dtype)
    view = store.permute([order.index(i) for i in range(t.dim())])
    view = view[tuple(slice(pad, None, step) for pad, step in zip(pads, steps, strict=True))]
    view = view[tuple(slice(0, size) for size in t.shape)]
    view.copy_(t)
    return view


@st.composite
def calls(draw) -> tuple[Problem, dict]:
    shape = tuple(draw(st.lists(st.integers(0, 9), min_size=1, max_size=3)))
    d = draw(st.sampled_from([1, 2, 3, 8, 15, 16, 33, 130]))
    v = draw(st.sampled_from([1, 2, 3, 17, 255, 256, 257, 511, 530]))
    dtype = draw(st.sampled_from(DTYPES))
    p = problem(
        shape,
        d,
        v,
        spread=draw(st.sampled_from([0.1, 3.0])),
        bias=draw(st.booleans()),
        ignored=draw(st.sampled_from([0.0, 0.3])),
        dtype=dtype,
        seed=draw(st.integers(0, 999)),
    )
    options = {
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
        "softcap": draw(st.sampled_from([None, 2.0, 30.0])),
        "logit_scale": draw(st.sampled_from([1.0, 0.3])),
        "temperature": draw(st.sampled_from([1.0, 1.7])),
        "label_smoothing": draw(st.sampled_from([0.0, 0.0, 0.1])),
        "z_loss": draw(st.sampled_from([0.0, 0.1])),
        "shift": draw(st.integers(0, max(shape[-1] - 1, 0))),
    }
    if draw(st.booleans()):
        options["token_weights"] = torch.rand(shape) + 0.1
    if draw(st.booleans()):
        options["weight"] = torch.rand(v) + 0.1
    if p.targets.numel() and draw(st.booleans()):
        p.e[p.targets == IGNORE] = float("nan")
    p.e, p.c, p.targets = (draw(layouts(t)) for t in (p.e, p.c, p.targets))
    if draw(st.booleans()):
        p.targets = p.targets.int()
    return p, options


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
@given(calls())
def test_any_call_matches_float64(call):
    p, options = call
    want = expected(p, **options)
    for impl in IMPLS:
        check(run(impl.loss, p, **options), want, scale=4)
