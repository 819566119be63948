"""Decode and its error: values and gradients against dense float64 products, and promises."""

from __future__ import annotations

import pytest
import torch
from sae_lists import DEVICES, DTYPES, FORMS, IDS, assert_close, dense, listed, problem, safe

from gemma_ext.ops.sae import Codes, decode, decode_error, encode_topk

# one of everything; odd; around eight rows in flight, a vector of 16 and a chunk of 1024 tokens
SIZES = [(1, 1, 1, 1), (7, 5, 30, 11), (33, 17, 50, 37), (20, 9, 12, 130), (5, 0, 4, 8)]


def run(p, fn, **options):
    """Outputs of `fn` and gradients of everything under fixed upstream gradients."""
    leaves = p.leaves()
    codes = p.codes.with_values(leaves["values"])
    outs = fn(codes, leaves["weight"], leaves["bias"], leaves["rows"], **options)
    outs = outs if isinstance(outs, tuple) else (outs,)
    g = torch.Generator().manual_seed(5)
    upstream = [torch.randn(o.shape, generator=g).to(o.dtype).to(o.device) for o in outs]
    grads = torch.autograd.grad(outs, list(leaves.values()), upstream, allow_unused=True)
    return outs, dict(zip(leaves, grads, strict=True)), upstream


def plain_decode(codes, weight, bias, rows, **options):
    return decode(codes, weight, bias, **options)


def want_decode(p, upstream):
    f, g = dense(p.codes, p.codes.values), upstream.double().reshape(p.codes.tokens, -1)
    w = p.weight.double()
    out = f @ w + p.bias.double()
    d_values = torch.zeros(p.codes.values.numel(), dtype=torch.float64)
    for n, at, feature in listed(p.codes):
        d_values[at] = g[n] @ w[feature]
    grads = {
        "values": d_values.reshape(p.codes.values.shape),
        "weight": f.T @ g,
        "bias": g.sum(0),
    }
    return out.reshape(*p.codes.shape, -1), grads


def projected(grad, weight):
    unit = torch.nn.functional.normalize(weight.double(), dim=-1)
    return grad - (grad * unit).sum(-1, keepdim=True) * unit


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("n", "k", "features", "width"), SIZES)
def test_decode_matches_dense_float64(n, k, features, width, form, dtype, device):
    p = problem(n, k, features, width, form=form, dtype=dtype)
    (out,), grads, (upstream,) = run(p.to(device), plain_decode)
    want, want_grads = want_decode(p, upstream.cpu())
    assert out.dtype == dtype
    assert_close(out, want, k, "out")
    for name, terms in (("values", width), ("weight", n * k), ("bias", n)):
        assert_close(grads[name], want_grads[name], terms, name)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", FORMS)
def test_features_with_more_tokens_than_a_part(form, device):
    p = problem(2500, 3, 9, 21, form=form, hot=4)
    (_, grads, (upstream,)) = run(p.to(device), plain_decode)
    want = want_decode(p, upstream.cpu())[1]
    for name, terms in (("values", 21), ("weight", 2500), ("bias", 2500)):
        assert_close(grads[name], want[name], terms, name)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("form", FORMS)
def test_error_matches_dense_float64(form, dtype, device):
    p = problem((3, 5), 6, 20, 19, form=form, dtype=dtype)
    (residual, squared), grads, (g_r, g_s) = run(p.to(device), decode_error)
    g_r, g_s = (g.cpu().double().reshape(p.codes.tokens, -1) for g in (g_r, g_s))
    f, w = dense(p.codes, p.codes.values), p.weight.double()
    rows = p.rows.double().reshape(-1, 19)
    want = rows - f @ w - p.bias.double()
    assert residual.dtype == dtype
    assert squared.dtype == torch.float32
    assert_close(residual, want.reshape(p.rows.shape), 6, "residual")
    assert_close(squared, want.square().sum(-1).reshape(3, 5), 25, "squared")
    slope = g_r + 2 * g_s * want  # d loss / d residual
    size = 2.0**-7 if dtype == torch.bfloat16 else 2.0**-10 if dtype == torch.float16 else 1e-6
    wanted = {"rows": slope.reshape(p.rows.shape), "bias": -slope.sum(0), "weight": -f.T @ slope}
    d_values = torch.zeros(p.codes.values.numel(), dtype=torch.float64)
    for n, at, feature in listed(p.codes):
        d_values[at] = -slope[n] @ w[feature]
    wanted["values"] = d_values.reshape(p.codes.values.shape)
    for name, true in wanted.items():  # the residual that the gradient is of is rounded
        error = (grads[name].cpu().double() - true).abs().max()
        assert error <= 3 * size * true.abs().max(), name


