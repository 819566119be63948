"""The same bits in every run, whatever the memory held before."""

from __future__ import annotations

import pytest
import torch
from gpu_problem import DEVICE, DTYPES, FORMS, assert_same_bits, ours, problem

from gemma_ext.testing import poisoned_empty

RUNS = 20 if DEVICE == "cuda" else 2

every_form = pytest.mark.parametrize("form", FORMS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def fill_free_memory(byte: int) -> None:
    """Leave blocks full of ``byte`` to the allocator, of the sizes it hands out next."""
    small = [torch.full((1 << 19,), byte, dtype=torch.uint8, device=DEVICE) for _ in range(64)]
    large = [torch.full((1 << 25,), byte, dtype=torch.uint8, device=DEVICE) for _ in range(8)]
    del small, large


@every_form
@every_dtype
def test_runs_agree_bit_by_bit(dtype, form):
    p = problem(257, 136, 1500, dtype, bias=True)
    options = FORMS[form] | {"softcap": 30.0}
    first = ours(p, **options)
    for _ in range(RUNS - 1):
        assert_same_bits(ours(p, **options), first)


@every_form
@every_dtype
def test_what_memory_held_does_not_matter(dtype, form):
    """Outputs and workspaces start as zeros, as 0xFF, as NaN."""
    p = problem(129, 72, 700, dtype, bias=True)
    options = FORMS[form] | {"softcap": 30.0, "z_loss": 0.01}
    fill_free_memory(0x00)
    first = ours(p, **options)
    fill_free_memory(0xFF)
    assert_same_bits(ours(p, **options), first)
    with poisoned_empty():
        assert_same_bits(ours(p, **options), first)
