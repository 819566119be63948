"""pytest plugin: the ops of this process run the device code, as fibers on the CPU.

Tensors stay on the CPU, but Python treats their values like those of a CUDA tensor, which it must
not look at. GEMMA_EXT_TEST_OPS names the library; with GEMMA_EXT_TEST_HOPPER=0 its kernels are
those before Hopper. GEMMA_EXT_SCHEDULE_SEED is the seed each test starts with.
"""

import ctypes
import os
import warnings

import pytest
import torch

import gemma_ext  # noqa: F401  its CPU kernels are replaced
from gemma_ext.ops import _devices

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch tells of every kernel that is replaced
    torch.ops.load_library(os.environ["GEMMA_EXT_TEST_OPS"])
_library = ctypes.CDLL(os.environ["GEMMA_EXT_TEST_OPS"])


def schedule(seed: int) -> None:
    """In which order threads run from now on."""
    hopper = os.environ.get("GEMMA_EXT_TEST_HOPPER", "1") == "1"
    _library.schedule(ctypes.c_uint64(seed), ctypes.c_bool(hopper))


_devices.is_readable = lambda t: False


def pytest_runtest_setup() -> None:
    schedule(int(os.environ["GEMMA_EXT_SCHEDULE_SEED"]))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what runs no kernel, and what only the CPU kernels promise."""
    dropped = [item for item in items if _is_reference(item) or item.get_closest_marker("cpu")]
    config.hook.pytest_deselected(items=dropped)
    items[:] = [item for item in items if item not in dropped]


def _is_reference(item: pytest.Item) -> bool:
    call = getattr(item, "callspec", None)
    return call is not None and str(call.params.get("impl")) == "reference"
