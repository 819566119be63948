"""Dots, the transpose, and nested errors against dense float64 formulas."""

from __future__ import annotations

import pytest
import torch
from sae_lists import DEVICES, DTYPES, FORMS, IDS, assert_close, dense, listed, problem, safe

from gemma_ext.ops.sae import (
    Codes,
    decode,
    decode_error,
    dots,
    encode_topk,
    nested_errors,
    scatter,
)

WIDTHS = [3, 4, 11, 30]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("form", FORMS)
def test_dots(form, dtype, device):
    p = problem((3, 7), 9, 30, 37, form=form, dtype=dtype)
    moved = p.to(device)
    got = dots(moved.codes, moved.weight, moved.rows)
    want = torch.zeros(p.codes.values.numel(), dtype=torch.float64)
    rows, w = p.rows.double().reshape(-1, 37), p.weight.double()
    for n, at, feature in listed(p.codes):
        want[at] = rows[n] @ w[feature]
    assert got.dtype == torch.float32
    assert_close(got, want.reshape(got.shape), 37)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("form", FORMS)
def test_scatter_is_the_transpose(form, dtype, device):
    p = problem(2500, 3, 9, 21, form=form, dtype=dtype, hot=4)
    moved = p.to(device)
    sums, totals = scatter(moved.codes, moved.rows)
    f = dense(p.codes, p.codes.values)
    assert sums.dtype == totals.dtype == torch.float32
    assert_close(sums, f.T @ p.rows.double(), 2500)
    assert_close(totals, f.sum(0), 2500)


@pytest.mark.parametrize("device", DEVICES)
def test_sums_over_tokens_alone(device):
    p = problem(40, 3, 9, 21).to(device)
    sums, totals = scatter(p.codes, p.rows[:, :0])
    assert sums.shape == (9, 0)
    assert torch.equal(totals, scatter(p.codes, p.rows)[1])


def test_transpose_identity():
    """<decode(f), g> = <f, dots> = <W, scatter(g)>."""
    p = problem(50, 5, 12, 20)
    left = (decode(p.codes, p.weight) * p.rows).sum()
    middle = (p.codes.values * dots(p.codes, p.weight, p.rows)).sum()
    right = (p.weight * scatter(p.codes, p.rows)[0]).sum()
    torch.testing.assert_close(left, middle)
    torch.testing.assert_close(left, right)


def test_products_have_no_gradient():
    p = problem(5, 3, 8, 6)
    leaves = p.leaves()
    codes = p.codes.with_values(leaves["values"])
    for impl in ("auto", "reference"):
        found = dots(codes, leaves["weight"], leaves["rows"], impl=impl)
        assert not any(x.requires_grad for x in (found, *scatter(codes, leaves["rows"], impl=impl)))


def run_nested(p, **options):
    leaves = p.leaves()
    codes = p.codes.with_values(leaves["values"])
    out = nested_errors(codes, leaves["weight"], leaves["bias"], leaves["rows"], **options)
    g = torch.Generator().manual_seed(5)
    upstream = torch.randn(out.shape, generator=g).to(out.device)
    grads = torch.autograd.grad(out, list(leaves.values()), upstream)
    return out, dict(zip(leaves, grads, strict=True)), upstream


def want_nested(p, levels, count, upstream):
    """Every prefix decoded on its own, in float64; `levels` by flat place."""
    n, w = p.codes.tokens, p.weight.double()
    x = p.rows.double().reshape(n, -1)
    squared, d_x = [], torch.zeros(n, count, x.shape[1], dtype=torch.float64)
    d_w, d_values = torch.zeros_like(w), torch.zeros(p.codes.values.numel(), dtype=torch.float64)
    for m in range(count):
        kept = [(t, at, f) for t, at, f in listed(p.codes) if levels[at] <= m]
        out = p.bias.double().expand(n, -1).clone()
        for t, at, feature in kept:
            out[t] += p.codes.values.reshape(-1)[at].double() * w[feature]
        r = out - x
        squared.append(r.square().sum(-1))
        slope = 2 * upstream.double().reshape(n, count)[:, m : m + 1] * r
        d_x[:, m] = slope
        for t, at, feature in kept:
            d_values[at] += slope[t] @ w[feature]
            d_w[feature] += p.codes.values.reshape(-1)[at].double() * slope[t]
    total = d_x.sum(1)
    grads = {
        "values": d_values.reshape(p.codes.values.shape),
        "weight": d_w,
        "bias": total.sum(0),
        "rows": -total.reshape(p.rows.shape),
    }
    stacked = torch.stack(squared, -1) if squared else torch.zeros(n, 0, dtype=torch.float64)
    return stacked.reshape(*p.codes.shape, count), grads


