"""The sampled backward: without bias, the kept set of its definition, what it reports."""

from __future__ import annotations

import pytest
import torch
from cce_filter_oracle import TILE, Sampled, philox, sampled, zipf_problem
from cce_impls import DEVICES, on_device
from cce_oracle import IGNORE, Problem, assert_close, evaluate, expected, gradients, run, scores

import gemma_ext
from gemma_ext.reference import cce_filter as twin

V = 2300  # nine tiles, the last one ragged
HEADS = {
    "plain": {},
    "capped": {"softcap": 6.0},
    "all": {"softcap": 8.0, "logit_scale": 0.8, "temperature": 0.9},
}
KINDS = {  # d_nll, d_lse, d_entropy of a row, from three normal numbers and the row's number
    "uniform": lambda u, h, q, i: (0 * u + 0.01, 0 * u, 0 * u),
    "advantages": lambda u, h, q, i: (u, 0 * u, 0 * u),
    "lse": lambda u, h, q, i: (0 * u + 1, 0.3 * h, 0 * u),
    "entropy": lambda u, h, q, i: (u, 0 * u, 0.2 * q),
    "everything": lambda u, h, q, i: (u, 0.3 * h, 0.2 * q),
    "lse only": lambda u, h, q, i: (0 * u, h, 0 * u),
    "entropy only": lambda u, h, q, i: (0 * u, 0 * u, q),
    "one loud row": lambda u, h, q, i: (1 + 1e4 * (i == 3), 0 * u, 0 * u),
    "silent rows": lambda u, h, q, i: (u * (i % 2), 0 * u, 0 * u),
}
FIELDS = ("kept_fraction", "relative_error", "eps")


@pytest.fixture(params=DEVICES)
def loss(request):
    """`linear_cross_entropy` on every device there is."""
    if request.param == "cpu":
        return gemma_ext.linear_cross_entropy
    return on_device(gemma_ext.linear_cross_entropy, request.param)


def coefficients(n: int, kind: str) -> tuple[torch.Tensor, ...]:
    """d_nll, d_lse, d_entropy of n rows."""
    g = torch.Generator().manual_seed(7)
    return KINDS[kind](*(torch.randn(n, generator=g) for _ in range(3)), torch.arange(n))


def call(loss, p: Problem, kind: str, tau: float | str | None, **options):
    """Gradients with per-row coefficients, and the output they came from."""
    u, h, q = coefficients(len(p.targets), kind)
    leaves = p.leaves()
    out = loss(
        leaves["e"],
        leaves["c"],
        p.targets,
        bias=leaves.get("bias"),
        **{"reduction": "none", "impl": "cce", "filter_eps": tau, "return_lse": True} | options,
        return_entropy=bool(q.any()),
        return_stats=True,
    )
    total = (u * out.loss + h * out.lse).sum()
    if q.any():
        total = total + (q * out.entropy).sum()
    return gradients(total, leaves), out


