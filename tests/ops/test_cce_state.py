"""Column statistics, and the order and profile a VocabState hands to the filter."""

from __future__ import annotations

import pytest
import torch
from cce_filter_oracle import filtered, gap_eps, zipf_problem
from cce_oracle import IGNORE, assert_close, expected, gradients, run, scores

from gemma_ext import VocabState, linear_cross_entropy
from gemma_ext.ops.cce import op

V = 2300


def shuffled_state(seed: int = 1) -> VocabState:
    """A state that will not refresh: any order and profile must give the definition's result."""
    g = torch.Generator().manual_seed(seed)
    state = VocabState(V).eval()
    state.order = torch.randperm(V, generator=g)
    state.prob = torch.rand(V, generator=g) ** 4
    state.prob[state.order[256:512]] = 0
    return state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("softcap", [None, 7.0])
def test_gradients_under_an_order_and_a_profile(softcap, dtype):
    """A tile whose profile sums to zero spreads evenly."""
    p = zipf_problem(80, 24, V, ignored=0.2, dtype=dtype, seed=1)
    state = shuffled_state()
    u = torch.ones(80)
    options = {"softcap": softcap, "order": state.order.clone(), "prob": state.prob.clone()}
    eps = gap_eps(filtered(p, u, eps=1.0, **options).ratio, 2.0**-7)
    want = filtered(p, u, eps=eps, **options)
    leaves = p.leaves()
    out = linear_cross_entropy(
        leaves["e"],
        leaves["c"],
        p.targets,
        bias=leaves["bias"],
        softcap=softcap,
        reduction="sum",
        impl="cce",
        filter_eps=eps,
        return_stats=True,
        state=state,
    )
    got = gradients(out.loss, leaves)
    assert out.stats.kept_fraction == pytest.approx(want.kept_fraction, abs=1e-6)
    assert 0.1 < want.kept_fraction < 0.9
    for name in got:
        tol = 5e-5 if dtype == torch.float32 else 6e-3
        assert_close(got[name], want.grads[name], rtol=tol, what=f"d{name}")


@pytest.mark.parametrize("impl", ["exact", "cce"])
def test_order_changes_no_value(impl):
    p = zipf_problem(60, 24, V, ignored=0.2, seed=2)
    flags = {"return_lse": True, "return_entropy": True, "return_argmax": True}
    truth, want = expected(p, softcap=7.0)
    out, got = run(
        linear_cross_entropy,
        p,
        softcap=7.0,
        impl=impl,
        filter_eps=2.0**-24,
        state=shuffled_state(),
        **flags,
    )
    valid = p.targets != IGNORE
    assert torch.equal(out.argmax[valid], truth.argmax[valid])
    for field in ("loss", "lse", "entropy"):
        assert_close(getattr(out, field), getattr(truth, field), rtol=2e-5, what=field)
    for name in got:
        assert_close(got[name], want[name], rtol=4e-5, what=f"d{name}")


def test_ties_take_the_lowest_id_in_any_order():
    c = torch.zeros(V, 1)
    c[[40, 700, 2299]] = 1.0
    out = linear_cross_entropy(
        torch.ones(3, 1),
        c,
        torch.zeros(3, dtype=torch.long),
        impl="cce",
        return_argmax=True,
        state=shuffled_state(3),
    )
    assert out.argmax.tolist() == [40, 40, 40]


@pytest.mark.parametrize("softcap", [None, 7.0])
@pytest.mark.parametrize("max_rows", [1, 16, 1000])
def test_column_statistics(softcap, max_rows):
    """count_v: sampled rows with p_v >= eps; prob_v: the sum of p_v over them."""
    p = zipf_problem(64, 24, V, ignored=0.3, seed=3)
    valid = torch.nonzero(p.targets != IGNORE).squeeze(1)
    step = -(-len(valid) // max_rows)
    sample = valid[:: max(step, 1)]
    s = scores(p.e.double()[sample], p.c.double(), p.bias.double(), softcap=softcap)
    prob = torch.softmax(s, 1)
    eps = gap_eps(prob, 2.0**-9)
    lse = torch.full((64,), float("nan"))
    lse[sample] = torch.logsumexp(s, 1).float()
    p.e[p.targets == IGNORE] = float("nan")
    count, mass = torch.ops.gemma_ext.cce_column_stats(
        p.e, p.c, p.targets, p.bias, lse, softcap or 0.0, 1.0, 1.0, IGNORE, eps, max_rows
    )
    assert torch.equal(count.double(), (prob >= eps).double().sum(0))
    assert_close(mass, prob.sum(0), rtol=2e-5)


def test_learned_order_groups_the_columns_in_use():
    """Ids shuffled: natural order keeps most strips, the learned order few, at less error."""
    p = zipf_problem(128, 24, 8192, alpha=1.5, spread=1.0, shuffled=True, seed=4)
    eps = 2.0**-9
    kept, errors = [], []
    _, exact = expected(p)
    for state in (None, VocabState(8192)):
        for _ in range(3):
            out, got = run(
                linear_cross_entropy, p, impl="cce", filter_eps=eps, state=state, return_stats=True
            )
        kept.append(out.stats.kept_fraction)
        errors.append((got["c"].double() - exact["c"]).norm() / exact["c"].norm())
    assert kept[1] < 0.5 * kept[0]
    assert errors[1] < 0.05


@pytest.mark.cpu
def test_flat_rows_go_straight_to_the_exact_form_between_refreshes(monkeypatch):
    fused = []

    def counted(*args, **options):
        fused.append(len(fused))
        return whole(*args, **options)

    whole = op.fused_loss
    monkeypatch.setattr(op, "fused_loss", counted)
    flat = zipf_problem(40, 24, 600, spread=0.1, alpha=0.1, seed=5)  # every p is above 2^-10
    sharp = zipf_problem(40, 24, 600, spread=1.0, alpha=4.0, seed=6)
    state = VocabState(600, refresh_every=4)
    _, exact = expected(flat)
    calls = []
    for _ in range(6):
        _, got = run(linear_cross_entropy, flat, state=state)
        calls.append(len(fused))
        for name in got:
            assert_close(got[name], exact[name], rtol=2e-5, what=name)
    assert calls == [0, 1, 2, 3, 3, 4]
    for _ in range(6):
        run(linear_cross_entropy, sharp, state=state)
        calls.append(len(fused))
    assert calls[6:] == [5, 6, 6, 6, 6, 6]  # from the next refresh on the filter pays
    assert int(state.steps) == 12
    assert not state.flat
