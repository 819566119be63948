"""Loss and gradients against float64, over the sizes at which kernels change their path."""

from __future__ import annotations

import pytest
from gpu_problem import DTYPES, FORMS, check, ours, problem, truth

# Tiles hold 128 rows, 256 columns and 64 or 128 of D; each size is tried beside its neighbours.
SHAPES = [
    *((n, 72, 257) for n in (0, 1, 7, 8, 9, 127, 128, 129, 300)),
    *((33, 64, v) for v in (1, 2, 255, 256, 257, 511, 512, 513, 3001)),
    *((9, d, 300) for d in (1, 7, 8, 33, 63, 64, 65, 127, 128, 129, 256, 2304)),
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "N{}-D{}-V{}".format(*s))
def test_loss_and_gradients(shape, dtype, form):
    p = problem(*shape, dtype)
    options = FORMS[form] | {"softcap": 30.0}
    check(ours(p, **options), truth(p, **options))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_softcap(dtype, form):
    p = problem(130, 128, 1000, dtype, bias=True)
    check(ours(p, **FORMS[form]), truth(p, **FORMS[form]))
