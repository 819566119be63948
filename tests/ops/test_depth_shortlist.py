"""The head through 8-bit codes: bounds hold, certified rows are the head's, the others too."""

from __future__ import annotations

import pytest
import torch
from depth_rows import DEVICES, DTYPES, IDS, IMPLS, is_split, randn

from gemma_ext.ops.depth_batching import head_op
from gemma_ext.ops.depth_batching.head import head_exit
from gemma_ext.ops.depth_batching.shortlist import make_shortlist, shortlist_head
from gemma_ext.reference import depth_batching_head as formulas


def head_of(n=23, width=48, vocabulary=700, dtype=torch.float32, sharp=3.0, seed=0, device="cpu"):
    """Rows near the direction of a token each, so that some have clear winners."""
    weight = randn(vocabulary, width, seed=seed) * width**-0.5
    h = (
        randn(n, width, seed=seed + 1)
        + sharp * torch.linspace(0, 3, n)[:, None] * weight[7 : 7 + n]
    )
    bias = randn(vocabulary, seed=seed + 2).to(device)
    return h.to(device, dtype), weight.to(device, dtype), bias


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}, {"logit_scale": -2.0}], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("device", DEVICES)
def test_bounds_hold(device, impl, options, dtype):
    h, weight, bias = head_of(dtype=dtype, device=device)
    given = {"softcap": None, "logit_scale": 1.0, **options}
    short = make_shortlist(weight)
    logits = head_op.Logits(weight, bias, **given)
    if impl == "reference":
        found = formulas.shortlist(h, *short[1:], 8, **logits._asdict())
    else:
        found = head_op.shortlist(h, logits, *short[1:], 8)
    ids, top, rest, low, high = found
    s = given["logit_scale"] * (h.double() @ weight.double().T) + bias.double()
    if given["softcap"]:
        s = given["softcap"] * torch.tanh(s / given["softcap"])
    lse = s.logsumexp(-1) - top[:, 0].double()
    assert bool((low <= lse).all())
    assert bool((lse <= high).all())
    assert float((high - low).mean()) < 1.5
    order = s.sort(dim=-1, descending=True)
    sure = top[:, 0] > rest
    assert int(sure.sum()) > 0
    assert torch.equal(ids[sure].long(), order.indices[sure, 0])
    beyond = s.clone()
    beyond.scatter_(-1, order.indices[:, :1], -torch.inf)
    off = torch.full_like(rest, 1e-5)
    if impl == "auto" and is_split(h):
        off += abs(given["logit_scale"]) * 2.0**-15 * h.norm(dim=-1) * weight.norm(dim=-1).max()
    assert bool((beyond.amax(-1) <= torch.maximum(top[:, 1], rest) + off)[sure].all())


@pytest.mark.parametrize("offset", [0.0, 100.0, -1000.0, 1e4])
@pytest.mark.parametrize("candidates", [8, 300])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("device", DEVICES)
def test_certificates_hold_at_large_logits(device, impl, candidates, offset):
    """Thresholds beside the score: where float32 has no bits left of lse, nothing is certified
    that the head decides otherwise."""
    n, vocabulary = 1500 if impl == "auto" else 300, 300
    h, weight = randn(n, 16, seed=4).to(device), 2 * randn(vocabulary, 16, seed=5).to(device)
    bias = torch.full((vocabulary,), offset, device=device)
    short = make_shortlist(weight)
    certified = 0
    for mode in ("max_prob", "margin"):
        s = (h @ weight.T + bias).double()  # the offset takes the same bits from the head's
        p = s.softmax(-1).sort(-1, descending=True).values
        score = p[:, 0] if mode == "max_prob" else p[:, 0] - p[:, 1]
        for shift in (-1e-4, -2e-5, -1e-5, 1e-5, 2e-5, 1e-4):
            asked = {"bias": bias, "mode": mode, "threshold": (score * (1 + shift)).float()}
            want = head_exit(h, weight, **asked, impl=impl)
            got = shortlist_head(h, short, **asked, candidates=candidates, impl=impl)
            assert torch.equal(got.ids, want.ids)
            assert torch.equal(got.exits, want.exits)
            certified += int(got.certified.sum())
    assert certified > 0 or candidates < vocabulary


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("device", DEVICES)
def test_logits_as_close_as_their_rounding(device, impl):
    """With a bias of 1e6 logits are multiples of 1/16: the head's best is the lowest id of many."""
    h, weight = randn(300, 16, seed=6).to(device), 0.2 * randn(300, 16, seed=7).to(device)
    bias = torch.full((300,), 1e6, device=device)
    want = head_exit(h, weight, bias=bias, impl=impl)
    got = shortlist_head(h, make_shortlist(weight), bias=bias, candidates=4, impl=impl)
    assert torch.equal(got.ids, want.ids)
    assert torch.equal(got.top, want.top[:, 0])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("device", DEVICES)
