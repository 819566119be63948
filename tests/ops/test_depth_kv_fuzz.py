"""Any rows over any pages: attention against the formulas in float64, and bits of rows alone."""

from __future__ import annotations

import torch
from depth_pages import EPS, mixed, problem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemma_ext.ops.depth_batching import paged_attn_mixed_depth
from gemma_ext.testing import assert_close

QUIET = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}
calls = st.fixed_dictionaries(
    {
        "lengths": st.lists(st.integers(1, 700), min_size=1, max_size=4),
        "loops": st.integers(1, 4),
        "count": st.integers(1, 60),
        "group": st.integers(1, 9),
        "kv_heads": st.integers(1, 3),
        "width": st.integers(1, 80),
        "dtype": st.sampled_from(list(EPS)),
        "seed": st.integers(0, 99),
    }
)


@settings(max_examples=40, **QUIET)
@given(calls, st.none() | st.floats(0.5, 60), st.booleans(), st.integers(1, 3), st.data())
def test_any_rows(call, softcap, windowed, threads, data):
    lengths, loops, seed = call["lengths"], call["loops"], call["seed"]
    heads = (call["group"] * call["kv_heads"], call["kv_heads"])
    shape = {"heads": heads, "width": call["width"], "loops": loops, "dtype": call["dtype"]}
    p = problem(lengths, mixed(lengths, loops, call["count"], seed), seed=seed, **shape)
    options = {"softcap": softcap}
    if windowed:
        reaches = data.draw(st.lists(st.integers(0, 800), min_size=loops, max_size=loops))
        options["window"] = torch.tensor(reaches, dtype=torch.int32)
        options["sinks"] = data.draw(st.sampled_from([0, 1, 17, 300]))
    torch.set_num_threads(threads)
    got = paged_attn_mixed_depth(p.q, p.pool, *p.places(), **options)
    wide = p.wide()
    want = paged_attn_mixed_depth(wide.q, wide.pool, *wide.places(), **options)
    # a weighted mean of values, which may cancel: its error counts in units of the largest
    largest = float(wide.pool.nan_to_num(0).abs().max())
    assert_close(got, want, max_abs=max(3 * EPS[call["dtype"]], 2e-6) * largest)
    n = data.draw(st.integers(0, len(p.req) - 1))
    one = p.rows([n])
    assert torch.equal(paged_attn_mixed_depth(one.q, one.pool, *one.places(), **options)[0], got[n])
