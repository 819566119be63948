"""torch.compile takes the loss whole, inductor included."""

from __future__ import annotations

import pytest
import torch
from gpu_problem import FORMS, check, ours, problem

import gemma_ext

pytestmark = pytest.mark.card


@pytest.mark.parametrize(
    ("backend", "form"), [*(("aot_eager", form) for form in FORMS), ("inductor", "sampled")]
)
def test_one_graph_gives_the_same(backend, form):
    torch.compiler.reset()
    p = problem(130, 72, 600, torch.bfloat16)
    options = {"reduction": "sum", "softcap": 30.0} | FORMS[form]

    @torch.compile(backend=backend, fullgraph=True)
    def loss_of(e, c, targets):
        return gemma_ext.linear_cross_entropy(e, c, targets, **options).sum()

    leaves = p.leaves()
    loss = loss_of(targets=p.targets, **leaves)
    (2 * loss).backward()
    want = ours(p, **options)
    got = {"loss": loss.detach(), "de": leaves["e"].grad, "dc": leaves["c"].grad}
    doubled = {"loss": want["loss"].sum(), "de": 2 * want["de"], "dc": 2 * want["dc"]}
    check(got, {name: value.double() for name, value in doubled.items()})