def width_levels(p, widths):
    levels = [0] * p.codes.values.numel()
    for _, at, feature in listed(p.codes):
        levels[at] = sum(feature >= w for w in widths)
    return levels


def place_levels(p):
    k = p.codes.values.shape[1]
    return [at % k if k else 0 for at in range(p.codes.values.numel())]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("n", "k", "width"), [((2, 5), 9, 21), (3, 20, 64), (1, 1, 1)])
def test_prefixes_of_a_dictionary(n, k, width, form, dtype, device):
    p = problem(n, k, 30, width, form=form, dtype=dtype)
    for widths in (WIDTHS, [30], [1, 7]):
        out, grads, upstream = run_nested(p.to(device), widths=widths)
        want, true = want_nested(p, width_levels(p, widths), len(widths), upstream.cpu())
        assert_close(out, want, 4 * k + width, f"squared {widths}")
        for name in true:
            assert_close(grads[name], true[name], 16 * k * len(widths) + width, name)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("form", ["padded", "counts"])
@pytest.mark.parametrize(("n", "k", "width"), [((2, 5), 9, 21), (3, 20, 64), (2, 0, 4)])
def test_prefixes_of_a_list(n, k, width, form, dtype, device):
    p = problem(n, k, 30, width, form=form, dtype=dtype)
    out, grads, upstream = run_nested(p.to(device), by="rank")
    want, true = want_nested(p, place_levels(p), k, upstream.cpu())
    assert_close(out, want, 4 * k + width)
    for name in true:
        assert_close(grads[name], true[name], 16 * k * k + width, name)


@pytest.mark.parametrize("options", [{"widths": WIDTHS}, {"by": "rank"}], ids=str)
def test_nested_blocks_of_tokens(options):
    """More tokens than a block holds: sums over tokens go on where the last block ended."""
    p = problem(1200, 8, 30, 700, hot=2)
    count = 4 if "widths" in options else 8
    out, grads, upstream = run_nested(p, **options)
    wide = p.wide()
    true = wide.leaves()
    codes = wide.codes.with_values(true["values"])
    rest = (true["weight"], true["bias"], true["rows"])
    want = nested_errors(codes, *rest, **options, impl="reference")
    assert_close(out, want, 8 * count)
    found = torch.autograd.grad(want, list(true.values()), upstream.double())
    for (name, g), x in zip(grads.items(), found, strict=True):
        assert_close(g, x, 1200 * count, name)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("width", "dtype", "unit_norm"),
    [(300, torch.float32, False), (264, torch.bfloat16, True)],
    ids=["fp32", "bf16"],
)
def test_nested_slices_of_columns(width, dtype, unit_norm, device):
    """More suffix sums than a card holds: the columns are taken in slices of 256."""
    p = problem(260, 3, 130, width, form="csr", dtype=dtype, hot=2)
    options = {"widths": list(range(2, 130, 2)), "unit_norm": unit_norm}
    out, grads, upstream = run_nested(p.to(device), **options)
    wide = p.wide()
    true = wide.leaves()
    codes = safe(wide.codes).with_values(torch.where(p.codes.mask, true["values"], 0.0))
    rest = (true["weight"], true["bias"], true["rows"])
    want = nested_errors(codes, *rest, **options, impl="reference")
    assert_close(out, want, 8 * width)
    found = torch.autograd.grad(want, list(true.values()), upstream.double().cpu())
    for (name, g), x in zip(grads.items(), found, strict=True):
        assert_close(g, x, 260 * 64, name)


def test_nested_bits_do_not_depend_on_threads():
    p = problem(300, 8, 30, 200, hot=2)
    results = []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        runs = [run_nested(p, **o) for o in ({"widths": WIDTHS}, {"by": "rank"})]
        results.append([x for out, grads, _ in runs for x in (out, *grads.values())])
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))


