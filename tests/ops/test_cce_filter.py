"""The gradient filter: which strips survive, what is returned for the others, what is reported."""

from __future__ import annotations

import pytest
import torch
from cce_filter_oracle import TILE, Filtered, filtered, gap_eps, zipf_problem
from cce_oracle import IGNORE, Problem, assert_close, expected, gradients, run, scores

from gemma_ext import linear_cross_entropy
from gemma_ext.reference import cce_filter as reference

V = 2300  # nine tiles, the last one ragged
HEADS = {
    "plain": {},
    "capped": {"softcap": 6.0},
    "all": {"softcap": 8.0, "logit_scale": 0.8, "temperature": 0.9},
}


def coefficients(n: int, kind: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """d_nll, d_lse, d_entropy of n rows."""
    g = torch.Generator().manual_seed(7)
    zero = torch.zeros(n)
    u, h, q = (torch.randn(n, generator=g) for _ in range(3))
    return {
        "uniform": (torch.full((n,), 0.01), zero, zero),
        "advantages": (u, zero, zero),
        "lse": (torch.ones(n), 0.3 * h, zero),
        "entropy": (u, zero, 0.2 * q),
        "everything": (u, 0.3 * h, 0.2 * q),
        "lse only": (zero, h, zero),
        "entropy only": (zero, zero, q),
        "one loud row": (torch.ones(n).index_fill(0, torch.tensor([3]), 1e4), zero, zero),
        "silent rows": (u.index_fill(0, torch.arange(0, n, 2), 0.0), zero, zero),
    }[kind]


FIELDS = ("kept_fraction", "dropped_mass", "dropped_mass_max", "eps")
KINDS = [
    "uniform",
    "advantages",
    "lse",
    "entropy",
    "everything",
    "lse only",
    "entropy only",
    "one loud row",
    "silent rows",
]


def op(p: Problem, kind: str, eps: float | None, *, impl: str = "cce", state=None, **head):
    """Gradients through the public function with per-row coefficients, and its stats."""
    u, h, q = coefficients(len(p.targets), kind)
    leaves = p.leaves()
    out = linear_cross_entropy(
        leaves["e"],
        leaves["c"],
        p.targets,
        bias=leaves.get("bias"),
        reduction="none",
        impl=impl,
        filter_eps=eps,
        return_lse=True,
        return_entropy=bool(q.any()),
        return_stats=True,
        state=state,
        **head,
    )
    total = (u * out.loss + h * out.lse).sum()
    if q.any():
        total = total + (q * out.entropy).sum()
    return gradients(total, leaves), out.stats


def truth(p: Problem, kind: str, near: float, **options) -> tuple[float, Filtered]:
    """An eps near the wanted one that fp32 can decide, and the oracle at it."""
    u, h, q = coefficients(len(p.targets), kind)
    # entropy = lse - m: its upstream is +q on lse and -q on m.
    args = (p, u, h + q, -q)
    eps = gap_eps(filtered(*args, eps=1.0, **options).ratio, near)
    return eps, filtered(*args, eps=eps, **options)


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_the_definition(kind, head):
    p = zipf_problem(90, 24, V, ignored=0.2, seed=1)
    eps, want = truth(p, kind, 2.0**-8, **head)
    assert 0.05 < want.kept_fraction < 0.95
    got, stats = op(p, kind, eps, **head)
    for name in got:
        assert_close(got[name], want.grads[name], rtol=5e-5, what=f"d{name}")
    assert stats.eps == pytest.approx(eps, rel=1e-6)


@pytest.mark.parametrize("eps", [2.0**-4, 2.0**-6, 2.0**-9, 2.0**-12])
@pytest.mark.parametrize("bias", [True, False])
def test_thresholds(eps, bias):
    """With one upstream for all rows the reported numbers are those of the backward."""
    p = zipf_problem(70, 24, V, seed=2)
    p.bias = p.bias if bias else None
    eps, want = truth(p, "uniform", eps)
    got, stats = op(p, "uniform", eps)
    for name in got:
        assert_close(got[name], want.grads[name], rtol=5e-5, what=f"d{name}")
    assert stats.kept_fraction == pytest.approx(want.kept_fraction, abs=1e-6)
    assert stats.dropped_mass == pytest.approx(want.lost_mass.mean().item(), abs=1e-5)
    assert stats.dropped_mass_max == pytest.approx(want.lost_mass.max().item(), abs=1e-5)


@pytest.mark.parametrize("compensate", [True, False])
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("kind", KINDS)
def test_reference_twin_equals_the_definition(kind, head, compensate):
    p = zipf_problem(40, 12, 1100, ignored=0.2, seed=3)
    g = torch.Generator().manual_seed(1)
    order, prob = torch.randperm(1100, generator=g), torch.rand(1100, generator=g)
    options = head | {"order": order, "prob": prob, "compensate": compensate}
    eps, want = truth(p, kind, 2.0**-8, **options)
    u, h, q = coefficients(40, kind)
    got = reference.filtered_gradients(
        p.e.double(), p.c.double(), p.targets, u, h + q, -q, p.bias.double(), eps=eps, **options
    )
    for name, grad in (("e", got.de), ("c", got.dc), ("bias", got.dbias)):
        assert_close(grad, want.grads[name], rtol=1e-6, what=f"d{name}")
    assert got.kept_fraction == pytest.approx(want.kept_fraction, abs=1e-12)
    assert_close(
        got.dropped_mass[got.dropped_mass > 0], want.lost_mass[want.lost_mass > 0], rtol=1e-9
    )


@pytest.mark.parametrize("kind", ["uniform", "everything", "one loud row"])
@pytest.mark.parametrize("eps", [None, 0.0])
def test_no_eps_is_exact(kind, eps):
    p = zipf_problem(60, 24, V, ignored=0.2, seed=4)
    _, want = truth(p, kind, 2.0**-8)
    got, stats = op(p, kind, eps)
    for name in got:
        assert_close(got[name], want.exact[name], rtol=5e-5, what=f"d{name}")
    assert stats.kept_fraction == 1
    assert stats.dropped_mass == 0
    exact, _ = op(p, kind, "auto", impl="exact")
    assert all(torch.equal(got[name], exact[name]) for name in got)


def test_keeping_everything_is_exact():
    """A threshold nothing falls below gives the unfiltered gradient through the filter's code."""
    p = zipf_problem(60, 24, V, seed=5)
    _, want = truth(p, "everything", 2.0**-8)
    got, stats = op(p, "everything", 1e-30)
    for name in got:
        assert_close(got[name], want.exact[name], rtol=5e-5, what=f"d{name}")
    assert stats.kept_fraction == 1


def test_kept_fraction_falls_and_dropped_mass_grows_with_eps():
    p = zipf_problem(60, 24, V, seed=6)
    stats = [op(p, "uniform", 2.0**-k)[1] for k in (16, 14, 12, 10, 8, 6, 4)]
    kept, mass = [s.kept_fraction for s in stats], [s.dropped_mass for s in stats]
    assert kept == sorted(kept, reverse=True)
    assert mass == sorted(mass)
    assert kept[0] > kept[-1]


@pytest.mark.parametrize("eps", [2.0**-6, 2.0**-9, 2.0**-12])
def test_error_is_bounded_by_what_was_dropped(eps):
    """|dE error| <= (dropped |G| + returned mass) max |C_v|, row by row."""
    p = zipf_problem(64, 32, V, seed=7)
    u = torch.ones(64)
    want = filtered(p, u, eps=eps)
    leaves = p.leaves()
    loss = linear_cross_entropy(
        leaves["e"],
        leaves["c"],
        p.targets,
        bias=leaves["bias"],
        reduction="sum",
        impl="cce",
        filter_eps=eps,
    )
    got = gradients(loss, leaves)
    error = (got["e"].double() - want.exact["e"]).norm(dim=1)
    reach = p.c.double().norm(dim=1).max()
    assert (error <= (want.lost_gradient + want.lost_mass) * reach + 1e-5).all()


def confident_problem() -> Problem:
    """p_y > 1 - 2^-12 in every row: |p - onehot| is below eps everywhere."""
    g = torch.Generator().manual_seed(8)
    c = torch.nn.functional.normalize(torch.randn(1500, 64, generator=g), dim=1)
    p = Problem(40.0 * c[:40], c, torch.arange(40))
    prob = torch.softmax(scores(p.e.double(), p.c.double()), 1)
    assert prob[p.targets, p.targets].min() > 1 - 2**-12
    return p


def test_z_loss_of_a_confident_row_survives():
    """2 lambda lse p_y is not small where p - onehot is."""
    p = confident_problem()
    _, got = run(linear_cross_entropy, p, z_loss=1e-2, impl="cce", filter_eps=2.0**-12)
    _, want = expected(p, z_loss=1e-2)
    assert want["e"].norm() > 0.1
    for name in got:
        assert_close(got[name], want[name], rtol=1e-3, what=name)


def test_target_logit_of_a_confident_row_survives():
    """nll - lse = -s_y: no coefficient of p is left to keep the target's strip by its size."""
    p = confident_problem()
    leaves = p.leaves()
    out = linear_cross_entropy(
        leaves["e"],
        leaves["c"],
        p.targets,
        reduction="none",
        impl="cce",
        filter_eps=2.0**-12,
        return_lse=True,
    )
    got = gradients((out.loss - out.lse).sum(), leaves)
    assert_close(got["e"], -p.c[p.targets].double(), rtol=1e-5)
    want = torch.zeros_like(p.c, dtype=torch.float64).index_add_(0, p.targets, -p.e.double())
    assert_close(got["c"], want, rtol=1e-5)


def test_a_loud_row_loses_no_more_than_the_others():
    """g_i = 1e4 on one row: what is dropped from it stays below eps of the mean upstream."""
    p = zipf_problem(200, 24, V, seed=9)
    u = torch.ones(200)
    u[11] = 1e4

    def grads(eps: float | None):
        leaves = p.leaves()
        out = linear_cross_entropy(
            leaves["e"],
            leaves["c"],
            p.targets,
            bias=leaves["bias"],
            reduction="none",
            impl="cce",
            filter_eps=eps,
        )
        return gradients((u * out).sum(), leaves)

    got, want = grads(2.0**-12), grads(None)
    assert_close(got["e"][11] / 1e4, want["e"][11].double() / 1e4, rtol=1e-3)
    assert_close(got["c"], want["c"].double(), rtol=1e-3)


@pytest.mark.parametrize("state", ["none", "profile"])
def test_near_uniform_rows_keep_their_push_down(state):
    """Random initialisation: p = 1/V is below eps in every column, 64 % and more would be lost."""
    g = torch.Generator().manual_seed(10)
    vocab, d, n = 8192, 32, 256
    p = Problem(
        torch.randn(n, d, generator=g),
        0.005 * torch.randn(vocab, d, generator=g),
        torch.randint(0, vocab // 2, (n,), generator=g),
    )
    carried = None
    if state == "profile":
        from gemma_ext import VocabState

        carried = VocabState(vocab)
    u = torch.ones(n)
    eps = 2.0**-10
    exact = filtered(p, u, eps=eps).exact
    plain = filtered(p, u, eps=eps, compensate=False).grads
    got, stats = op(p, "uniform", eps, state=carried)
    got = {name: 100 * grad.double() for name, grad in got.items()}
    assert stats.kept_fraction < 0.1
    assert stats.dropped_mass > 0.9
    size = exact["c"].abs().sum(0)
    assert (got["c"].sum(0).abs() < 1e-4 * size).all()
    assert (plain["c"].sum(0).abs() > 0.1 * size).any()
    # Words that are nobody's target have nothing but push-down.
    unseen = slice(vocab // 2, vocab)
    error = (got["c"][unseen] - exact["c"][unseen]).norm() / exact["c"][unseen].norm()
    assert error < 0.1
    assert (plain["c"][unseen] - exact["c"][unseen]).norm() > 0.5 * exact["c"][unseen].norm()
    assert (got["e"] - exact["e"]).norm() < 0.5 * (plain["e"] - exact["e"]).norm()


def test_label_smoothing_is_always_exact():
    """Every entry of G is at least alpha / V: nothing can be dropped."""
    p = zipf_problem(30, 16, V, seed=11)
    leaves, true = p.leaves(), p.leaves()
    common = {"label_smoothing": 0.1, "reduction": "sum"}
    a = linear_cross_entropy(
        leaves["e"],
        leaves["c"],
        p.targets,
        bias=leaves["bias"],
        impl="cce",
        filter_eps=0.5,
        **common,
    )
    b = linear_cross_entropy(
        true["e"], true["c"], p.targets, bias=true["bias"], impl="reference", **common
    )
    got, want = gradients(a, leaves), gradients(b, true)
    for name in got:
        assert_close(got[name], want[name].double(), rtol=5e-5, what=name)


def test_ignored_rows_do_not_count():
    """kept fraction and dropped mass are over valid rows, whatever the others hold."""
    p = zipf_problem(50, 16, V, ignored=0.5, seed=12)
    valid = p.targets != IGNORE
    alone = Problem(p.e[valid], p.c, p.targets[valid], p.bias)
    dirty = Problem(p.e.clone(), p.c, p.targets, p.bias)
    dirty.e[~valid] = float("nan")
    (got, a), (want, b) = op(dirty, "uniform", 2.0**-8), op(alone, "uniform", 2.0**-8)
    assert a.kept_fraction == b.kept_fraction
    assert a.dropped_mass == pytest.approx(b.dropped_mass, rel=1e-6)
    assert torch.equal(got["e"][valid], want["e"])
    assert torch.equal(got["c"], want["c"])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_stats_are_known_before_the_backward(reduction):
    p = zipf_problem(80, 24, V, ignored=0.2, seed=13)
    eps, want = truth(p, "uniform", 2.0**-8)
    leaves = p.leaves()
    out = linear_cross_entropy(
        leaves["e"],
        leaves["c"],
        p.targets,
        bias=leaves["bias"],
        reduction=reduction,
        impl="cce",
        filter_eps=eps,
        return_stats=True,
    )
    before = tuple(getattr(out.stats, f) for f in FIELDS)
    assert before == pytest.approx(
        (want.kept_fraction, want.lost_mass.mean().item(), want.lost_mass.max().item(), eps),
        rel=1e-5,
    )
    out.loss.backward()
    assert before == tuple(getattr(out.stats, f) for f in FIELDS)


AUTO = [2.0**-k for k in range(10, 16)]


@pytest.mark.parametrize("alpha", [0.0, 0.8, 1.2, 1.5, 2.5])
def test_auto_follows_its_rule(alpha):
    """The largest 2^-k of a small predicted error; exact if it keeps over 60 % or none serves."""
    p = zipf_problem(100, 24, 6000, alpha=alpha, seed=14)
    u = torch.full((100,), 0.01)
    trials = [filtered(p, u, eps=eps) for eps in AUTO]
    bias = None if p.bias is None else p.bias.double()
    probs = torch.softmax(scores(p.e.double(), p.c.double(), bias), 1)
    y = p.targets.long()
    peak, mass = (
        torch.stack([getattr(b, what)(1) for b in probs.split(TILE, 1)], 1)
        for what in ("amax", "sum")
    )
    here = torch.nn.functional.one_hot(y // TILE, peak.shape[1]).bool()
    miss = 1 - probs.gather(1, y[:, None])
    energy = torch.where(here, miss**2, peak**2).sum()
    errors = [((peak * mass)[~t.keep].sum() / energy).sqrt() for t in trials]
    fits = [(eps, t) for eps, t, x in zip(AUTO, trials, errors, strict=True) if x <= 2.0**-9]
    got, stats = op(p, "uniform", "auto")
    if not fits or fits[0][1].kept_fraction > 0.6:
        assert stats.kept_fraction == 1
        assert stats.eps == 0
        want = trials[0].exact
    else:
        assert stats.eps == fits[0][0]
        assert stats.kept_fraction == pytest.approx(fits[0][1].kept_fraction, abs=2e-3)
        want = fits[0][1].grads
    for name in got:
        assert_close(got[name], want[name], rtol=1e-3, what=name)


def test_strip_is_one_row_and_256_columns():
    """One column above eps keeps its tile of 256 for its own row only."""
    vocab, n = 5 * TILE, 6
    c = torch.zeros(vocab, n)
    for i, v in enumerate((0, 255, 256, 700, 1279)):
        c[v, i] = 5.0
    p = Problem(torch.eye(n), c, torch.full((n,), 600))
    out, stats = op(p, "uniform", 2.0**-6)
    want = filtered(p, torch.full((n,), 0.01), eps=2.0**-6)
    assert want.keep.tolist() == [
        [True, False, True, False, False],
        [True, False, True, False, False],
        [False, True, True, False, False],
        [False, False, True, False, False],
        [False, False, True, False, True],
        [False, False, True, False, False],
    ]
    assert stats.kept_fraction == pytest.approx(10 / 30)
    for name in out:
        assert_close(out[name], want.grads[name], rtol=5e-5, what=name)
