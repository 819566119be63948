"""What serving reads off the head, against float64 softmax (oracle 8 of depth batching)."""

from __future__ import annotations

import pytest
import torch
from depth_rows import DEVICES, DTYPES, IDS, IMPLS, is_split, randn

from gemma_ext.ops.depth_batching import head_op
from gemma_ext.ops.depth_batching.head import gumbel, head_exit

NORM = {"eps": 1e-6, "plus_one": True}
FIELDS = ("ids", "top", "lse", "entropy", "exits", "samples", "tempered", "values", "indices")


def keys(n: int, seed: int = 3) -> torch.Tensor:
    rows = torch.arange(n)
    return torch.stack([torch.full((n,), seed), rows % 5 - 2, 7 * rows], -1)


def head_of(n, width, vocabulary, dtype=torch.float32, seed=0, device="cpu"):
    h = randn(n, width, seed=seed, dtype=dtype)
    weight = (3 * randn(vocabulary, width, seed=seed + 1) * width**-0.5).to(dtype)
    return h.to(device), weight.to(device), randn(vocabulary, seed=seed + 2).to(device)


def logits(h, weight, bias=None, *, softcap=None, logit_scale=1.0):
    s = logit_scale * (h.cpu().double() @ weight.cpu().double().T)
    if bias is not None:
        s = s + bias.cpu().double()
    return s if softcap is None else softcap * torch.tanh(s / softcap)


def off_of(h):
    """How far logits of these tests may be off."""
    return 2e-3 if is_split(h) else 2e-5


def assert_rows(got, s, heat=None, noise=None, *, off=2e-5):
    """Every result of `head_exit` against float64 logits that may be `off`."""
    p = s.softmax(-1)
    lse = s.logsumexp(-1)
    tolerance = {"rtol": 1e-6, "atol": off}
    best = s.topk(min(2, s.shape[1]), -1).values
    torch.testing.assert_close(got.top[:, : best.shape[1]].double().cpu(), best, **tolerance)
    torch.testing.assert_close(got.lse.double().cpu(), lse, **tolerance)
    entropy = -torch.where(p > 0, p * (s - lse[:, None]), 0.0).sum(-1)
    torch.testing.assert_close(got.entropy.double().cpu(), entropy, rtol=3e-5, atol=2e-5 + 3 * off)
    at = got.ids.cpu().long().unsqueeze(-1)
    assert bool((s.gather(-1, at).squeeze(-1) >= best[:, 0] - off).all())
    if heat is not None:
        hot = heat > 0
        scaled = s[hot] / heat[hot].double().unsqueeze(-1)
        score = scaled + noise[hot]
        drawn = got.samples.cpu()[hot].long().unsqueeze(-1)
        least = score.amax(-1) - off / heat[hot].double() - 1e-5
        assert bool((score.gather(-1, drawn).squeeze(-1) >= least).all())
        torch.testing.assert_close(
            got.tempered.double().cpu()[hot], scaled.logsumexp(-1), rtol=1e-5, atol=10 * off
        )
        assert torch.equal(got.samples.cpu()[~hot], got.ids.cpu()[~hot])
        assert torch.equal(got.tempered.cpu()[~hot], got.lse.cpu()[~hot])
    if got.values is not None:
        count = got.values.shape[1]
        want = s.topk(count, -1).values
        torch.testing.assert_close(got.values.double().cpu(), want, **tolerance)
        found = s.gather(-1, got.indices.cpu().long())
        torch.testing.assert_close(got.values.double().cpu(), found, **tolerance)
        assert bool((got.values[:, 1:] <= got.values[:, :-1]).all())
        assert all(len(set(row)) == count for row in got.indices.tolist())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize(
    ("n", "width", "vocabulary"),
    [
        (1, 1, 1),
        (1, 40, 2),
        (7, 33, 255),
        (3, 64, 256),
        (9, 100, 257),
        (130, 24, 1000),
        (2, 2304, 700),
    ],
)
@pytest.mark.parametrize("impl", IMPLS)
def test_against_softmax(impl, n, width, vocabulary, dtype, device):
    h, weight, bias = head_of(n, width, vocabulary, dtype, device=device)
    heat = torch.tensor([0.0, 1.0, 0.7, 2.5])[torch.arange(n) % 4]
    for options in ({}, {"softcap": 4.0, "logit_scale": 0.5}, {"softcap": 30.0}):
        given = None if not options else bias
        got = head_exit(
            h, weight, bias=given, **options, temperature=heat.to(device),
            keys=keys(n).to(device), candidates=40, impl=impl,
        )  # fmt: skip
        s = logits(h, weight, given, **options)
        noise = gumbel(torch.arange(vocabulary).int().expand(n, -1), keys(n), impl="reference")
        assert_rows(got, s, heat, noise, off=off_of(h))
        assert got.exits is None
        assert got.values.shape == (n, min(40, vocabulary))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("impl", IMPLS)