@pytest.mark.parametrize("wanted", ["residual", "squared", "neither"])
def test_gradient_of_one_output_alone(wanted):
    p = problem(9, 4, 12, 10)
    leaves = p.leaves()
    out = decode_error(
        p.codes.with_values(leaves["values"]), leaves["weight"], leaves["bias"], leaves["rows"]
    )
    wide = p.wide()
    true = wide.leaves()
    want = decode_error(
        wide.codes.with_values(true["values"]),
        true["weight"],
        true["bias"],
        true["rows"],
        impl="reference",
    )
    if wanted == "neither":
        loss, true_loss = out[0].sum() * 0 + out[1].sum() * 0, want[0].sum() * 0
    else:
        at = ("residual", "squared").index(wanted)
        upstream = torch.linspace(-1, 1, out[at].numel()).reshape(out[at].shape)
        loss, true_loss = (out[at] * upstream).sum(), (want[at] * upstream).sum()
    got = torch.autograd.grad(loss, list(leaves.values()))
    for x, y in zip(got, torch.autograd.grad(true_loss, list(true.values())), strict=True):
        assert_close(x, y, 200)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
def test_projected_gradient_has_no_parallel_part(dtype, device):
    p = problem(40, 6, 15, 33, dtype=dtype)
    p.weight[3] = 0
    p.codes.indices[0, 0] = 3
    _, grads, (upstream,) = run(p.to(device), plain_decode, unit_norm=True)
    want = projected(want_decode(p, upstream.cpu())[1]["weight"], p.weight)
    assert_close(grads["weight"], want, 40)
    assert want[3].abs().max() > 0  # a row of zeros is parallel to nothing


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("unit_norm", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_row_sparse_gradient_is_the_dense_one(form, unit_norm, impl, device):
    p = problem(12, 4, 300, 21, form=form).to(device)
    if impl == "reference":
        p.codes = safe(p.codes)
    _, want, _ = run(p, plain_decode, unit_norm=unit_norm, impl=impl)
    _, got, _ = run(p, plain_decode, unit_norm=unit_norm, sparse_grad=True, impl=impl)
    sparse = got["weight"]
    assert sparse.is_sparse
    assert sparse.is_coalesced()
    touched = sorted({feature for _, _, feature in listed(p.codes)})
    assert sparse.indices().squeeze(0).tolist() == touched
    assert torch.equal(sparse.to_dense(), want["weight"])


def test_row_sparse_gradients_go_through_an_optimizer():
    p = problem(12, 4, 300, 21)
    dense_weight, weight = (torch.nn.Parameter(p.weight.clone()) for _ in range(2))
    decode(p.codes, weight, sparse_grad=True).square().sum().backward()
    decode(p.codes, dense_weight).square().sum().backward()
    torch.optim.SGD([weight], lr=0.1).step()
    torch.optim.SGD([dense_weight], lr=0.1).step()
    torch.testing.assert_close(weight, dense_weight)


@pytest.mark.parametrize("device", DEVICES)
def test_a_token_without_entries_is_the_bias_exactly(device):
    p = problem(4, 3, 10, 19).to(device)
    p.codes.values[1:3] = 0
    out = decode(p.codes, p.weight, p.bias)
    assert torch.equal(out[1], p.bias)
    offsets = torch.tensor([0, 2, 2, 2], device=device)
    empty = Codes(
        torch.ones(2, device=device), p.codes.indices[0, :2], offsets, torch.Size((3,)), 10
    )
    assert torch.equal(decode(empty, p.weight, p.bias)[1:], p.bias.expand(2, 19))
    assert not decode(empty, p.weight)[1:].any()


def test_repeated_indices_add():
    w = torch.randn(5, 9)
    indices = torch.tensor([[3, 3, 3]], dtype=torch.int32)
    codes = Codes(torch.tensor([[1.0, 2.0, 0.5]]), indices, None, torch.Size((1,)), 5)
    torch.testing.assert_close(decode(codes, w), 3.5 * w[3:4])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
def test_padded_and_csr_have_the_same_bits(dtype, device):
    p = problem(50, 7, 13, 45, dtype=dtype, hot=2).to(device)
    steps = torch.arange(51, device=device) * 7
    flat = Codes(p.codes.values.flatten(), p.codes.indices.flatten(), steps, p.codes.shape, 13)
    full = Codes(
        p.codes.values,
        p.codes.indices,
        None,
        p.codes.shape,
        13,
        torch.full((50,), 7, device=device),
    )
    want, grads, _ = run(p, decode_error)
    for codes in (flat, full):
        p.codes = codes
        got, found, _ = run(p, decode_error)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        for name, g in grads.items():
            assert torch.equal(found[name].flatten(), g.flatten()), name


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
def test_any_number_of_threads_and_any_run_have_the_same_bits(dtype):
    p = problem(1500, 6, 40, 67, dtype=dtype, hot=7)
    results = []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        outs, grads, _ = run(p, decode_error, unit_norm=True)
        results.append([*outs, *grads.values()])
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))


