"""Shared by all tests: a fixed thread count, no network, and the checkout as what is tested."""

import os
from pathlib import Path

import pytest
import torch

import gemma_ext

pytest_plugins = ["conftest_pocket", "conftest_selection"]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = Path(__file__).resolve().parents[1]


def pytest_configure(config: pytest.Config) -> None:
    package = Path(gemma_ext.__file__).resolve().parent
    if package != ROOT / "gemma_ext":
        raise pytest.UsageError(f"expected gemma_ext from {ROOT}, got {package}")
    side_by_side = "PYTEST_XDIST_WORKER" in os.environ
    torch.set_num_threads(1 if side_by_side else min(2, torch.get_num_threads()))