def truth(p: Problem, kind: str, tau: float, out, **options) -> Sampled:
    u, h, q = coefficients(len(p.targets), kind)
    # entropy = lse - m: its upstream is +q on lse and -q on m
    return sampled(p, u, h + q, -q, tau=tau, lse=out.lse.detach(), **options)


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("kind", KINDS)
def test_kept_set_and_gradients_are_those_of_the_definition(loss, kind, head):
    """One strip more or less would be an error of its whole weight."""
    p = zipf_problem(90, 24, V, ignored=0.2, seed=1)
    got, out = call(loss, p, kind, 2.0**-3, filter_seed=5, **head)
    want = truth(p, kind, 2.0**-3, out, seed=5, **head)
    assert 0.05 < want.kept_fraction < 0.95
    assert (want.weight > 1).any()
    for name in got:
        assert_close(got[name], want.grads[name], rtol=5e-5, what=f"d{name}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_kept_set_in_half_precision(loss, dtype):
    p = zipf_problem(90, 24, V, ignored=0.2, dtype=dtype, seed=1)
    got, out = call(loss, p, "lse", 2.0**-4)
    want = truth(p, "lse", 2.0**-4, out)
    # above a quarter of the strips a Hopper card computes them all
    dense = loss is not gemma_ext.linear_cross_entropy and want.kept_fraction > 0.25
    if dense and torch.cuda.get_device_capability()[0] == 9:
        want.grads = want.exact
    for name in got:
        assert_close(got[name], want.grads[name], rtol=5e-3, what=f"d{name}")


@pytest.mark.parametrize("kind", KINDS)
def test_reference_twin_equals_the_definition(kind):
    head = HEADS["all"]
    p = zipf_problem(40, 12, 1100, ignored=0.2, seed=3)
    _, out = call(gemma_ext.linear_cross_entropy, p, kind, 2.0**-3, **head)
    want = truth(p, kind, 2.0**-3, out, seed=2**40 - 9, **head)
    u, h, q = coefficients(40, kind)
    got = twin.sampled_gradients(
        *(p.e.double(), p.c.double(), p.targets, u, h + q, -q, p.bias.double()),
        **{"tau": 2.0**-3, "lse": out.lse.detach(), "seed": 2**40 - 9} | head,
    )
    for name, grad in (("e", got.de), ("c", got.dc), ("bias", got.dbias)):
        assert_close(grad, want.grads[name], rtol=1e-6, what=f"d{name}")
    assert got.kept_fraction == pytest.approx(want.kept_fraction, abs=1e-12)


def test_philox():
    """Known answers of the authors' Random123."""
    known = {
        (0, 0, 0): 0xFF1DAE59,
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF): 0x2C3F628B,
        (0x243F6A88, 0x85A308D3, 0x13198A2E): 0xDD7CE038,
    }
    for (first, second, key), word in known.items():
        assert philox(first, second, key) == word
        assert twin.philox(torch.tensor([first]), torch.tensor([second]), key)[0].item() == word


UNBIASED = {
    "mean": {"z_loss": 0.1, "softcap": 5.0},
    "weights": {"token_weights": torch.linspace(0.1, 2.0, 24), "weight": "some"},
    "entropy": {"softcap": 5.0, "temperature": 0.8, "logit_scale": 1.2},
}


@pytest.mark.parametrize("name", UNBIASED)
@pytest.mark.parametrize("draws", [256, pytest.param(4096, marks=pytest.mark.slow)])
def test_mean_over_seeds_is_the_gradient(loss, name, draws):
    """dE, dC and dbias within their standard error, entry by entry and as a whole."""
    p = zipf_problem(24, 6, 1100, ignored=0.1, seed=17)
    options = dict(UNBIASED[name])
    if "weight" in options:
        options["weight"] = torch.linspace(0.5, 1.5, 1100)
    entropy = name == "entropy"
    flags = {"return_entropy": True} if entropy else {}

    def total(out):
        return out.loss - 0.3 * out.entropy.sum() if entropy else getattr(out, "loss", out)

    def grads(function, leaves, **more):
        out = function(
            *(leaves["e"], leaves["c"], p.targets), bias=leaves["bias"], **options, **more
        )
        return gradients(total(out), leaves)

    if entropy:
        true = p.leaves(torch.float64)
        out = evaluate(targets=p.targets, **true, **options)
        want = gradients(total(out), true)
    else:
        _, want = expected(p, **options)
    many = [
        grads(loss, p.leaves(), impl="cce", filter_eps=0.25, filter_seed=seed, **flags)
        for seed in range(draws)
    ]
    for leaf, truth in want.items():
        samples = torch.stack([grad[leaf] for grad in many]).double()
        gap = samples.mean(0) - truth
        error = samples.std(0) / draws**0.5
        assert error.norm() > 1e-3 * truth.norm() / draws**0.5, "nothing was left out"
        # what is always kept has no spread but that of float32, which a card multiplies in halves
        floor = (2e-6 if loss is gemma_ext.linear_cross_entropy else 2e-5) * truth.abs().max()
        assert (gap.abs() <= 6 * error + floor).all(), f"d{leaf} of one entry"
        # entries are correlated, within a strip above all: half as many again as for independent
        assert gap.norm() <= 1.5 * error.norm(), f"d{leaf}"