@pytest.mark.cpu
def test_gradients_do_not_depend_on_who_else_wants_one():
    p = problem(30, 6, 12, 67, hot=7)
    _, everything, _ = run(p, plain_decode)
    for name in ("values", "weight", "bias"):
        leaves = {n: x.detach().requires_grad_(n == name) for n, x in p.leaves().items()}
        out = decode(p.codes.with_values(leaves["values"]), leaves["weight"], leaves["bias"])
        g = torch.Generator().manual_seed(5)
        (alone,) = torch.autograd.grad(out, leaves[name], torch.randn(out.shape, generator=g))
        assert torch.equal(alone, everything[name]), name


@pytest.mark.cpu
def test_strides_and_leading_dimensions():
    p = problem((2, 3), 4, 10, 12)
    want = decode_error(p.codes, p.weight, p.bias, p.rows)
    columns = torch.empty(12, 10).T.copy_(p.weight)  # a transposed view
    apart = torch.empty(10, 24)[:, ::2].copy_(p.weight)
    between = torch.empty(10, 17)[:, 2:14].copy_(p.weight)
    rows = torch.empty(3, 2, 13)[..., 1:].transpose(0, 1).copy_(p.rows)
    values = torch.empty(4, 6).T.copy_(p.codes.values)
    for weight in (columns, apart, between):
        got = decode_error(p.codes.with_values(values), weight, p.bias, rows)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_mixed_dtypes_of_bias_and_target():
    p = problem(6, 4, 10, 12, dtype=torch.bfloat16)
    rows = torch.randn(6, 12)
    residual, squared = decode_error(p.codes, p.weight, p.bias.half(), rows)
    true = rows.double() - dense(p.codes, p.codes.values) @ p.weight.double()
    true = true - p.bias.half().double()
    assert_close(residual, true, 4)
    assert_close(squared, true.square().sum(-1), 16)
    assert residual.dtype == torch.bfloat16


def test_a_nan_stays_in_its_token():
    p = problem(5, 3, 8, 10)
    p.codes.values[2, 1] = torch.nan
    bad = decode(p.codes, p.weight, p.bias).isnan().all(-1)
    assert bad.tolist() == [False, False, True, False, False]


def test_gradcheck_of_the_reference():
    p = problem((2, 3), 4, 9, 5).wide()
    leaves = p.leaves()

    def call(values, weight, bias, rows):
        codes = p.codes.with_values(values)
        out = decode(codes, weight, bias, impl="reference")
        return out, *decode_error(codes, weight, bias, rows, impl="reference")

    assert torch.autograd.gradcheck(call, tuple(leaves.values()), check_forward_ad=False)
    assert torch.autograd.gradgradcheck(call, tuple(leaves.values()))


