from __future__ import annotations

import pytest
import torch
from accelerate.state import AcceleratorState


@pytest.fixture
def impl() -> str:
    """The implementation under test: every logit's gradient, so that float32 results are equal."""
    return "exact"


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(torch.seed() % 2**31)


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Accelerate keeps the precision of the first accelerator of a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