@pytest.mark.parametrize("kind", ["uniform", "everything", "one loud row"])
def test_weights_of_a_row_add_up_to_its_mass(kind):
    """Systematic sampling: within one tau, and every weight is the inverse of its chance."""
    p = zipf_problem(90, 24, V, ignored=0.2, seed=6)
    _, out = call(gemma_ext.linear_cross_entropy, p, kind, 0.25)
    for seed in range(20):
        got = truth(p, kind, 0.25, out, seed=seed)
        left = (got.size * (got.weight - 1) * got.drawn).sum(1)
        assert left.abs().max() <= 0.25 * (1 + 1e-6)
        u = got.size / 0.25
        picked = got.drawn & (got.weight > 0)
        assert_close(got.weight[picked] * u[picked], torch.ones(int(picked.sum())), rtol=1e-6)
        assert (got.weight[~got.drawn] == 1).all()


def test_rows_that_are_equal_draw_differently(loss):
    p = zipf_problem(1, 24, V, seed=8)
    p = Problem(p.e.expand(64, 24).contiguous(), p.c, p.targets.expand(64).contiguous(), p.bias)
    got, _ = call(loss, p, "lse only", 0.5)
    _, h, _ = coefficients(64, "lse only")
    shares = (got["e"] / h[:, None]).double()
    assert len({tuple(row) for row in shares.mul(1e4).round().tolist()}) > 8


def test_seed_and_data_change_the_draw_and_nothing_else_does(loss):
    p = zipf_problem(40, 24, V, seed=9)
    first, _ = call(loss, p, "uniform", 0.25)
    again, _ = call(loss, p, "uniform", 0.25, filter_seed=0)
    other, _ = call(loss, p, "uniform", 0.25, filter_seed=1)
    high, _ = call(loss, p, "uniform", 0.25, filter_seed=2**33)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["c"], other["c"])
    assert not torch.equal(first["c"], high["c"])
    assert not torch.equal(other["c"], high["c"])
    p.bias = p.bias + 0.37  # no gradient changes, every lse does
    moved, _ = call(loss, p, "uniform", 0.25)
    assert (moved["c"] - first["c"]).norm() > 1e-3 * first["c"].norm()


@pytest.mark.parametrize("seed", [-1, 2**63, -(2**70), 2**64 + 5])
def test_any_integer_is_a_seed(seed):
    p = zipf_problem(20, 8, V, seed=9)
    got, _ = call(gemma_ext.linear_cross_entropy, p, "uniform", 0.25, filter_seed=seed)
    same, _ = call(gemma_ext.linear_cross_entropy, p, "uniform", 0.25, filter_seed=seed % 2**64)
    assert torch.equal(got["c"], same["c"])


@pytest.mark.parametrize("kind", ["uniform", "everything", "one loud row"])
@pytest.mark.parametrize("tau", [None, 0.0])
def test_no_eps_is_exact(loss, kind, tau):
    p = zipf_problem(60, 24, V, ignored=0.2, seed=4)
    got, out = call(loss, p, kind, tau)
    want = truth(p, kind, 0.0, out)
    for name in got:
        assert_close(got[name], want.exact[name], rtol=5e-5, what=f"d{name}")
    assert tuple(getattr(out.stats, f) for f in FIELDS) == (1, 0, 0)
    exact, _ = call(loss, p, kind, "auto", impl="exact")
    assert all(torch.equal(got[name], exact[name]) for name in got)


def test_keeping_everything_is_exact(loss):
    """A threshold nothing falls below gives the exact gradient through the sampler's code."""
    p = zipf_problem(60, 24, V, seed=5)
    got, out = call(loss, p, "everything", 1e-30)
    want = truth(p, "everything", 1e-30, out)
    for name in got:
        assert_close(got[name], want.exact[name], rtol=5e-5, what=f"d{name}")
    assert out.stats.kept_fraction == 1


def test_less_is_kept_at_more_error_as_the_threshold_grows(loss):
    p = zipf_problem(60, 24, V, seed=6)
    stats = [call(loss, p, "uniform", 2.0**-k)[1].stats for k in (12, 10, 8, 6, 4, 2)]
    kept, error = ([getattr(s, f) for s in stats] for f in FIELDS[:2])
    assert kept == sorted(kept, reverse=True)
    assert error == sorted(error)
    assert kept[0] > kept[-1]


