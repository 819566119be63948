"""Every oracle test that takes ``impl`` runs over all implementations."""

from __future__ import annotations

import pytest
from cce_impls import IMPLS, Impl


@pytest.fixture(params=IMPLS, ids=str)
def impl(request: pytest.FixtureRequest) -> Impl:
    return request.param
