"""Strides, shapes, threads: the same bits however tensors lie and work is dealt."""

from __future__ import annotations

import pytest
import torch
from sae_encoders import DEVICES, DTYPES, IDS, problem

from gemma_ext.ops.sae import (
    Encoding,
    encode_batch_topk,
    encode_group_max,
    encode_threshold,
    encode_topk,
)
from gemma_ext.testing import poisoned_empty


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


def everything(x, weight, bias, scale, mask):
    """Every encoder on these tensors, as a flat list of tensors."""
    n, features = x.shape[:-1].numel(), weight.shape[0]
    groups = next(g for g in (7, 5, 3, 2, 1) if features % g == 0)
    found = [
        encode_topk(x, weight, bias, k=11, scale=scale, aux=(mask, 5)),
        encode_topk(x, weight, k=features // 2, by="magnitude"),
        Encoding(encode_group_max(x, weight, bias, groups=groups)),
        encode_batch_topk(x, weight, bias, total=9 * n, scale=scale, aux=(mask, 5)),
        encode_threshold(x, weight, bias, threshold=1.0, scale=scale, margin=0.25),
        encode_threshold(x, weight, bias, threshold=-9.0, capacity=features),
    ]
    codes = [c for e in found for c in (e.codes, e.aux) if c is not None]
    return [t for c in codes for t in (c.values, c.indices, c.offsets, c.count) if t is not None]


def assert_same(got, want):
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
def test_strides(dtype, device):
    q = problem(37, 70, 600, dtype=dtype, exact=False, device=device)
    want = everything(q.x, q.weight, q.bias, q.scale, q.mask)
    wide = torch.full((37, 3, 140), torch.nan, dtype=dtype, device=device)
    wide[:, 1, ::2] = q.x
    transposed = q.weight.T.contiguous().T
    spread = torch.full((1200, 141), torch.nan, dtype=dtype, device=device)
    spread[::2, 1::2] = q.weight
    columns = torch.full((70, 603), torch.nan, dtype=dtype, device=device)
    columns[:, 3:] = q.weight.T
    for weight in (transposed, spread[::2, 1::2], columns[:, 3:].T):
        assert not weight.is_contiguous()
        assert torch.equal(weight, q.weight)
        assert_same(everything(wide[:, 1, ::2], weight, q.bias, q.scale, q.mask), want)
    vectors = torch.stack([q.bias, q.scale], -1)
    mask = torch.stack([q.mask, ~q.mask], -1)[:, 0]
    assert_same(everything(q.x, q.weight, vectors[:, 0], vectors[:, 1], mask), want)


@pytest.mark.parametrize("lead", [(), (37,), (2, 3, 4)], ids=str)
def test_leading_shapes(lead, device):
    q = problem(24, 33, 300, device=device)
    x = q.x[:1].reshape(33) if lead == () else q.x[: lead[0]] if len(lead) == 1 else q.x
    shape = lead if len(lead) != 1 else x.shape[:1]
    x = x.reshape(*shape, 33)
    flat = everything(x.reshape(-1, 33), q.weight, q.bias, q.scale, q.mask)
    assert_same(everything(x, q.weight, q.bias, q.scale, q.mask), flat)
    codes = encode_topk(x, q.weight, q.bias, k=4).codes
    assert codes.shape == torch.Size(shape)
    assert codes.dense().shape == (*shape, 300)


@pytest.mark.cpu
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("n", [1, 3, 300])
def test_threads_and_runs_change_nothing(n, dtype):
    # few tokens: features are dealt to several tasks; many: tokens are
    q = problem(n, 48, 3000, dtype=dtype, exact=False)
    want = everything(q.x, q.weight, q.bias, q.scale, q.mask)
    before = torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        with poisoned_empty():
            assert_same(everything(q.x, q.weight, q.bias, q.scale, q.mask), want)
    torch.set_num_threads(before)


def test_a_row_does_not_depend_on_its_neighbours(device):
    q = problem(150, 300, 700, exact=False, device=device)
    whole = encode_topk(q.x, q.weight, q.bias, k=9).codes
    part = encode_topk(q.x[140:], q.weight, q.bias, k=9).codes
    assert torch.equal(whole.indices[140:], part.indices)
    assert torch.equal(whole.values[140:], part.values)
