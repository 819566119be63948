"""Attention of mixed depths: values, and bits that nothing beside a row changes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from depth_pages import DEVICES, DTYPES, EPS, IDS, IMPLS, Problem, ints, mixed, problem

from gemma_ext.ops.depth_batching import PAGE, paged_attn_mixed_depth
from gemma_ext.testing import assert_close

LENGTHS = [1, 16, 37, 300, 530]  # a token, a page, odd, two and three splits


def attend(p: Problem, **options):
    return paged_attn_mixed_depth(p.q, p.pool, *p.places(), **options)


def by_hand(p: Problem, window=None, scale=None, softcap=None, sinks=0):
    """Float64, key by key, from the formula."""
    out = torch.zeros(p.q.shape, dtype=torch.float64)
    group = p.q.shape[1] // p.pool.shape[3]
    scale = p.q.shape[2] ** -0.5 if scale is None else scale
    for n, (r, last, j) in enumerate(p.columns()):
        if r < 0:
            continue
        reach = 0 if window is None else int(window[j])
        tokens = [t for t in range(last + 1) if reach == 0 or last - t < reach or t < sinks]
        for h in range(p.q.shape[1]):
            keys, values = (
                torch.stack(
                    [p.pool[p.depth_of[j], p.tables[r, t // PAGE], i, h // group, t % PAGE]
                     for t in tokens]
                ).double()
                for i in range(2)
            )  # fmt: skip
            scores = keys @ p.q[n, h].double() * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            out[n, h] = torch.softmax(scores, 0) @ values
    return out


OPTIONS = {
    "plain": {},
    "capped": {"softcap": 2.0, "scale": 0.7},
    "window": {"window": ints(0, 5, 260)},
    "both": {"window": ints(17, 0, 1), "softcap": 50.0, "scale": 0.25},
    "sinks": {"window": ints(3, 0, 20), "sinks": 4, "softcap": 3.0},
    "sinks of two splits": {"window": ints(1, 17, 270), "sinks": 261},
}


def moved(options, device):
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}


def tolerance(dtype, device):
    """Of results near 1: one rounding, and on a card weights of 16 bits, and exp2 within 2^-22."""
    if dtype != torch.float32:
        return 3 * EPS[dtype]
    return 2e-6 if device == "cpu" else 5e-6


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("impl", IMPLS)
def test_matches_the_formula(impl, options, dtype, device):
    p = problem(LENGTHS, mixed(LENGTHS, 3, 24), dtype=dtype)
    want = by_hand(p, **OPTIONS[options])
    got = attend(p.to(device), impl=impl, **moved(OPTIONS[options], device))
    assert got.dtype == dtype
    assert_close(got, want, rel=tolerance(dtype, device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize(
    ("heads", "width"),
    # one head, Gemma 2, all heads on one (Gemma 1 2B), an odd group, more heads than a block
    # takes, widths that no tile has
    [((1, 1), 64), ((8, 4), 256), ((4, 1), 96), ((8, 1), 128), ((6, 2), 80), ((24, 2), 64),
     ((2, 2), 24), ((3, 1), 37), ((2, 1), 1)],
)  # fmt: skip
def test_shapes(heads, width, dtype, device):
    lengths = [5, 90, 290]
    p = problem(lengths, mixed(lengths, 2, 9, 1), heads=heads, width=width, loops=2, dtype=dtype)
    options = {"softcap": 5.0, "window": ints(0, 70)}
    got = attend(p.to(device), **moved(options, device))
    assert_close(got, by_hand(p, **options), rel=tolerance(dtype, device))


def test_float64_takes_the_formulas():
    p = problem(LENGTHS, mixed(LENGTHS, 3, 12)).wide()
    assert_close(attend(p, softcap=3.0), by_hand(p, softcap=3.0), rel=1e-14)


def same_rows(dtype, impl, device, lengths=LENGTHS, count=40, **shape):
    options = moved({"window": ints(0, 40, 2), "softcap": 20.0, "sinks": 5}, device)
    p = problem(lengths, mixed(lengths, 3, count, 5), dtype=dtype, seed=3, **shape).to(device)
    return p, lambda other: attend(other, impl=impl, **options)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("impl", IMPLS)
def test_bits_do_not_depend_on_the_rows_beside(impl, dtype, device):
    p, run = same_rows(dtype, impl, device, width=64)
    whole = run(p)
    alone = torch.cat([run(p.rows([n])) for n in range(len(p.req))])
    assert torch.equal(whole, alone)
    order = torch.randperm(len(p.req), generator=torch.Generator().manual_seed(0))
    assert torch.equal(run(p.rows(order.to(device))), whole[order.to(device)])
    halves = torch.cat([run(p.rows(torch.arange(a, b))) for a, b in ((0, 13), (13, 40))])
    assert torch.equal(halves, whole)


@pytest.mark.parametrize("device", DEVICES)
def test_bits_do_not_depend_on_the_size_of_a_launch(device):
    """Enough rows for another kernel on a card, among them one chunk of 300."""
    rows = [(1, t, 0) for t in range(300)] + [(0, t % 37, 1) for t in range(30)]
    p = problem([37, 300], rows, dtype=torch.bfloat16, width=64, loops=2).to(device)
    whole = attend(p, softcap=20.0)
    for first, count in ((0, 7), (131, 20), (299, 31)):
        part = p.rows(torch.arange(first, first + count, device=device))
        assert torch.equal(attend(part, softcap=20.0), whole[first : first + count])


@pytest.mark.cpu
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
def test_bits_do_not_depend_on_threads(dtype):
    found = []
    for count in (40, 1):  # as whole rows and cut at the splits
        p, run = same_rows(dtype, "auto", "cpu", [600, 900], count)
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(run(p))
        assert torch.equal(found[-3], found[-2])
        assert torch.equal(found[-3], found[-1])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("impl", IMPLS)
def test_bits_do_not_depend_on_where_pages_lie(impl, device):
    p, run = same_rows(torch.float32, impl, device)
    order = torch.randperm(p.pool.shape[1], generator=torch.Generator().manual_seed(1)).to(device)
    pool = torch.empty_like(p.pool)
    pool[:, order] = p.pool
    known = p.tables < 2**30
    tables = torch.where(known, order[torch.where(known, p.tables, 0).long()], p.tables)
    assert torch.equal(run(replace(p, pool=pool, tables=tables.to(torch.int32))), run(p))


@pytest.mark.parametrize("impl", IMPLS)
def test_later_tokens_are_not_read(impl):
    """Causality, also inside a chunk: NaN behind a row stays behind it."""
    rows = [(0, t, 0) for t in range(20, 60)]
    p = problem([60], rows, width=64)
    before = attend(p, impl=impl)
    poisoned = p.pool.clone()
    for t in range(41, 60):
        poisoned[:, p.tables[0, t // PAGE], :, :, t % PAGE] = float("nan")
    after = attend(replace(p, pool=poisoned), impl=impl)
    assert torch.equal(after[:21], before[:21])
    assert after[21:].isnan().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_nan_among_the_keys_is_told(softcap, impl, dtype, device):
    """Of a token, and of all tokens of a split, whose scores have no maximum."""
    p = problem([600, 30], [(0, 599, 0), (0, 255, 1), (1, 29, 0)], dtype=dtype, width=64)
    clean = attend(p.to(device), softcap=softcap, impl=impl)
    assert clean.isfinite().all()
    for begin, end in ((7, 8), (0, 256), (256, 512), (512, 600), (0, 600)):
        pool = p.pool.clone()
        for t in range(begin, end):
            pool[:, p.tables[0, t // PAGE], 0, :, t % PAGE] = float("nan")
        got = attend(replace(p, pool=pool).to(device), softcap=softcap, impl=impl)
        assert got[0].isnan().all()
        assert got[1].isnan().all() if begin < 256 else torch.equal(got[1], clean[1])
        assert torch.equal(got[2], clean[2])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("impl", IMPLS)
def test_a_split_of_infinitely_small_scores_is_none(impl, dtype, device):
    p = problem([600], [(0, 599, 0)], dtype=dtype, width=64)
    p = replace(p, q=p.q.abs())
    for begin, end in ((0, 256), (256, 512), (512, 600)):
        pool = p.pool.clone()
        for t in range(begin, end):
            pool[:, p.tables[0, t // PAGE], 0, :, t % PAGE] = -torch.inf
        small = replace(p, pool=pool)
        got = attend(small.to(device), impl=impl)
        assert_close(got, by_hand(small), rel=tolerance(dtype, device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("impl", IMPLS)
def test_tokens_between_sinks_and_window_are_not_read(impl, dtype, device):
    """Windows of one chunk that move over the border of a split, and NaN between."""
    rows = [(0, t, 0) for t in range(290, 330)]
    p = problem([330], rows, dtype=dtype, width=64).to(device)
    options = {"window": ints(30, 0, 0).to(device), "sinks": 5, "impl": impl}
    before = attend(p, **options)
    poisoned = p.pool.clone()
    for t in range(5, 261):
        poisoned[:, p.tables[0, t // PAGE], :, :, t % PAGE] = float("nan")
    assert torch.equal(attend(replace(p, pool=poisoned), **options), before)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("impl", IMPLS)
def test_a_window_of_one_is_the_token_itself(impl, device):
    p = problem([40], [(0, 7, 0), (0, 39, 1)], loops=2).to(device)
    got = attend(p, window=ints(1, 1).to(device), impl=impl)
    for n in range(2):
        place = p.depth_of[n], p.tables[0, p.pos[n] // PAGE], 1, slice(None), p.pos[n] % PAGE
        assert torch.equal(got[n], p.pool[place].repeat_interleave(2, 0))


@pytest.mark.parametrize("impl", IMPLS)
def test_equal_scores_give_the_mean(impl):
    p = problem([50], [(0, 49, 0)])
    got = attend(replace(p, q=torch.zeros_like(p.q)), impl=impl)
    pages = p.pool[p.depth_of[0], p.tables[0, :4].long(), 1]
    mean = pages.transpose(0, 1).reshape(2, 64, 32)[:, :50].mean(1)
    torch.testing.assert_close(got[0], mean.repeat_interleave(2, 0))


@pytest.mark.parametrize("impl", IMPLS)
def test_large_scores_are_capped(impl):
    p = problem([33], [(0, 32, 0)])
    big = replace(p, q=p.q * 1e4)
    assert_close(attend(big, softcap=50.0, impl=impl), by_hand(big, softcap=50.0), rel=1e-5)
    assert attend(big, impl=impl).isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("impl", IMPLS)
def test_rows_that_fill_up_are_zero(impl, device):
    p = problem([9], [(-1, 0, 0), (0, 8, 1), (-1, 70, 99)]).to(device)
    got = attend(p, impl=impl)
    assert torch.equal(got[[0, 2]], torch.zeros_like(got[:2]))
    assert torch.equal(got[1:2], attend(p.rows([1]), impl=impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_no_row(impl):
    p = problem([9], [(0, 8, 1)]).rows([])
    assert attend(p, impl=impl).shape == (0, 4, 32)


@pytest.mark.parametrize("impl", IMPLS)
def test_queries_of_a_fused_projection(impl):
    p = problem([70], [(0, 3, 0), (0, 69, 1)])
    fused = torch.randn(2, 8 * 32)
    strided = fused[:, :128].unflatten(1, (4, 32))
    across = fused.reshape(2, 32, 8).transpose(1, 2)[:, :4]
    for q in (strided, across):
        assert not q.is_contiguous()
        got = attend(replace(p, q=q), impl=impl)
        assert torch.equal(got, attend(replace(p, q=q.contiguous()), impl=impl))


P = problem([20], [(0, 3, 0), (0, 19, 1)])
CALLS = {
    "expected kv_pool to be [L, pages, 2, n_kv, 16, hd], got [4, 2, 2, 16, 32]": {
        "pool": P.pool[0]
    },
    "expected kv_pool to be contiguous: it is written in place": {
        "pool": P.pool.transpose(0, 1).contiguous().transpose(0, 1)
    },
    "expected q to be [2, n_q, 32], got [2, 4, 31]": {"q": P.q[..., 1:]},
    "expected q on cpu, got it on meta": {"q": P.q.to("meta")},
    "expected heads of q in multiples of 2, got 3": {"q": P.q[:, :3]},
    "expected row_pos to be [2], got [1]": {"pos": P.pos[:1]},
    "expected row_loop to be [2], got [3]": {"loop": ints(0, 0, 0)},
    "expected block_tables to be [R, max_pages], got [3]": {"tables": P.tables[0]},
}


@pytest.mark.parametrize("message", CALLS)
def test_calls_that_do_not_fit(message):
    with pytest.raises(ValueError) as caught:
        attend(replace(P, **CALLS[message]))
    assert str(caught.value) == message


def test_options_that_do_not_fit():
    with pytest.raises(ValueError, match=r"expected window to be \[3\], got \[2\]"):
        attend(P, window=ints(0, 0))
    with pytest.raises(ValueError, match=r"expected softcap to be positive, got 0\.0"):
        attend(P, softcap=0.0)
    with pytest.raises(ValueError, match="expected sinks to be at least 0, got -1"):
        attend(P, sinks=-1)
    with pytest.raises(ValueError, match="expected impl to be 'auto' or 'reference', got 'x'"):
        attend(P, impl="x")
    with pytest.raises(TypeError, match=r"expected q in torch\.float32, got it in torch\.float16"):
        attend(replace(P, q=P.q.half()))
    with pytest.raises(TypeError, match=r"expected row_req to be int32, got torch\.int64"):
        attend(replace(P, req=P.req.long()))
    with pytest.raises(TypeError, match=r"expected kv_pool to be float32, .* got torch\.int32"):
        attend(replace(P, pool=P.pool.int()))


NUMBERS = {
    "row_req in [-1, 1), got 1 at 1": {"req": ints(0, 1)},
    "row_req in [-1, 1), got -2 at 0": {"req": ints(-2, 0)},
    "row_pos in [0, 48), got 48 at 1": {"pos": ints(3, 48)},
    "row_pos in [0, 48), got -1 at 0": {"pos": ints(-1, 3)},
    "row_loop in [0, 3), got 3 at 0": {"loop": ints(3, 0)},
    "depth_of in [0, 5), got 5 at 2": {"depth_of": ints(0, 1, 5)},
    f"block_tables in [0, 4), got {2**30} at 2": {"pos": ints(3, 33)},
}


@pytest.mark.cpu
@pytest.mark.parametrize("message", NUMBERS)
def test_numbers_that_lead_out_of_the_tensors(message):
    with pytest.raises(RuntimeError) as caught:
        attend(replace(P, **NUMBERS[message]))
    assert f"paged_attn_mixed_depth: expected {message}" in str(caught.value)
