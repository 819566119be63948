"""Neither pass waits for the device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from gpu_problem import DTYPES, FORMS, problem

import gemma_ext

pytestmark = pytest.mark.card
every_form = pytest.mark.parametrize("form", FORMS)


@pytest.fixture(autouse=True)
def allow_waiting_again() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


def ready(dtype: torch.dtype) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Targets and leaves on the card; from here on an operation that would wait raises."""
    p = problem(130, 72, 600, dtype, bias=True)
    leaves = p.leaves()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    return p.targets, leaves


@every_form
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_both_passes(reduction, dtype, form):
    targets, leaves = ready(dtype)
    options = {"reduction": reduction, "softcap": 30.0, "shift": 1} | FORMS[form]
    loss = gemma_ext.linear_cross_entropy(targets=targets, **leaves, **options)
    (0.5 * loss.sum()).backward()


def test_logprobs():
    targets, leaves = ready(torch.bfloat16)
    logprobs, entropy = gemma_ext.linear_logprobs(targets=targets, **leaves)
    (logprobs.sum() + entropy.sum()).backward()