@pytest.mark.parametrize("tau", [2.0**-2, 2.0**-4])
def test_predicted_error_is_that_of_the_gradient(loss, tau):
    """For rows of c of one length and hardly correlated, where the prediction is meant to hold."""
    p = zipf_problem(64, 512, V, spread=0.3, seed=7)
    p.c = torch.nn.functional.normalize(p.c, dim=1)
    p.bias = -1.3 * torch.arange(1, V + 1).log()
    errors = []
    for seed in range(8):
        got, out = call(loss, p, "uniform", tau, filter_seed=seed)
        want = truth(p, "uniform", tau, out).exact
        errors.append(((got["e"] - want["e"]).norm() / want["e"].norm()).item())
    measured = sum(errors) / len(errors)
    assert 0.8 * out.stats.relative_error < measured < 1.2 * out.stats.relative_error


def confident_problem() -> Problem:
    """p_y > 1 - 2^-12 in every row."""
    g = torch.Generator().manual_seed(8)
    c = torch.nn.functional.normalize(torch.randn(1500, 64, generator=g), dim=1)
    p = Problem(40.0 * c[:40], c, torch.arange(40))
    prob = torch.softmax(scores(p.e.double(), p.c.double()), 1)
    assert prob[p.targets, p.targets].min() > 1 - 2**-12
    return p


def test_z_loss_of_a_confident_row_survives(loss):
    """2 lambda lse p_y is not small where p - onehot is."""
    p = confident_problem()
    _, got = run(loss, p, z_loss=1e-2, impl="cce", filter_eps=2.0**-12)
    _, want = expected(p, z_loss=1e-2)
    assert want["e"].norm() > 0.1
    for name in got:
        assert_close(got[name], want[name], rtol=1e-3, what=name)


def test_target_logit_of_a_confident_row_survives(loss):
    """nll - lse = -s_y: no coefficient of p is left."""
    p = confident_problem()
    leaves = p.leaves()
    options = {"reduction": "none", "impl": "cce", "filter_eps": 2.0**-12, "return_lse": True}
    out = loss(leaves["e"], leaves["c"], p.targets, **options)
    got = gradients((out.loss - out.lse).sum(), leaves)
    assert_close(got["e"], -p.c[p.targets].double(), rtol=1e-5)
    want = torch.zeros_like(p.c, dtype=torch.float64).index_add_(0, p.targets, -p.e.double())
    assert_close(got["c"], want, rtol=1e-5)


def test_a_loud_row_is_sampled_by_the_size_of_the_others(loss):
    """g_i = 1e4 on one row: its strips count by their gradient, so more of them are kept."""
    p = zipf_problem(200, 24, V, seed=9)
    got, out = call(loss, p, "one loud row", 2.0**-6)
    want = truth(p, "one loud row", 2.0**-6, out)
    kept = (want.weight > 0).double().mean(1)
    assert kept[3] == 1
    assert kept.mean() < 0.8
    assert_close(got["e"][3], want.exact["e"][3], rtol=5e-5)


def test_label_smoothing_is_always_exact(loss):
    """Every entry of G is at least alpha / V: nothing can be left out."""
    p = zipf_problem(30, 16, V, seed=11)
    options = {"label_smoothing": 0.1, "reduction": "sum"}
    out, got = run(loss, p, impl="cce", filter_eps=0.5, return_stats=True, **options)
    _, want = expected(p, **options)
    for name in got:
        assert_close(got[name], want[name], rtol=5e-5, what=name)
    assert out.stats.kept_fraction == 1


def test_ignored_rows_do_not_count(loss):
    """Kept share and error are over valid rows, whatever the others hold."""
    p = zipf_problem(50, 16, V, ignored=0.5, seed=12)
    valid = p.targets != IGNORE
    alone = Problem(p.e[valid], p.c, p.targets[valid], p.bias)
    dirty = Problem(p.e.clone(), p.c, p.targets, p.bias)
    dirty.e[~valid] = float("nan")
    (got, a), (_, b) = call(loss, dirty, "uniform", 0.25), call(loss, alone, "uniform", 0.25)
    assert a.stats.kept_fraction == pytest.approx(b.stats.kept_fraction, rel=1e-9)
    assert a.stats.relative_error == pytest.approx(b.stats.relative_error, rel=1e-9)
    want = truth(p, "uniform", 0.25, a)
    for name in got:
        assert_close(got[name], want.grads[name], rtol=5e-5, what=name)


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("tau", [2.0**-2, 2.0**-5])
def test_stats_are_those_of_the_definition_and_known_before_the_backward(loss, tau, head):
    p = zipf_problem(80, 24, V, ignored=0.2, seed=13)
    want = twin.forecast(p.e.double(), p.c.double(), p.targets, p.bias.double(), tau=tau, **head)
    leaves = p.leaves()
    options = {"impl": "cce", "filter_eps": tau, "return_stats": True} | head
    out = loss(leaves["e"], leaves["c"], p.targets, bias=leaves["bias"], **options)
    before = tuple(getattr(out.stats, f) for f in FIELDS)
    assert before == pytest.approx((want.kept, want.error, tau), rel=1e-5)
    out.loss.backward()
    assert before == tuple(getattr(out.stats, f) for f in FIELDS)
    with torch.no_grad():
        again = loss(leaves["e"], leaves["c"], p.targets, bias=leaves["bias"], **options)
    assert before == tuple(getattr(again.stats, f) for f in FIELDS)