def test_behind_a_norm(impl, dtype, device):
    """The norm is rounded to the dtype of the head, of which h need not be."""
    _, weight, _ = head_of(6, 50, 300, dtype, device=device)
    h, norm = 5 * randn(6, 50, seed=4).to(device), 0.1 * randn(50, seed=5, dtype=dtype).to(device)
    got = head_exit(h, weight, norm_weight=norm, **NORM, softcap=30.0, impl=impl)
    x = h.double() * (h.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    x = (x * (1 + norm.double())).to(dtype)
    # an element may be rounded to the other side
    off = off_of(weight) if dtype == torch.float32 else 0.02
    assert_rows(got, logits(x, weight, softcap=30.0), off=off)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("impl", IMPLS)
def test_ties_go_to_the_lowest_id(impl, device):
    eye = torch.eye(3)
    weight = torch.zeros(1000, 3)
    weight[[700, 701, 300, 255, 256]] = eye[0]
    weight[[5, 999]] = eye[1]
    got = head_exit(eye.to(device), weight.to(device), candidates=6, impl=impl)
    assert got.ids.tolist() == [255, 5, 0]
    assert got.top.tolist() == [[1, 1], [1, 1], [0, 0]]
    assert got.indices.tolist() == [
        [255, 256, 300, 700, 701, 0],
        [5, 999, 0, 1, 2, 3],
        [0, 1, 2, 3, 4, 5],
    ]
    equal = head_exit(torch.ones(1, 1).to(device), torch.ones(513, 1).to(device), impl=impl)
    assert equal.ids.item() == 0
    torch.testing.assert_close(equal.entropy.item(), torch.tensor(513.0).log().item())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("impl", IMPLS)
def test_tokens_that_cannot_be(impl, device):
    """Logits of -inf by a bias: some, all but one, all."""
    h, weight, _ = head_of(2, 8, 600, device=device)
    bias = torch.zeros(600, device=device)
    bias[:300] = -torch.inf
    options = {"mode": "max_prob", "threshold": 0.0, "candidates": 400, "impl": impl}
    sample = {"temperature": 1.0, "keys": keys(2).to(device)}
    got = head_exit(h, weight, bias=bias, **options, **sample)
    s = logits(h, weight, bias)
    torch.testing.assert_close(got.lse.double().cpu(), s.logsumexp(-1), rtol=0, atol=off_of(h))
    assert bool((got.ids >= 300).all())
    assert bool((got.samples >= 300).all())
    assert bool((got.indices[:, :300] >= 300).all())
    assert bool((got.values[:, 300:] == -torch.inf).all())
    bias[300:] = -torch.inf
    bias[17] = 0
    got = head_exit(h, weight, bias=bias, **options, **sample)
    assert got.ids.tolist() == got.samples.tolist() == [17, 17]
    assert bool((got.top[:, 1] == -torch.inf).all())
    assert bool(got.exits.all())
    torch.testing.assert_close(got.entropy.cpu(), torch.zeros(2), rtol=0, atol=1e-6)
    bias[17] = -torch.inf
    got = head_exit(h, weight, bias=bias, **options, **sample)
    assert got.ids.tolist() == [0, 0]
    assert bool((got.lse == -torch.inf).all())
    assert not bool(got.exits.any())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("impl", IMPLS)
def test_a_logit_of_infinity(impl, device):
    """It is the best and the sample; sums are NaN, and nothing leaves."""
    h, weight, bias = head_of(2, 8, 600, device=device)
    bias[400] = torch.inf
    for mode, threshold in (("max_prob", 0.0), ("margin", -1.0), ("entropy", 100.0)):
        got = head_exit(
            h, weight, bias=bias, mode=mode, threshold=threshold, temperature=0.5,
            keys=keys(2).to(device), candidates=2, impl=impl,
        )  # fmt: skip
        assert got.ids.tolist() == got.samples.tolist() == [400, 400]
        assert got.top[:, 0].tolist() == got.values[:, 0].tolist() == [torch.inf] * 2
        assert not bool(got.exits.any())
        for sums in (got.lse, got.entropy, got.tempered):
            assert bool(sums.isnan().all())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("heat", [1e-6, 9.9e-7, 1e-38, 1e-40, 1e-45, -1.0, torch.nan])
def test_temperatures_close_to_zero_take_the_best(heat, impl, device):
    h, weight, bias = head_of(5, 8, 600, device=device)
    got = head_exit(
        h, weight, bias=bias, temperature=heat, keys=keys(5).to(device), impl=impl
    )  # fmt: skip
    assert torch.equal(got.samples, got.ids)
    assert bool(got.tempered.isfinite().all())
    greedy = not heat >= 1e-6
    assert torch.equal(got.tempered, got.lse) == greedy


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("impl", IMPLS)
def test_scores_of_large_logits(impl, device):
    """Two tokens 1 apart at 1e5, where lse has no bits left for p."""
    h, weight = torch.ones(1, 1, device=device), torch.tensor([[1e5], [1e5 + 1]], device=device)
    p = torch.tensor(1.0, dtype=torch.float64).sigmoid().item()
    for mode, score in (("max_prob", p), ("margin", 2 * p - 1)):
        for shift, leaves in ((-1e-5, True), (1e-5, False)):
            limit = {"mode": mode, "threshold": score + shift}
            assert head_exit(h, weight, **limit, impl=impl).exits.item() == leaves


@pytest.mark.parametrize("device", DEVICES)
def test_the_op_takes_no_more_candidates_than_a_card_holds(device):
    """What a caller of torch.ops gets, past the checks of `head_exit`."""
    h, weight = torch.ones(1, 1, device=device), torch.ones(2000, 1, device=device)
    for candidates in (1025, 2000, -1):
        with pytest.raises(RuntimeError, match=r"expected candidates in \[0, min\(V, 1024\)\]"):
            torch.ops.gemma_ext.depth_head_exit(
                *(h, None, weight, None, None, None, None, None),
                *(1e-6, False, 0.0, 1.0, 0, False, candidates),
            )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("n", [1, 20, 130])
def test_rows_that_nobody_reads_change_no_other(n, device):
    h, weight = randn(n, 24).to(device), randn(300, 24, seed=1).to(device)
    limit = torch.full((n,), 0.1, device=device)
    given = (head_op.Logits(weight), limit, None, None, "margin", True, 5)
    want = head_op.head_exit(h, *given)
    for share in (0.0, 0.5, 1.0):
        skip = torch.rand(n, generator=torch.Generator().manual_seed(n)) < share
        got = head_op.head_exit(h, *given, skip.to(device))
        for a, b in zip(got, want, strict=True):
            if len(a):
                assert torch.equal(a[~skip.to(device)], b[~skip.to(device)])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_logits_of_ten_thousand(softcap, impl, device):
    h = torch.tensor([[1e4], [-1e4], [0.0]], device=device)  # exact in two halves of bfloat16
    weight = torch.tensor([[1.0], [-1.0], [0.75], [0.0]], device=device)
    got = head_exit(h, weight, softcap=softcap, mode="entropy", threshold=0.5, impl=impl)
    s = logits(h, weight, softcap=softcap)
    assert_rows(got, s, off=1e-4)
    if softcap is None:
        assert got.ids.tolist() == [0, 1, 0]
        assert got.exits.tolist() == [True, True, False]
        assert got.entropy.tolist()[:2] == pytest.approx([5e-4, 0.0], abs=1e-3)
    else:
        assert got.ids.tolist() == [0, 1, 0]
        assert got.top[0].tolist() == [30.0, 30.0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("impl", IMPLS)
def test_nan_never_leaves(impl, device):
    h, weight, _ = head_of(3, 8, 300, device=device)
    h[1, 3] = torch.nan
    weight[40] = torch.nan
    for mode, threshold in (("max_prob", 0.0), ("margin", -1.0), ("entropy", 100.0)):
        got = head_exit(
            h, weight, mode=mode, threshold=threshold, temperature=1.0,
            keys=keys(3).to(device), candidates=300, impl=impl,
        )  # fmt: skip
        assert not bool(got.exits.any())
        assert bool(got.lse.isnan().all())
        assert bool(got.entropy.isnan().all())
        assert 40 not in got.ids.tolist() + got.samples.tolist()
        assert got.indices[1, 0] == 0
        assert got.values[0, -1] == -torch.inf


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("mode", ["max_prob", "margin", "entropy"])
def test_exits(mode, impl, device):
    """Thresholds of their own for every row, at the score itself too."""
    h, weight, _ = head_of(20, 16, 500, device=device)
    s = logits(h, weight, softcap=8.0)
    p = s.softmax(-1).sort(-1, descending=True).values
    score = {
        "max_prob": p[:, 0],
        "margin": p[:, 0] - p[:, 1],
        "entropy": -(p * p.log()).sum(-1),
    }[mode]
    sign = -1 if mode == "entropy" else 1
    limit = score + torch.where(torch.arange(20) % 2 == 0, 0.01, -0.01) * sign
    got = head_exit(
        h, weight, softcap=8.0, mode=mode, threshold=limit.float().to(device), impl=impl
    )
    assert torch.equal(got.exits.cpu(), torch.arange(20) % 2 == 1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("impl", IMPLS)
def test_at_the_threshold(impl, device):
    """Exact scores: two tokens of probability 1/2, and one alone."""
    h, pair = torch.ones(1, 1, device=device), torch.zeros(2, 1, device=device)
    cases = {("max_prob", 0.5): True, ("margin", 0.0): False}
    for (mode, threshold), by_default in cases.items():
        for strict, leaves in ((None, by_default), (True, False), (False, True)):
            got = head_exit(h, pair, mode=mode, threshold=threshold, strict=strict, impl=impl)
            assert got.exits.item() == leaves, (mode, strict)
    for strict, leaves in ((None, True), (True, False), (False, True)):
        got = head_exit(h, pair[:1], mode="entropy", threshold=0.0, strict=strict, impl=impl)
        assert got.exits.item() == leaves


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.cpu
def test_a_row_has_its_bits_alone(dtype):
    """Whatever n, order, neighbours and threads."""
    h, weight, bias = head_of(140, 70, 3000, dtype)
    k = keys(140)
    options = {"bias": bias, "softcap": 20.0, "mode": "margin", "threshold": 0.1, "candidates": 30}

    def run(rows):
        return head_exit(h[rows], weight, temperature=0.8, keys=k[rows], **options)

    alone = {i: run(torch.tensor([i])) for i in (0, 63, 64, 139)}
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for rows in (torch.arange(140), torch.arange(139, -1, -1), torch.tensor([139, 5, 64])):
            got = run(rows)
            for i, one in alone.items():
                if i not in rows.tolist():
                    continue
                at = rows.tolist().index(i)
                for name in FIELDS:
                    assert torch.equal(getattr(got, name)[at], getattr(one, name)[0]), name


def test_many_candidates():
    h, weight, _ = head_of(3, 20, 5000)
    got = head_exit(h, weight, candidates=1024)
    s = h @ weight.T
    torch.testing.assert_close(got.values, s.topk(1024, -1).values, rtol=0, atol=off_of(h))
    constant = head_exit(torch.ones(1, 1), torch.ones(5000, 1), candidates=1024)
    assert torch.equal(constant.indices, torch.arange(1024).int().unsqueeze(0))
    ramp = head_exit(torch.ones(1, 1), torch.arange(5000.0).unsqueeze(1), candidates=1000)
    assert torch.equal(ramp.indices[0], torch.arange(4999, 3999, -1).int())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("impl", IMPLS)
def test_samples_follow_the_distribution(impl, device):
    """20,000 draws of 6 tokens at a temperature: chi-square below its 99.99 % point."""
    n, heat = 20000, 1.7
    weight = torch.tensor([[0.0], [1.0], [2.0], [-1.0], [0.5], [3.0]])
    rows = torch.stack([torch.full((n,), 11), torch.zeros(n).long(), torch.arange(n)], -1)
    got = head_exit(
        torch.ones(n, 1, device=device), weight.to(device), temperature=heat,
        keys=rows.to(device), impl=impl,
    )  # fmt: skip
    want = n * (weight.squeeze(-1) / heat).softmax(-1)
    counts = torch.bincount(got.samples.cpu().long(), minlength=6)
    assert ((counts - want).square() / want).sum() < 25.7


@pytest.mark.parametrize("device", DEVICES)
def test_samples_of_every_engine_agree(device):
    """Noise depends on seed, request and position, on every bit of them."""
    rows = torch.tensor(
        [[0, 0, 0], [1, 0, 0], [1 << 40, 0, 0], [0, 1, 0], [0, 1 << 40, 0], [0, 0, 1],
         [-1, -1, 2**31 - 1], [(1 << 63) - 1, -(1 << 63), 0]]
    )  # fmt: skip
    ids = torch.tensor([[0, 1, 2, 3, 4, 255999, 2**31 - 1]]).int().expand(8, -1)
    want = gumbel(ids, rows, impl="reference")
    got = gumbel(ids.to(device), rows.to(device))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double().cpu(), want, rtol=3e-6, atol=1e-6)
    assert len(set(want.flatten().tolist())) == want.numel()
    same = torch.tensor([[5, 0, 0], [5 - (1 << 63), 0, 0]])  # the low 63 bits of a seed
    first, second = gumbel(ids[:2].to(device), same.to(device))
    assert torch.equal(first, second)


def test_noise_is_gumbel():
    """Mean, variance and both tails of 200,000 of them."""
    ids = torch.arange(200_000).int().unsqueeze(0)
    g = gumbel(ids, torch.tensor([[5, 6, 7]])).double().flatten()
    assert g.mean().item() == pytest.approx(0.57722, abs=0.012)
    assert g.var().item() == pytest.approx(torch.pi**2 / 6, abs=0.04)
    for at in (-1.5, 0.0, 3.0, 8.0):
        share = 1 - torch.exp(-torch.exp(torch.tensor(-at))).item()
        assert (g > at).double().mean().item() == pytest.approx(
            share, abs=5 * (share / 200_000) ** 0.5
        )
    assert bool(g.isfinite().all())


def test_philox_words():
    """Known answers of Random123: counter and key of zeros, and of ones."""
    from gemma_ext.reference.random_numbers import philox

    zeros = torch.zeros(1, dtype=torch.int64)
    words = [int(w) for w in philox(zeros, [zeros] * 4)]
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    want = -(-torch.tensor([(0x6627E8D5 + 0.5) * 2.0**-32], dtype=torch.float64)).log1p()
    ids, key = torch.zeros(1, 1).int(), torch.zeros(1, 3).long()
    torch.testing.assert_close(gumbel(ids, key).double().flatten(), -want.log(), rtol=1e-6, atol=0)


def test_candidates_are_enough_to_sample():
    """Nothing left out: argmax of values / T + noise is the op's own sample."""
    h, weight, _ = head_of(50, 12, 60)
    k = keys(50)
    got = head_exit(h, weight, temperature=0.9, keys=k, candidates=60)
    score = got.values / 0.9 + gumbel(got.indices, k)
    chosen = got.indices.gather(-1, score.argmax(-1, keepdim=True)).squeeze(-1)
    assert torch.equal(chosen, got.samples)
    share = (got.values.double() / 0.9 - got.tempered.double().unsqueeze(-1)).exp().sum(-1)
    torch.testing.assert_close(share, torch.ones(50).double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_any_layout(device):
    h, weight, bias = head_of(6, 33, 300, device=device)
    want = head_exit(h, weight, bias=bias, candidates=5)
    wide = torch.randn(12, 80, device=device)
    wide[::2, 10:43] = h
    tall = torch.randn(300, 50, device=device)
    tall[:, 7:40] = weight
    for x, w in ((wide[::2, 10:43], tall[:, 7:40]), (h.T.contiguous().T, weight.T.contiguous().T)):
        got = head_exit(x, w, bias=bias.double().float(), candidates=5)
        for name in ("ids", "top", "lse", "entropy", "values", "indices"):
            assert torch.equal(getattr(got, name), getattr(want, name))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("impl", IMPLS)
def test_no_rows(impl, device):
    got = head_exit(
        torch.empty(0, 8, device=device), torch.randn(30, 8, device=device), mode="margin",
        threshold=0.1, temperature=1.0, keys=keys(0).to(device), candidates=3, impl=impl,
    )  # fmt: skip
    assert got.ids.shape == got.exits.shape == got.samples.shape == (0,)
    assert got.top.shape == (0, 2)
    assert got.indices.shape == (0, 3)


def test_float64_takes_the_formulas():
    h, weight, _ = head_of(4, 10, 30)
    got = head_exit(h.double(), weight.double(), candidates=30)
    assert got.lse.dtype == torch.float64
    assert_rows(got, logits(h, weight), off=1e-12)


H, W = torch.randn(2, 8), torch.randn(30, 8)
KEYS = keys(2)
MESSAGES = {
    "expected h to be [n, D], got [8]": lambda: head_exit(H[0], W),
    "expected weight to be [V, 8], got [30, 7]": lambda: head_exit(H, W[:, 1:]),
    "expected weight to have at least one row, got none": lambda: head_exit(H, W[:0]),
    "expected bias to be [30], got [29]": lambda: head_exit(H, W, bias=torch.ones(29)),
    "expected norm_weight to be [8], got [7]": lambda: head_exit(H, W, norm_weight=torch.ones(7)),
    "expected softcap to be None or positive, got 0": lambda: head_exit(H, W, softcap=0.0),
    "expected mode to be max_prob, margin or entropy, got 'kl'": lambda: head_exit(
        H, W, mode="kl", threshold=0.1
    ),
    "expected a threshold with mode='margin', got None": lambda: head_exit(H, W, mode="margin"),
    "expected a mode with threshold, got None": lambda: head_exit(H, W, threshold=0.1),
    "expected threshold to be [2], got [3]": lambda: head_exit(
        H, W, mode="margin", threshold=torch.ones(3)
    ),
    "expected temperature and keys together, got one of them": lambda: head_exit(
        H, W, temperature=1.0
    ),
    "expected temperature to be [2], got [1]": lambda: head_exit(
        H, W, temperature=torch.ones(1), keys=KEYS
    ),
    "expected keys to be [2, 3], got [2, 2]": lambda: head_exit(
        H, W, temperature=1.0, keys=KEYS[:, 1:]
    ),
    "expected candidates in [0, 1024], got 1025": lambda: head_exit(H, W, candidates=1025),
    "expected weight on meta, got it on cpu": lambda: head_exit(H.to("meta"), W),
    "expected impl to be 'auto' or 'reference', got 'x'": lambda: head_exit(H, W, impl="x"),
    "expected ids to be [n, C], got [3]": lambda: gumbel(torch.ones(3).int(), KEYS),
    "expected keys to be [1, 3], got [2, 3]": lambda: gumbel(torch.ones(1, 3).int(), KEYS),
}


@pytest.mark.parametrize("message", MESSAGES)
def test_what_does_not_fit(message):
    with pytest.raises(ValueError) as caught:
        MESSAGES[message]()
    assert message in str(caught.value)


def test_types_that_do_not_fit():
    with pytest.raises(TypeError, match=r"expected weight in torch\.float32, got it in"):
        head_exit(H, W.half())
    with pytest.raises(TypeError, match=r"expected keys in torch\.int64"):
        head_exit(H, W, temperature=1.0, keys=KEYS.int())
    with pytest.raises(TypeError, match=r"expected ids in torch\.int32"):
        gumbel(torch.ones(2, 3).long(), KEYS)


@pytest.mark.cpu
def test_ids_that_do_not_fit():
    with pytest.raises(RuntimeError, match=r"expected ids in \[0, 2147483647\), got -1 at 2"):
        gumbel(torch.tensor([[0, 0], [-1, 0]]).int(), KEYS)


def test_no_derivatives():
    h = H.clone().requires_grad_()
    with pytest.raises(NotImplementedError, match="has no derivative"):
        head_exit(h, W).lse.sum().backward()
    weight = W.double()
    wide = H.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda h: head_exit(h, weight).lse, (wide,))
