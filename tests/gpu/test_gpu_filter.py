"""The gradient filter against a float64 twin that applies the same rule."""

from __future__ import annotations

import pytest
import torch
from gpu_problem import DEVICE, DTYPES, GRADIENT_LIMIT, error, ours, problem

import gemma_ext
from gemma_ext.reference.cce_filter import filtered_gradients

N, D, V = 200, 96, 3000


@pytest.mark.parametrize("ordered", [False, True], ids=["identity", "state"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keeps_and_returns_what_its_twin_does(dtype, ordered):
    p = problem(N, D, V, dtype, spread=4.0)
    eps, state = 0.01, None
    if ordered:
        state = gemma_ext.VocabState(V).to(DEVICE)
        state.order.copy_(torch.randperm(V, generator=torch.Generator().manual_seed(1)))
        state.prob.copy_(torch.rand(V, generator=torch.Generator().manual_seed(2)))
    rule = {} if state is None else {"order": state.order.clone(), "prob": state.prob.clone()}
    ones = torch.ones(N, device=DEVICE, dtype=torch.float64)
    want = filtered_gradients(
        p.e.double(), p.c.double(), p.targets, ones, eps=eps, softcap=30.0, **rule
    )
    leaves = p.leaves()
    out = gemma_ext.linear_cross_entropy(
        targets=p.targets,
        **leaves,
        softcap=30.0,
        reduction="sum",
        impl="cce",
        filter_eps=eps,
        state=state,
        return_stats=True,
    )
    out.loss.backward()
    assert 0.05 < want.kept_fraction < 0.9
    assert out.stats.kept_fraction == pytest.approx(want.kept_fraction, abs=1e-3)
    valid = p.targets >= 0
    assert out.stats.dropped_mass == pytest.approx(float(want.dropped_mass[valid].mean()), rel=1e-3)
    # a strip at the threshold may fall on either side
    limit = 2 * GRADIENT_LIMIT[dtype] + 1e-4
    assert error(leaves["e"].grad, want.de) <= limit
    assert error(leaves["c"].grad, want.dc) <= limit


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_auto_stays_near_the_exact_gradient(dtype):
    p = problem(N, D, V, dtype, spread=6.0)
    exact, auto = ours(p, impl="exact", softcap=30.0), ours(p, impl="auto", softcap=30.0)
    assert error(auto["loss"], exact["loss"]) < 1e-6
    assert error(auto["de"], exact["de"]) < 1e-2
    assert error(auto["dc"], exact["dc"]) < 1e-2


def test_a_coarser_threshold_keeps_less():
    p = problem(N, D, V, spread=4.0)

    def kept(eps: float) -> float:
        e = p.e.clone().requires_grad_()
        out = gemma_ext.linear_cross_entropy(
            e, p.c, p.targets, impl="cce", filter_eps=eps, return_stats=True
        )
        return out.stats.kept_fraction

    shares = [kept(2.0**-k) for k in (2, 4, 6, 8, 10, 12)]
    assert shares == sorted(shares)
    assert shares[0] < shares[-1]


def test_state_learns_an_order():
    p = problem(N, D, V, torch.bfloat16, spread=4.0)
    state = gemma_ext.VocabState(V, refresh_every=1).to(DEVICE)
    for _ in range(2):
        ours(p, impl="cce", filter_eps=0.01, state=state)
    assert torch.equal(state.order.sort().values, torch.arange(V, device=DEVICE))
    assert not torch.equal(state.order, torch.arange(V, device=DEVICE))
    assert float(state.prob.sum()) == pytest.approx(1.0, rel=1e-3)
