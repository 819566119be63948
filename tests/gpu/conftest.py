"""Tests that need a CUDA device; skipped as a whole where there is none.

GEMMA_EXT_GPU_TESTS_ON=cpu runs those that a CPU can run, to check the tests themselves;
GEMMA_EXT_NEED_CARD=1 makes a missing device a failure.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from gpu_problem import DEVICE

HERE = Path(__file__).parent


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "card: streams, graphs or sizes that only a card has")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = DEVICE == "cuda" and not torch.cuda.is_available()
    if missing and os.environ.get("GEMMA_EXT_NEED_CARD"):
        raise pytest.UsageError("torch sees no CUDA device")
    for item in items:
        if HERE not in item.path.parents:
            continue
        if missing:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        elif DEVICE == "cpu" and item.get_closest_marker("card"):
            item.add_marker(pytest.mark.skip(reason="needs a card"))


@pytest.fixture(autouse=True)
def working_card(request: pytest.FixtureRequest) -> Iterator[None]:
    """An error that leaves the card unusable ends the run at the test that made it."""
    yield
    if DEVICE == "cuda":
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            pytest.exit(f"{request.node.name} broke the card: {reason}", returncode=3)