def test_a_dead_latent_learns_the_residual():
    """sae-kernels 12.6: AuxK moves that latent alone, its encoder row too, and no bias."""
    torch.manual_seed(0)
    features, width = 12, 16
    direction = torch.nn.functional.normalize(torch.randn(width), dim=0)
    x = direction * torch.tensor([[2.0], [3.0], [0.5]])
    encoder = torch.randn(features, width)
    encoder[7] = direction
    encoder = encoder.requires_grad_()
    weight = torch.randn(features, width)
    weight[7] = direction
    weight = weight.requires_grad_()
    dead = torch.zeros(features, dtype=torch.bool)
    dead[7] = True
    aux = encode_topk(x, encoder, k=2, aux=(dead, 1), impl="reference").aux
    codes = aux.with_values(aux.values.relu())
    _, squared = decode_error(codes, weight, None, x)
    assert squared.max() < 1e-10
    _, squared = decode_error(codes, weight * 0.5, None, x)
    squared.sum().backward()
    for grad in (encoder.grad, weight.grad):
        moved = grad.abs().sum(-1) > 0
        assert moved.nonzero().flatten().tolist() == [7]


def errors():
    p = problem((2, 3), 4, 10, 12)
    w, b, r = p.weight, p.bias, p.rows
    return p, {
        "expected weight to be [10, D], got [9, 12]": lambda: decode(p.codes, w[1:]),
        "expected bias to be [12], got [11]": lambda: decode(p.codes, w, b[1:]),
        "expected target to be [2, 3, 12], got [2, 12]": lambda: decode_error(
            p.codes, w, b, r[:, 0]
        ),
        "expected impl to be 'auto' or 'reference', got 'dense'": lambda: decode(
            p.codes, w, impl="dense"
        ),
        "expected weight on cpu like the codes, got it on meta": lambda: decode(
            p.codes, w.to("meta")
        ),
    }


@pytest.mark.parametrize("message", errors()[1])
def test_wrong_shapes_are_named(message):
    with pytest.raises(ValueError) as caught:
        errors()[1][message]()
    assert message in str(caught.value)


def test_what_an_encoder_returns_is_not_its_codes():
    weight = torch.ones(10, 12)
    found = encode_topk(torch.ones(2, 12), weight, k=4)
    for wrong in (
        lambda: decode(found, weight),
        lambda: decode_error(found, weight, None, torch.ones(2, 12)),
    ):
        with pytest.raises(TypeError, match=r"expected codes to be Codes, .*\.codes, got Encoding"):
            wrong()


def test_wrong_dtypes_are_named():
    p = problem(3, 4, 10, 12)
    with pytest.raises(TypeError, match=r"expected weight to be float32, .* got torch\.float64"):
        decode(p.codes, p.weight.double())
    with pytest.raises(TypeError, match=r"expected codes\.values to be float32, got torch\.bf"):
        decode(p.codes.with_values(p.codes.values.bfloat16()), p.weight)


@pytest.mark.cpu
def test_wrong_lists_are_refused():
    p = problem(3, 4, 10, 12)
    p.codes.indices[2, 1] = 10
    with pytest.raises(RuntimeError, match=r"expected indices in \[0, 10\), got 10 at 9"):
        decode(p.codes, p.weight)
    p.codes.indices[2, 1] = -1
    with pytest.raises(RuntimeError, match=r"expected indices in \[0, 10\), got -1 at 9"):
        decode(p.codes, p.weight)
    p = problem(3, 4, 10, 12, form="csr")
    p.codes.offsets[1] = p.codes.values.numel() + 1
    with pytest.raises(RuntimeError, match="expected ascending offsets"):
        decode(p.codes, p.weight)
    p = problem(3, 4, 10, 12, form="counts")
    p.codes.counts[1] = 5
    with pytest.raises(RuntimeError, match=r"expected counts in \[0, 5\), got 5 at 1"):
        decode(p.codes, p.weight)


@pytest.mark.cpu
def test_nothing_of_the_size_of_the_dictionary_is_allocated_forward():
    """sae-kernels 12.8: 64 tokens of 20,000 features, and no [N, F] nor a copy of [F, D]."""
    p = problem(64, 8, 20_000, 32)
    with torch.profiler.profile(profile_memory=True) as profile:
        decode_error(p.codes, p.weight, p.bias, p.rows)
    largest = max(e.cpu_memory_usage for e in profile.events())
    assert 64 * 32 * 4 <= largest < 64 * 32 * 4 * 8
