"""Shapes, layouts, dtypes and options drawn at random."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from cce_impls import IMPLS, Impl
from cce_oracle import (
    IGNORE,
    VALUE_FLOOR,
    Problem,
    assert_close,
    expected,
    gradient_sizes,
    problem,
    run,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

# Elementwise, relative to the sum of |terms| of a gradient entry. In 16 bits three roundings: the
# gradient of the logits, what scales it, and the result; in fp32 the exponential of a logit of size
# ten.
ROUNDING = {torch.float32: 4e-6, torch.float16: 3 * 2**-11, torch.bfloat16: 3 * 2**-8}


@dataclass(frozen=True)
class Layout:
    """Other strides and offsets for the same values; what lies between is NaN."""

    steps: tuple[int, ...]
    pads: tuple[int, ...]
    order: tuple[int, ...]

    def apply(self, t: torch.Tensor) -> torch.Tensor:
        dims = range(t.dim())
        order = [i for i in self.order if i < t.dim()]
        sizes = [t.shape[i] * self.steps[i] + self.pads[i] for i in order]
        store = torch.full(sizes, float("nan") if t.is_floating_point() else -7, dtype=t.dtype)
        view = store.permute([order.index(i) for i in dims])
        view = view[tuple(slice(self.pads[i], None, self.steps[i]) for i in dims)]
        return view[tuple(slice(0, size) for size in t.shape)].copy_(t)


@dataclass(frozen=True)
class Call:
    """A call in a few numbers, so that a failing example prints as one line."""

    shape: tuple[int, ...]
    d: int
    v: int
    dtype: torch.dtype
    spread: float
    seed: int
    bias: bool
    ignored: float
    poison: bool
    narrow_labels: bool
    class_weights: bool
    token_weights: bool
    layouts: tuple[Layout, Layout, Layout]
    options: tuple[tuple[str, Any], ...]

    def build(self) -> tuple[Problem, dict[str, Any]]:
        p = problem(
            self.shape,
            self.d,
            self.v,
            spread=self.spread,
            bias=self.bias,
            ignored=self.ignored,
            dtype=self.dtype,
            seed=self.seed,
        )
        g = torch.Generator().manual_seed(self.seed)
        options = dict(self.options)
        if self.class_weights:
            options["weight"] = torch.rand(self.v, generator=g) + 0.1
        if self.token_weights:
            options["token_weights"] = torch.rand(self.shape, generator=g) + 0.1
        p.e, p.c, p.targets = (
            layout.apply(t) for layout, t in zip(self.layouts, (p.e, p.c, p.targets), strict=True)
        )
        if self.narrow_labels:
            p.targets = p.targets.int()
        return p, options


layouts = st.builds(
    Layout,
    steps=st.tuples(*[st.integers(1, 3)] * 4),
    pads=st.tuples(*[st.integers(0, 2)] * 4),
    order=st.permutations(range(4)).map(tuple),
)
options = st.tuples(
    *(
        st.tuples(st.just(name), st.sampled_from(values))
        for name, values in {
            "reduction": ["sum", "mean", "none"],
            "softcap": [None, 2.0, 30.0],
            "logit_scale": [1.0, 0.3, -0.8],
            "temperature": [1.0, 1.7],
            "label_smoothing": [0.0, 0.0, 0.1],
            "z_loss": [0.0, 0.1],
        }.items()
    )
)
calls = st.builds(
    Call,
    shape=st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple),
    d=st.sampled_from([1, 2, 3, 8, 15, 16, 33, 130]),
    v=st.sampled_from([1, 2, 3, 17, 255, 256, 257, 511, 530]),
    dtype=st.sampled_from(list(ROUNDING)),
    spread=st.sampled_from([0.1, 3.0]),
    seed=st.integers(0, 999),
    bias=st.booleans(),
    ignored=st.sampled_from([0.0, 0.3]),
    poison=st.booleans(),
    narrow_labels=st.booleans(),
    class_weights=st.booleans(),
    token_weights=st.booleans(),
    layouts=st.tuples(layouts, layouts, layouts),
    options=options,
)


@settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
@given(calls)
def test_any_call_matches_float64(call):
    check_call(call, IMPLS)


def check_call(call: Call, impls: list[Impl]) -> None:
    p, options = call.build()
    truth, want = expected(p, **options)
    sizes = gradient_sizes(p, **options)
    if call.poison:
        p.e[p.targets == IGNORE] = float("nan")
    for impl in impls:
        loss, grads = run(impl.loss, p, **options)
        assert_close(loss, truth.loss, rtol=2e-5, floor=5 * VALUE_FLOOR, what=f"{impl} loss")
        for name, grad in grads.items():
            error = (grad.double() - want[name]).abs()
            # p_y -> 1 cancels in fp32 before anything else; fp16 ends at its subnormals.
            bound = ROUNDING[call.dtype] * sizes[name] + 1e-6
            worst = (error - bound).max().item() if error.numel() else 0.0
            assert worst <= 0, f"{impl} d{name}: {worst:.2e} beyond rounding"
