"""Divergences of random problems: shapes, dtypes, kinds, maps, strides."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_divergence import KINDS, check, problem, run

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CAPS = st.sampled_from([None, 3.0, 30.0])


@st.composite
def maps(draw):
    chosen = {
        "softcap": draw(CAPS),
        "temperature": draw(st.floats(0.5, 2.0)),
        "logit_scale": draw(st.floats(0.5, 1.5)),
    }
    if draw(st.booleans()):
        chosen |= {"teacher_softcap": draw(CAPS), "teacher_temperature": draw(st.floats(0.5, 2.0))}
    return chosen


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(
    sizes=st.tuples(
        st.integers(1, 40), st.integers(1, 70), st.integers(1, 700), st.integers(1, 70)
    ),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(KINDS),
    beta=st.floats(0.02, 0.98),
    bias=st.booleans(),
    ignored=st.sampled_from([0.0, 0.3]),
    spread=st.floats(0.1, 4.0),
    transposed=st.booleans(),
    options=maps(),
    seed=st.integers(0, 1000),
)
def test_any_problem(sizes, dtype, kind, beta, bias, ignored, spread, transposed, options, seed):
    given_heads = {"bias": bias, "ignored": ignored, "dtype": dtype, "spread": spread}
    x = problem(*sizes, **given_heads, seed=seed, **options)
    if transposed:
        x.c, x.teacher_e = x.c.mT.contiguous().mT, x.teacher_e.mT.contiguous().mT
    check(x, kind, beta, run(x, kind, beta), dtype)