def test_projected_gradient_of_nested_errors():
    p = problem(20, 5, 30, 16)
    plain = run_nested(p, widths=WIDTHS)[1]["weight"]
    got = run_nested(p, widths=WIDTHS, unit_norm=True)[1]["weight"]
    unit = torch.nn.functional.normalize(p.weight, dim=-1)
    torch.testing.assert_close(got, plain - (plain * unit).sum(-1, keepdim=True) * unit)


def test_one_level_is_the_plain_error():
    """sae-kernels 12.5: Matryoshka of one level is BatchTopK, a list of one is TopK."""
    p = problem(20, 5, 30, 16)
    want = decode_error(p.codes, p.weight, p.bias, p.rows)[1]
    got = nested_errors(p.codes, p.weight, p.bias, p.rows, widths=[30])
    torch.testing.assert_close(got.squeeze(-1), want)
    ranks = nested_errors(p.codes, p.weight, p.bias, p.rows, by="rank")
    torch.testing.assert_close(ranks[:, -1], want)
    x = torch.randn(6, 16)
    one = encode_topk(x, p.weight, k=1, impl="reference").codes
    top = encode_topk(x, p.weight, k=5, impl="reference").codes
    alone = decode_error(one, p.weight, p.bias, x)[1]
    first = nested_errors(top, p.weight, p.bias, x, by="rank")[:, 0]
    torch.testing.assert_close(first, alone)


def test_a_level_that_nobody_is_in_repeats_the_one_before():
    indices = torch.tensor([[0, 9]], dtype=torch.int32)
    codes = Codes(torch.ones(1, 2), indices, None, torch.Size((1,)), 10)
    out = nested_errors(codes, torch.randn(10, 4), None, torch.randn(1, 4), widths=[2, 5, 9, 10])
    assert out[0, 0] == out[0, 1] == out[0, 2] != out[0, 3]


def test_gradcheck_of_the_reference():
    p = problem((2, 2), 3, 9, 4).wide()

    def call(values, weight, bias, rows):
        codes = p.codes.with_values(values)
        given = (codes, weight, bias, rows)
        ranks = nested_errors(*given, by="rank", impl="reference")
        return nested_errors(*given, widths=[2, 7], impl="reference"), ranks

    leaves = tuple(p.leaves().values())
    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


P = problem((2, 3), 4, 10, 12)
CSR = problem((2, 3), 4, 10, 12, form="csr")
MESSAGES = {
    "expected either widths or by='rank', got None and None": {},
    "expected either widths or by='rank', got [3] and 'rank'": {"widths": [3], "by": "rank"},
    "expected by to be 'rank', got 'value'": {"by": "value"},
    "expected widths to ascend from above 0, got [3, 3]": {"widths": [3, 3]},
    "expected widths to ascend from above 0, got [0, 3]": {"widths": [0, 3]},
    "expected widths to ascend from above 0, got []": {"widths": []},
    "expected widths up to 10, got 11": {"widths": [3, 11]},
}


@pytest.mark.parametrize("message", MESSAGES)
def test_levels_that_do_not_fit(message):
    with pytest.raises(ValueError) as caught:
        nested_errors(P.codes, P.weight, P.bias, P.rows, **MESSAGES[message])
    assert message in str(caught.value)


def test_other_arguments_that_do_not_fit():
    with pytest.raises(ValueError, match=r"expected codes \[N, K\] with by='rank'"):
        nested_errors(CSR.codes, P.weight, None, P.rows, by="rank")
    with pytest.raises(ValueError, match=r"expected target to be \[2, 3, 12\], got \[3, 12\]"):
        nested_errors(P.codes, P.weight, None, P.rows[0], by="rank")
    with pytest.raises(ValueError, match=r"expected rows to be \[2, 3, 12\], got \[2, 3, 11\]"):
        dots(P.codes, P.weight, P.rows[..., 1:])
    with pytest.raises(ValueError, match=r"expected rows to be \[2, 3, D\], got \[3, 12\]"):
        scatter(P.codes, P.rows[0])
    with pytest.raises(TypeError, match=r"expected rows to be float32, .* got torch.int64"):
        scatter(P.codes, P.rows.long())
