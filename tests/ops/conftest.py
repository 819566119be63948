"""Every oracle test that takes ``impl`` runs over all implementations on every device there is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cce_impls import IMPLS, Impl


def pytest_configure(config: pytest.Config) -> None:
    """Also where another configuration than the project's is used, as on a card."""
    for marker in ("slow: more than ten seconds on two cores", "cpu: what only the CPU promises"):
        config.addinivalue_line("markers", marker)


@pytest.fixture(params=IMPLS, ids=str)
def impl(request: pytest.FixtureRequest) -> Impl:
    if request.param.device != "cpu" and request.node.get_closest_marker("cpu"):
        pytest.skip("what only the CPU kernels promise")
    return request.param


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Thousands of tiny calls: waking a second thread costs more than all of them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
