"""torch.compile takes the loss whole, and the operators pass torch's own checks."""

from __future__ import annotations

import pytest
import torch
from gpu_problem import DEVICE, FORMS, check, ours, problem

import gemma_ext

HEAD = (30.0, 1.0, 1.0, -100)
SHAPE = (130, 72, 600)


# inductor takes seconds to compile one form, and sees the operators as aot_eager does
@pytest.mark.parametrize(
    ("backend", "form"),
    [
        *(("aot_eager", form) for form in FORMS),
        pytest.param("inductor", "filtered", marks=pytest.mark.card),
    ],
)
def test_one_graph_gives_the_same(backend, form):
    torch.compiler.reset()
    p = problem(*SHAPE, torch.bfloat16)
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


def operators() -> dict[str, tuple]:
    """Arguments of every operator, as its Python caller passes them."""
    p = problem(33, 40, 300, torch.bfloat16, bias=True)
    ones = torch.ones(33, device=DEVICE)
    problem_ = (p.e, p.c, p.targets, p.bias)
    forward = (*problem_, None, None, None, *HEAD, False, 0.01, True, True, True)
    nll, lse, mean, _, _, stats, summary = torch.ops.gemma_ext.cce_forward(*forward)
    saved = (nll, lse, mean, stats, summary)
    upstream = (ones, ones, ones, None)
    return {
        "cce_forward": forward,
        "cce_backward": (*problem_, None, None, None, *saved, *upstream, *HEAD, False, *[True] * 3),
        "cce_fused": (*problem_, ones, ones, *HEAD, True, True, True),
        "cce_column_stats": (*problem_, lse, *HEAD, 1e-3, 16),
    }


@pytest.mark.parametrize("name", ["cce_forward", "cce_backward", "cce_fused", "cce_column_stats"])
def test_opcheck(name):
    torch.library.opcheck(getattr(torch.ops.gemma_ext, name).default, operators()[name])
