"""Which entries the encoders choose, and what they return of them."""

from __future__ import annotations

import pytest
import torch
from sae_encoders import DEVICES, DTYPES, IDS, IMPLS, check, positions, problem, topk

from gemma_ext.ops.sae import (
    encode_batch_topk,
    encode_group_max,
    encode_threshold,
    encode_topk,
)

# one of everything; a row; fewer features than a vector; not a multiple of a tile, of a slice, of a
# block of rows; a width over one block of the product, and one more; more features than two tiles
SHAPES = [(1, 1, 1), (1, 7, 300), (3, 40, 9), (29, 33, 517), (130, 257, 1030), (257, 5, 256)]


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(params=IMPLS)
def impl(request):
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("by", ["value", "magnitude"])
def test_topk(shape, dtype, by, device, impl):
    q = problem(*shape, dtype=dtype, device=device)
    features, score = shape[2], q.p.abs() if by == "magnitude" else q.p
    for k in sorted({1, max(1, features // 7), features}):
        got = encode_topk(q.x, q.weight, q.bias, k=k, by=by, impl=impl)
        check(got.codes, q.p, topk(score, k))
        assert got.aux is None
        assert got.min_positive is None
    k = max(1, features // 9)
    got = encode_topk(q.x, q.weight, q.bias, k=k, by=by, scale=q.scale, aux=(q.mask, k), impl=impl)
    check(got.codes, q.p, topk(score * q.scale.cpu(), k))
    check(got.aux, q.p, topk(q.p * q.scale.cpu(), k, q.mask.cpu()))


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_group_max(shape, dtype, device, impl):
    q = problem(*shape, dtype=dtype, device=device)
    features = shape[2]
    for groups in [g for g in range(1, features + 1) if features % g == 0]:
        got = encode_group_max(q.x, q.weight, q.bias, groups=groups, impl=impl)
        parts = q.p.view(shape[0], groups, -1)
        size = parts.shape[2]
        first = [[g * size + r.index(max(r)) for g, r in enumerate(row)] for row in parts.tolist()]
        check(got, q.p, first)


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_batch_topk(shape, dtype, device, impl):
    q = problem(*shape, dtype=dtype, device=device)
    n, _, features = shape
    for scale in (None, q.scale):
        score = q.p if scale is None else q.p * scale.cpu()
        order = topk(score.reshape(1, -1).where(score.reshape(1, -1) > 0, -1.0), n * features)[0]
        positive = int((score > 0).sum())
        for total in sorted({0, 1, n * max(1, features // 20), n * features}):
            got = encode_batch_topk(
                q.x, q.weight, q.bias, total=total, scale=scale, aux=(q.mask, 1), impl=impl
            )
            chosen = order[: min(total, positive)]
            rows = [[] for _ in range(n)]
            for at in sorted(chosen):
                rows[at // features].append(at % features)
            check(got.codes, q.p, rows)
            assert got.codes.values.shape == (total,)
            least = min((score.flatten()[at] for at in chosen), default=torch.inf)
            assert got.min_positive == least
            assert got.min_positive.shape == ()
            check(got.aux, q.p, topk(score, 1, q.mask.cpu()))


@pytest.mark.parametrize("inclusive", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_threshold(shape, dtype, inclusive, device, impl):
    q = problem(*shape, dtype=dtype, device=device)
    limits = torch.randint(-2, 9, (shape[2],), generator=torch.Generator().manual_seed(1))
    for threshold, scale, margin in (
        (2.0, None, 0.0),
        (limits.float().to(device), q.scale, 0.5),
        (torch.tensor(1.0), None, limits.float().to(device)),
    ):
        score = q.p if scale is None else q.p * scale.cpu()
        limit = torch.as_tensor(threshold).cpu() - torch.as_tensor(margin).cpu()
        above = score >= limit if inclusive else score > limit
        want = [row.nonzero().flatten().tolist() for row in above]
        options = {"threshold": threshold, "scale": scale, "margin": margin}
        options |= {"inclusive": inclusive, "aux": (q.mask, 1), "impl": impl}
        got = encode_threshold(q.x, q.weight, q.bias, **options)
        check(got.codes, q.p, want)
        assert got.codes.values.shape == (int(above.sum()),)
        check(got.aux, q.p, topk(score, 1, q.mask.cpu()))
        most = max(1, int(above.sum(-1).max()))
        padded = encode_threshold(q.x, q.weight, q.bias, capacity=most, **options)
        check(padded.codes, q.p, want)
        assert padded.codes.values.shape == (shape[0], most)


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
def test_normal_numbers_are_chosen_within_rounding(dtype, device):
    # oracle of selection: nothing unselected is above what is selected by more than the sums round
    q = problem(70, 517, 2100, dtype=dtype, exact=False, device=device)
    k, p = 64, q.p
    codes = encode_topk(q.x, q.weight, q.bias, k=k).codes
    chosen = torch.zeros_like(p, dtype=torch.bool).scatter_(1, codes.indices.cpu().long(), True)
    assert (chosen.sum(-1) == k).all()
    least = p.masked_fill(~chosen, torch.inf).amin(-1)
    rest = p.masked_fill(chosen, -torch.inf).amax(-1)
    tolerance = 2.0**-24 * 517**0.5 * 8
    assert ((rest - least) <= tolerance).all()
    values = codes.values.cpu()
    assert (values.diff(dim=-1) <= 0).all()
    torch.testing.assert_close(
        values.double(), p.gather(1, codes.indices.cpu().long()), rtol=0, atol=tolerance
    )


def test_a_short_list_begins_a_longer_one(device, impl):
    q = problem(13, 20, 400, exact=False, device=device)
    long = encode_topk(q.x, q.weight, q.bias, k=64, impl=impl).codes
    short = encode_topk(q.x, q.weight, q.bias, k=16, impl=impl).codes
    assert torch.equal(long.indices[:, :16], short.indices)
    assert torch.equal(long.values[:, :16], short.values)


def test_equal_scores_go_by_the_lower_feature(device, impl):
    # more ties than a list holds before it is first shortened
    x, weight = torch.ones(2, 3, device=device), torch.ones(5000, 3, device=device)
    weight[[4990, 17]] = 2.0
    got = encode_topk(x, weight, k=5, impl=impl).codes
    assert positions(got) == [[17, 4990, 0, 1, 2]] * 2
    got = encode_batch_topk(x, weight, total=7, impl=impl).codes
    assert positions(got) == [[0, 1, 2, 17, 4990], [17, 4990]]
    got = encode_group_max(x, weight, groups=2, impl=impl)
    assert positions(got) == [[17, 4990]] * 2
    assert positions(encode_group_max(x[:1], weight, groups=2500, impl=impl))[0][:10] == [
        *range(0, 16, 2),
        17,
        18,
    ]


def test_minus_zero_equals_zero(device, impl):
    # bias makes p = -0 and 0 in turn
    weight = torch.zeros(40, 2, device=device)
    bias = torch.zeros(40, device=device)
    bias[::2] = -0.0
    x = torch.zeros(1, 2, device=device)
    for by in ("value", "magnitude"):
        got = encode_topk(x, weight, bias, k=6, by=by, impl=impl).codes
        assert positions(got) == [[0, 1, 2, 3, 4, 5]]
    assert positions(encode_group_max(x, weight, bias, groups=1, impl=impl)) == [[0]]
    assert positions(encode_batch_topk(x, weight, bias, total=5, impl=impl).codes) == [[]]
    strict = encode_threshold(x, weight, bias, threshold=0.0, impl=impl).codes
    assert positions(strict) == [[]]
    both = encode_threshold(x, weight, bias, threshold=-0.0, inclusive=True, impl=impl).codes
    assert positions(both) == [list(range(40))]


def test_a_nan_poisons_its_own_row_and_is_seen(device, impl):
    q = problem(5, 8, 700, device=device)
    clean = [
        encode_topk(q.x, q.weight, q.bias, k=9, impl=impl).codes,
        encode_group_max(q.x, q.weight, q.bias, groups=7, impl=impl),
        encode_threshold(q.x, q.weight, q.bias, threshold=3.0, impl=impl).codes,
    ]
    q.x[2, 3] = torch.nan
    found = [
        encode_topk(q.x, q.weight, q.bias, k=9, impl=impl).codes,
        encode_group_max(q.x, q.weight, q.bias, groups=7, impl=impl),
        encode_threshold(q.x, q.weight, q.bias, threshold=3.0, impl=impl).codes,
    ]
    want = [list(range(9)), list(range(0, 700, 100)), [0]]
    for before, after, listed in zip(clean, found, want, strict=True):
        rows = positions(before)
        rows[2] = listed
        assert positions(after) == rows
        mine = after.rows() == 2
        assert after.values[mine].isnan().all()
        assert not after.values[~mine].isnan().any()


def test_a_nan_takes_one_place_of_a_batch(device, impl):
    q = problem(4, 6, 900, device=device)
    q.x[1, 0] = torch.nan
    total = 50
    got = encode_batch_topk(q.x, q.weight, q.bias, total=total, impl=impl)
    rest = encode_batch_topk(q.x[[0, 2, 3]], q.weight, q.bias, total=total - 1, impl=impl)
    others = positions(rest.codes)
    assert positions(got.codes) == [others[0], [0], *others[1:]]
    assert got.min_positive == rest.min_positive
    assert int(got.codes.values.isnan().sum()) == 1


def test_infinities_are_the_best_and_the_worst(device, impl):
    weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]], device=device)
    x = torch.tensor([[torch.inf, 2.0]], device=device)
    # p = inf + 0 * 2, -inf, inf * 0 = NaN
    assert positions(encode_topk(x, weight, k=3, impl=impl).codes) == [[2, 0, 1]]
    bias = torch.tensor([0.0, -torch.inf, torch.inf], device=device)
    x = torch.ones(1, 2, device=device)
    got = encode_topk(x, weight, bias, k=3, impl=impl).codes
    assert positions(got) == [[2, 0, 1]]
    assert got.values.tolist() == [[torch.inf, 1.0, -torch.inf]]
    assert positions(encode_batch_topk(x, weight, bias, total=1, impl=impl).codes) == [[2]]


def test_mass_on_one_row_takes_the_whole_batch(device, impl):
    x = torch.zeros(6, 4, device=device)
    x[4] = 1.0
    weight = torch.arange(1.0, 301.0, device=device).unsqueeze(-1).expand(-1, 4)
    got = encode_batch_topk(x, weight, total=6 * 7, impl=impl)
    assert positions(got.codes) == [[], [], [], [], list(range(258, 300)), []]
    assert got.min_positive == 4 * 259


def test_batch_topk_of_permuted_rows_is_topk(device, impl):
    g = torch.Generator().manual_seed(0)
    # D = F and weight = 1: p is x
    x = torch.stack([torch.randperm(64, generator=g) - 20.0 for _ in range(9)]).to(device)
    weight = torch.eye(64, device=device)
    batch = encode_batch_topk(x, weight, total=9 * 5, impl=impl).codes
    rows = encode_topk(x, weight, k=5, impl=impl).codes
    assert positions(batch) == [sorted(row) for row in positions(rows)]


def test_an_aux_list_longer_than_its_mask(device, impl):
    q = problem(3, 4, 50, device=device)
    mask = torch.zeros(50, dtype=torch.bool, device=device)
    for dead in ([], [7], [3, 44]):
        mask.zero_()
        mask[dead] = True
        aux = encode_topk(q.x, q.weight, q.bias, k=2, aux=(mask, 5), impl=impl).aux
        check(aux, q.p, topk(q.p, 5, mask.cpu()))
        assert aux.count.tolist() == [len(dead)] * 3


def test_no_tokens(impl):
    x, weight = torch.empty(2, 0, 4), torch.ones(6, 4)
    mask = torch.ones(6, dtype=torch.bool)
    got = encode_topk(x, weight, k=3, aux=(mask, 2), impl=impl)
    assert got.codes.values.shape == (0, 3)
    assert got.aux.values.shape == (0, 2)
    assert got.codes.shape == (2, 0)
    assert got.codes.dense().shape == (2, 0, 6)
    assert encode_group_max(x, weight, groups=2, impl=impl).values.shape == (0, 2)
    batch = encode_batch_topk(x, weight, total=0, impl=impl)
    assert batch.codes.offsets.tolist() == [0]
    assert batch.min_positive == torch.inf
    above = encode_threshold(x, weight, threshold=0.0, impl=impl).codes
    assert above.offsets.tolist() == [0]
    assert above.values.shape == (0,)
    assert (
        encode_threshold(x, weight, threshold=0.0, capacity=2, impl=impl).codes.count.numel() == 0
    )


def test_no_width(impl):
    bias = torch.tensor([1.0, 3.0, 2.0])
    got = encode_topk(torch.empty(2, 0), torch.empty(3, 0), bias, k=2, impl=impl).codes
    assert positions(got) == [[1, 2]] * 2
    assert got.values.tolist() == [[3.0, 2.0]] * 2


def test_scaling_the_input_scales_the_values(device):
    q = problem(9, 30, 300, exact=False, device=device)
    one = encode_topk(q.x, q.weight, q.bias, k=20).codes
    two = encode_topk(4 * q.x, q.weight, 4 * q.bias, k=20).codes
    assert torch.equal(one.indices, two.indices)
    assert torch.equal(4 * one.values, two.values)


def test_norms_in_the_scale_are_norms_in_the_weight(device):
    q = problem(9, 30, 300, exact=False, device=device)
    scaled = encode_topk(q.x, q.weight, q.bias, k=20, scale=q.scale).codes
    folded = encode_topk(q.x, q.weight * q.scale.unsqueeze(-1), q.bias * q.scale, k=20).codes
    assert torch.equal(scaled.indices, folded.indices)
    norms = q.scale[scaled.indices.long()]
    assert torch.equal(scaled.values * norms, folded.values)


def test_a_margin_lists_the_window_of_the_estimator(device):
    q = problem(20, 30, 300, exact=False, device=device)
    inside = encode_threshold(q.x, q.weight, q.bias, threshold=1.0, margin=0.25).codes
    p = q.p
    assert positions(inside) == [r.nonzero().flatten().tolist() for r in p > 0.75]
    active = torch.relu(inside.values) * (inside.values > 1.0)
    dense = inside.with_values(active).dense().cpu().double()
    torch.testing.assert_close(dense, p * (p > 1.0), rtol=0, atol=1e-5)
