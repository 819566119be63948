"""What encoders and codes refuse, each in one sentence."""

from __future__ import annotations

import re

import pytest
import torch

from gemma_ext.ops.sae import (
    Codes,
    encode_batch_topk,
    encode_group_max,
    encode_threshold,
    encode_topk,
)

X, W = torch.ones(2, 3), torch.ones(5, 3)
MASK = torch.ones(5, dtype=torch.bool)


def topk(x=X, weight=W, bias=None, k=2, **options):
    return encode_topk(x, weight, bias, k=k, **options)


CASES = [
    (TypeError, "expected x to be a Tensor, got list", lambda: topk([1.0])),
    (TypeError, "expected weight to be a Tensor, got NoneType", lambda: topk(weight=None)),
    (
        TypeError,
        "expected x to be float32, bfloat16 or float16 (float64 with impl='reference'), "
        "got torch.float64",
        lambda: topk(X.double(), W.double()),
    ),
    (
        TypeError,
        "expected weight to be torch.float32 like x, got torch.bfloat16",
        lambda: topk(weight=W.bfloat16()),
    ),
    (
        ValueError,
        "expected weight on cpu like x, got it on meta",
        lambda: topk(weight=W.to("meta")),
    ),
    (ValueError, "expected x to be [..., D], got a 0-d tensor", lambda: topk(torch.tensor(1.0))),
    (ValueError, "expected weight to be [F, 3], got [5, 4]", lambda: topk(weight=torch.ones(5, 4))),
    (ValueError, "expected weight to be [F, 3], got [3]", lambda: topk(weight=torch.ones(3))),
    (
        ValueError,
        "expected weight to have 1 to 2^31 - 1 rows, got 0",
        lambda: topk(weight=torch.ones(0, 3)),
    ),
    (ValueError, "expected bias to be [5], got [4]", lambda: topk(bias=torch.ones(4))),
    (TypeError, "expected bias to be a Tensor, got float", lambda: topk(bias=1.0)),
    (
        TypeError,
        "expected bias to be floating, got torch.int64",
        lambda: topk(bias=torch.ones(5).long()),
    ),
    (
        ValueError,
        "expected scale on cpu like x, got it on meta",
        lambda: topk(scale=torch.ones(5, device="meta")),
    ),
    (ValueError, "expected k in [1, 5], got 0", lambda: topk(k=0)),
    (ValueError, "expected k in [1, 5], got 6", lambda: topk(k=6)),
    (TypeError, "expected k to be an int, got float", lambda: topk(k=2.0)),
    (TypeError, "expected k to be an int, got bool", lambda: topk(k=True)),
    (ValueError, "expected by to be 'value' or 'magnitude', got 'x'", lambda: topk(by="x")),
    (
        ValueError,
        "expected impl to be 'auto' or 'reference', got 'cuda'",
        lambda: topk(impl="cuda"),
    ),
    (
        ValueError,
        "expected sparse_grad to be False with impl='reference', got True",
        lambda: topk(sparse_grad=True, impl="reference"),
    ),
    (
        TypeError,
        "expected the mask of aux to be a bool Tensor, got torch.float32",
        lambda: topk(aux=(torch.ones(5), 2)),
    ),
    (
        TypeError,
        "expected the mask of aux to be a bool Tensor, got list",
        lambda: topk(aux=([True], 2)),
    ),
    (
        ValueError,
        "expected the mask of aux to be [5] on cpu, got [4] on cpu",
        lambda: topk(aux=(MASK[:4], 2)),
    ),
    (
        ValueError,
        "expected the length of aux in [1, 5], got 6",
        lambda: topk(aux=(MASK, 6)),
    ),
    (
        ValueError,
        "expected groups to divide 5 features, got 2",
        lambda: encode_group_max(X, W, groups=2),
    ),
    (ValueError, "expected groups in [1, 5], got 7", lambda: encode_group_max(X, W, groups=7)),
    (
        ValueError,
        "expected total in [0, 10], got 11",
        lambda: encode_batch_topk(X, W, total=11),
    ),
    (
        ValueError,
        "expected capacity in [1, 5], got 0",
        lambda: encode_threshold(X, W, threshold=0.0, capacity=0),
    ),
    (
        ValueError,
        "expected at most 2 entries a token by capacity, got 5 in token 0",
        lambda: encode_threshold(X, W, threshold=0.0, capacity=2),
    ),
    (
        ValueError,
        "expected threshold to be [5], got [4]",
        lambda: encode_threshold(X, W, threshold=torch.ones(4)),
    ),
    (
        ValueError,
        "expected threshold to be a number, got nan",
        lambda: encode_threshold(X, W, threshold=float("nan")),
    ),
    (
        TypeError,
        "expected margin to be a number or a Tensor, got str",
        lambda: encode_threshold(X, W, threshold=0.0, margin="wide"),
    ),
]


@pytest.mark.parametrize(("error", "sentence", "call"), CASES, ids=[c[1] for c in CASES])
def test_sentence(error, sentence, call):
    with pytest.raises(error, match=f"^{re.escape(sentence)}$"):
        call()


VALUES, INDICES = torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.int32)
PARTS = [
    (TypeError, "expected indices to be int32, got torch.int64", (VALUES, INDICES.long(), None)),
    (
        ValueError,
        "expected values to be [2, 3] like indices, got [2, 2]",
        (VALUES[:, :2], INDICES, None),
    ),
    (
        ValueError,
        "expected values to be [2, K] without offsets, got [3, 2]",
        (VALUES.T, INDICES.T, None),
    ),
    (
        ValueError,
        "expected values to be [nnz] with offsets, got [2, 3]",
        (VALUES, INDICES, torch.tensor([0, 1, 2])),
    ),
    (
        ValueError,
        "expected offsets to be int64 [3], got torch.int64 [2]",
        (VALUES[0], INDICES[0], torch.tensor([0, 3])),
    ),
    (
        ValueError,
        "expected offsets to be int64 [3], got torch.int32 [3]",
        (VALUES[0], INDICES[0], torch.tensor([0, 3, 3], dtype=torch.int32)),
    ),
]


@pytest.mark.parametrize(("error", "sentence", "parts"), PARTS, ids=[c[1] for c in PARTS])
def test_codes_that_do_not_fit(error, sentence, parts):
    with pytest.raises(error, match=f"^{re.escape(sentence)}$"):
        Codes(*parts, torch.Size([2]), 9)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_an_overflow_is_seen_where_counts_are_not_read(impl):
    # as on a device: no count is looked at
    x = torch.tensor([[1.0], [-1.0]])
    with pytest.raises(ValueError, match="at most 2 entries"):
        encode_threshold(x, torch.ones(5, 1), threshold=0.0, capacity=2, impl=impl)
    if impl == "auto":
        op = torch.ops.gemma_ext.sae_threshold
        limit = torch.zeros(5)
        values, indices, _, counts, *_ = op(
            x, torch.ones(5, 1), None, None, limit, None, False, 2, 0
        )
        assert values[0].isnan().all()
        assert values[1].tolist() == [0.0, 0.0]
        assert not indices.any()
        assert counts.tolist() == [5, 0]