@pytest.mark.parametrize("alpha", [0.0, 0.8, 1.2, 1.5, 2.5, 4.0])
def test_auto_follows_its_rule(loss, alpha):
    """The largest 2^-k of a small predicted error; exact if none serves or too much is kept."""
    p = zipf_problem(100, 24, 6000, alpha=alpha, dtype=torch.bfloat16, seed=14)
    problem = p.e.double(), p.c.double(), p.targets, p.bias.double()
    found = {tau: twin.forecast(*problem, tau=tau) for tau in [2.0**-k for k in range(6, 13)]}
    fits = [tau for tau, cast in found.items() if cast.error <= 2.0**-6]
    want = fits[0] if fits and found[fits[0]].kept <= 0.6 else 0.0
    assert twin.auto_tau(*problem) == want
    got, out = call(loss, p, "uniform", "auto")
    assert out.stats.eps == want
    kept = found[want].kept if want else 1.0
    assert out.stats.kept_fraction == pytest.approx(kept, abs=1e-5)
    grads = truth(p, "uniform", want, out).grads
    for name in got:
        assert_close(got[name], grads[name], rtol=5e-3, what=name)


def test_both_answers_of_auto_are_met():
    """Peaked rows are sampled and flat ones are not, or the test above compares one branch."""
    taus = {}
    for alpha in (0.0, 2.5):
        p = zipf_problem(100, 24, 6000, alpha=alpha, dtype=torch.bfloat16, seed=14)
        taus[alpha] = twin.auto_tau(p.e.double(), p.c.double(), p.targets, p.bias.double())
    assert taus[0.0] == 0
    assert taus[2.5] > 0


@pytest.mark.parametrize("impl", ["auto", "cce"])
def test_auto_is_exact_in_float32(loss, impl):
    """Sampling has the error of rounding to 16 bits."""
    p = zipf_problem(100, 24, 6000, alpha=2.5, seed=14)
    got, out = call(loss, p, "uniform", "auto", impl=impl)
    want, _ = call(loss, p, "uniform", None, impl="exact")
    assert out.stats.eps == 0
    assert all(torch.equal(got[name], want[name]) for name in got)


def test_strip_is_one_row_and_256_columns(loss):
    """One heavy column keeps its tile of 256 for its own row only."""
    vocab, n = 5 * TILE, 6
    c = torch.zeros(vocab, n)
    for i, v in enumerate((0, 255, 256, 700, 1279)):
        c[v, i] = 12.0
    p = Problem(torch.eye(n), c, torch.full((n,), 600))
    _, out = call(loss, p, "uniform", 0.15)
    want = truth(p, "uniform", 0.15, out)
    sure = (want.weight > 0) & ~want.drawn
    assert sure.tolist() == [
        [True, False, True, False, False],
        [True, False, True, False, False],
        [False, True, True, False, False],
        [False, False, True, False, False],
        [False, False, True, False, True],
        [True, True, True, True, True],
    ]


def test_loss_scales_of_float16_do_not_overflow_through_weights(loss):
    """A weight of 1e3 meets a loss scale of 2^16; x / tau is the gradient's own size by then."""
    p = zipf_problem(100, 24, 6000, alpha=2.5, dtype=torch.float16, seed=3)
    _, got = run(loss, p, 2.0**16, impl="cce", filter_eps=0.5)
    for name, grad in got.items():
        assert torch.isfinite(grad).all(), name
