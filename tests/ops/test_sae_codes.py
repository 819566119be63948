"""Codes in their three forms: rows, counts, masks and dense matrices agree."""

from __future__ import annotations

import torch

from gemma_ext.ops.sae import Codes

DENSE = torch.tensor([[1.0, 0.0, 2.0, 0.0], [0.0] * 4, [0.0, 0.0, 0.0, 5.0]])
PADDED = Codes(
    torch.tensor([[1.0, 2.0], [9.0, 9.0], [5.0, 9.0]]),
    torch.tensor([[0, 2], [1, 1], [3, 1]], dtype=torch.int32),
    None,
    torch.Size([3]),
    4,
    torch.tensor([2, 0, 1]),
)
CSR = Codes(
    torch.tensor([1.0, 2.0, 5.0, 9.0, 9.0]),
    torch.tensor([0, 2, 3, 1, 1], dtype=torch.int32),
    torch.tensor([0, 2, 2, 3]),
    torch.Size([3]),
    4,
)


def test_forms_agree():
    for codes in (PADDED, CSR):
        assert torch.equal(codes.dense(), DENSE)
        assert codes.count.tolist() == [2, 0, 1]
        assert codes.tokens == 3
    assert PADDED.rows().tolist() == [[0, 0], [1, 1], [2, 2]]
    assert PADDED.mask.tolist() == [[True, True], [False, False], [True, False]]
    assert CSR.rows().tolist() == [0, 0, 2, 2, 2]
    assert CSR.mask.tolist() == [True, True, True, False, False]


def test_rows_without_counts_are_full():
    codes = Codes(torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.int32), None, torch.Size([2]), 5)
    assert codes.count.tolist() == [3, 3]
    assert codes.mask.all()


def test_repeated_features_add():
    indices = torch.tensor([[1, 1, 0]], dtype=torch.int32)
    codes = Codes(torch.tensor([[1.0, 2.0, 4.0]]), indices, None, torch.Size([1]), 3)
    assert codes.dense().tolist() == [[4.0, 3.0, 0.0]]


def test_other_values_and_their_gradients():
    values = torch.arange(5.0).requires_grad_()
    codes = CSR.with_values(values)
    assert codes.indices is CSR.indices
    codes.dense().square().sum().backward()
    assert values.grad.tolist() == [0.0, 2.0, 4.0, 0.0, 0.0]


def test_leading_shapes_and_none():
    for shape in ((2, 0), (0,)):
        indices = torch.empty(0, 3, dtype=torch.int32)
        codes = Codes(torch.empty(0, 3), indices, None, torch.Size(shape), 7)
        assert codes.dense().shape == (*shape, 7)
        empty = Codes(
            torch.empty(0), indices.flatten(), torch.zeros(1).long(), torch.Size(shape), 7
        )
        assert empty.rows().numel() == 0
        assert empty.dense().shape == (*shape, 7)
    single = Codes(torch.ones(1, 2), torch.ones(1, 2, dtype=torch.int32), None, torch.Size(()), 3)
    assert single.dense().tolist() == [0.0, 2.0, 0.0]