def test_infinite_logits_take_the_head(device, impl):
    h, weight, bias = head_of(3, device=device)
    bias[400] = torch.inf
    options = {"bias": bias, "mode": "max_prob", "threshold": 0.0, "impl": impl}
    got = shortlist_head(h, make_shortlist(weight), **options, candidates=8)
    assert got.ids.tolist() == [400] * 3
    assert not got.exits.any()
    assert not got.certified.any()
    bias[400] = -torch.inf
    got = shortlist_head(h, make_shortlist(weight), **options, candidates=8)
    assert bool(got.certified.any())


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("mode", [None, "max_prob", "margin"])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("device", DEVICES)
def test_every_row_is_the_head_s(device, impl, mode, dtype):
    h, weight, bias = head_of(dtype=dtype, device=device)
    norm = (randn(48, seed=8, dtype=dtype).abs() + 0.5).to(device)
    options = {"bias": bias, "norm_weight": norm, "softcap": 20.0}
    whole = head_exit(h, weight, **options, mode="margin", threshold=0.0, impl=impl)
    p = (whole.top - whole.lse.unsqueeze(-1)).exp()
    scores = p[:, 0] if mode == "max_prob" else p[:, 0] - p[:, 1]
    short = make_shortlist(weight)
    for shift in (-0.2, -1e-4, 1e-4, 0.2):
        asked = {"mode": mode, "threshold": scores + shift} if mode else {}
        want = head_exit(h, weight, **options, **asked, impl=impl)
        got = shortlist_head(h, short, **options, **asked, candidates=16, impl=impl)
        assert torch.equal(got.ids, want.ids)
        torch.testing.assert_close(got.top, want.top[:, 0], rtol=1e-6, atol=1e-6)
        assert (got.exits is None) == (mode is None)
        if mode:
            assert torch.equal(got.exits, want.exits)
        assert bool(got.certified.any()) or abs(shift) < 0.01


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("device", DEVICES)
def test_logits_have_the_bits_of_the_head(device, dtype):
    h, weight, bias = head_of(dtype=dtype, device=device)
    got = shortlist_head(h, make_shortlist(weight), bias=bias, softcap=9.0)
    want = head_exit(h, weight, bias=bias, softcap=9.0)
    assert torch.equal(got.top, want.top[:, 0])


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("device", DEVICES)
def test_a_row_has_its_bits_alone(device, dtype):
    h, weight, bias = head_of(70, 40, dtype=dtype, device=device)
    short = make_shortlist(weight)

    def run(rows):
        return head_op.shortlist(rows, head_op.Logits(weight, bias, softcap=9.0), *short[1:], 5)

    want = run(h)
    for n in (1, 16, 17, 69):
        for a, b in zip(run(h[-n:]), want, strict=True):
            assert torch.equal(a, b[-n:]), n


@pytest.mark.parametrize("device", DEVICES)
def test_equal_tokens_are_never_certified(device):
    weight = torch.zeros(300, 4, device=device)
    weight[[20, 299]] = 1.0
    got = shortlist_head(torch.ones(1, 4, device=device), make_shortlist(weight), candidates=1)
    assert got.ids.tolist() == [20]
    assert not got.certified.any()


@pytest.mark.parametrize("device", DEVICES)
def test_a_head_of_few_tokens_is_all_candidates(device):
    h, weight, _ = head_of(5, 8, 30, device=device)
    got = shortlist_head(h[:, :8], make_shortlist(weight), mode="max_prob", threshold=0.5)
    want = head_exit(h, weight, mode="max_prob", threshold=0.5)
    assert bool(got.certified.all())
    assert torch.equal(got.ids, want.ids)
    assert torch.equal(got.exits, want.exits)


@pytest.mark.parametrize("device", DEVICES)
def test_nan_rows_take_the_head(device):
    h, weight, _ = head_of(4, device=device)
    h[2, 0] = torch.nan
    got = shortlist_head(h, make_shortlist(weight), mode="max_prob", threshold=0.0)
    assert not got.certified[2]
    assert got.exits.tolist() == [True, True, False, True]
    assert got.ids[2] == 0


def test_codes():
    weight = torch.cat([randn(40, 19), torch.zeros(1, 19), 1e-30 * randn(1, 19)])
    short = make_shortlist(weight, rows=7)
    assert torch.equal(short.codes, make_shortlist(weight).codes)
    assert short.codes.abs().amax(-1)[:40].tolist() == [127] * 40
    off = (weight.double() - short.scale.double()[:, None] * short.codes.double()).norm(dim=-1)
    assert bool((off <= short.slack.double()).all())
    assert bool((short.slack <= 0.02 * weight.norm(dim=-1) + 1e-30).all())
    none = shortlist_head(torch.empty(0, 19), short, mode="margin", threshold=0.5)
    assert none.ids.shape == none.certified.shape == (0,)


H, W = torch.randn(2, 8), torch.randn(30, 8)
S = make_shortlist(W)
MESSAGES = {
    "expected weight to be [V, D] with V > 0, got [8]": lambda: make_shortlist(W[0]),
    "expected weight to be [V, D] with V > 0, got [0, 8]": lambda: make_shortlist(W[:0]),
    "expected weight to be finite": lambda: make_shortlist(W * torch.inf),
    "expected weight to be [V, 7], got [30, 8]": lambda: shortlist_head(H[:, 1:], S),
    "expected mode to be max_prob or margin, got 'entropy'": lambda: shortlist_head(
        H, S, mode="entropy", threshold=0.1
    ),
    "expected candidates in [1, 1023], got 0": lambda: shortlist_head(H, S, candidates=0),
    "expected candidates in [1, 1023], got 1024": lambda: shortlist_head(H, S, candidates=1024),
}


@pytest.mark.parametrize("message", MESSAGES)
def test_what_does_not_fit(message):
    with pytest.raises(ValueError) as caught:
        MESSAGES[message]()
    assert message in str(caught.value)


def test_types_that_do_not_fit():
    with pytest.raises(TypeError, match="expected weight to be of a float dtype"):
        make_shortlist(W.long())
