"""What a device does where the CPU raises: nothing there waits for the labels."""

from __future__ import annotations

import pytest
from gpu_problem import FORMS, ours, problem


@pytest.mark.card
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("label", [300, -1, 2**31 - 1, -(2**31)])
def test_a_label_out_of_range_gives_nan(label, form):
    p = problem(40, 64, 300, ignored=0)
    p.targets[5] = label
    loss = ours(p, **FORMS[form])["loss"]
    assert loss.isnan().any()
    if loss.dim():
        assert loss.isnan().nonzero().flatten().tolist() == [5]
