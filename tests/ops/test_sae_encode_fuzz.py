"""Encoders of any shape, dtype, layout and option against the formulas; products are exact."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sae_encoders import DEVICES, DTYPES, Problem, problem

from gemma_ext.ops.sae import (
    Encoding,
    encode_batch_topk,
    encode_group_max,
    encode_threshold,
    encode_topk,
)

SETTINGS = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)


@st.composite
def problems(draw) -> Problem:
    shape = [draw(st.integers(1, most)) for most in (150, 300, 700)]
    q = problem(*shape, dtype=draw(st.sampled_from(DTYPES)), seed=draw(st.integers(0, 999)))
    if draw(st.booleans()):
        q.weight = q.weight.T.contiguous().T
    if draw(st.booleans()):
        q.x = torch.stack([q.x, q.x], -1)[..., 0]
    for value in draw(st.lists(st.sampled_from([torch.nan, torch.inf, -torch.inf]), max_size=2)):
        q.x.view(-1)[draw(st.integers(0, q.x.numel() - 1))] = value
    if draw(st.booleans()):
        q.bias[draw(st.integers(0, shape[2] - 1))] = draw(st.sampled_from([torch.nan, torch.inf]))
    return q


def encode(q: Problem, kind: str, share: float, scaled: bool, second: bool, impl: str) -> Encoding:
    n, features = len(q.x), len(q.weight)
    k = max(1, round(share * features))
    options = {"impl": impl}
    if kind == "groups":
        groups = next(g for g in range(k, 0, -1) if features % g == 0)
        return Encoding(encode_group_max(q.x, q.weight, q.bias, groups=groups, **options))
    options["scale"] = q.scale if scaled else None
    options["aux"] = (q.mask, max(1, features // 3)) if second else None
    if kind == "batch":
        return encode_batch_topk(
            q.x, q.weight, q.bias, total=round(share * n * features), **options
        )
    if kind == "above":
        return encode_threshold(q.x, q.weight, q.bias, threshold=40 * share, **options)
    return encode_topk(q.x, q.weight, q.bias, k=k, by=kind, **options)


@pytest.mark.parametrize("device", DEVICES)
@SETTINGS
@given(
    q=problems(),
    kind=st.sampled_from(["value", "magnitude", "groups", "batch", "above"]),
    share=st.floats(0, 1),
    scaled=st.booleans(),
    second=st.booleans(),
    threads=st.integers(1, 4),
)
def test_any_encoder(device, q, kind, share, scaled, second, threads):
    want = encode(q, kind, share, scaled, second, "reference")
    torch.set_num_threads(threads)
    got = encode(q.to(device), kind, share, scaled, second, "auto")
    torch.set_num_threads(1)
    for a, b in ((got.codes, want.codes), (got.aux, want.aux)):
        if b is None:
            assert a is None
            continue
        assert torch.equal(a.count.cpu(), b.count)
        assert torch.equal(a.indices.cpu(), b.indices)
        torch.testing.assert_close(a.values.cpu(), b.values, rtol=0, atol=0, equal_nan=True)
    if want.min_positive is not None:
        assert got.min_positive.cpu() == want.min_positive
