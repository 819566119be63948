"""Gradients of the chosen pre-activations against float64 autograd, and what has none."""

from __future__ import annotations

import pytest
import torch
from sae_encoders import DEVICES, DTYPES, IDS, problem
from torch.autograd import forward_ad

from gemma_ext.ops.sae import (
    Codes,
    Encoding,
    decode,
    encode_batch_topk,
    encode_group_max,
    encode_threshold,
    encode_topk,
)
from gemma_ext.testing import assert_close

ENCODERS = {
    "topk": lambda q, **o: encode_topk(
        q.x, q.weight, q.bias, k=12, scale=q.scale, aux=(q.mask, 40), **o
    ),
    "magnitude": lambda q, **o: encode_topk(q.x, q.weight, q.bias, k=12, by="magnitude", **o),
    "groups": lambda q, **o: Encoding(encode_group_max(q.x, q.weight, q.bias, groups=10, **o)),
    "batch": lambda q, **o: encode_batch_topk(
        q.x, q.weight, q.bias, total=15 * len(q.x), aux=(q.mask, 40), **o
    ),
    "batch of all": lambda q, **o: encode_batch_topk(
        q.x, q.weight, q.bias, total=130 * len(q.x), **o
    ),
    "threshold": lambda q, **o: encode_threshold(q.x, q.weight, q.bias, threshold=1.0, **o),
    "padded": lambda q, **o: encode_threshold(
        q.x, q.weight, q.bias, threshold=0.5, capacity=130, aux=(q.mask, 3), **o
    ),
}
REL = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(params=ENCODERS.values(), ids=ENCODERS)
def encoder(request):
    return request.param


def leaves(q):
    for name in ("x", "weight", "bias"):
        setattr(q, name, getattr(q, name).detach().requires_grad_())
    return q


def weights(codes: Codes, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(codes.values.shape, generator=g).to(codes.values.device)


def formula(q, codes: Codes):
    """The same entries gathered from float64 products; those that do not count are 0."""
    wide = leaves(q.wide())
    p = wide.x @ wide.weight.T + wide.bias.double()
    entries = p[codes.rows(), codes.indices.long()]
    return wide, torch.where(codes.mask, entries, 0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_gradients(encoder, dtype, impl, device):
    q = leaves(problem(21, 70, 130, dtype=dtype, exact=False, device=device))
    found = encoder(q, impl=impl)
    lists = [c for c in (found.codes, found.aux) if c is not None]
    sum((c.values * weights(c, i)).sum() for i, c in enumerate(lists)).backward()
    total = dict.fromkeys(("x", "weight", "bias"), 0.0)
    for i, c in enumerate(lists):
        wide, entries = formula(q, c)
        (entries * weights(c, i)).sum().backward()
        total = {name: total[name] + getattr(wide, name).grad for name in total}
    for name, want in total.items():
        got = getattr(q, name).grad
        assert got.dtype == getattr(q, name).dtype
        assert_close(got, want, rel=1e-6 if name == "bias" else REL[dtype], name=name)


@pytest.mark.parametrize("wanted", ["x", "weight", "bias"])
def test_only_what_is_wanted(encoder, wanted, device):
    q = problem(21, 70, 130, exact=False, device=device)
    all_of_it = leaves(problem(21, 70, 130, exact=False, device=device))
    encoder(all_of_it).codes.values.sum().backward()
    getattr(q, wanted).requires_grad_()
    encoder(q).codes.values.sum().backward()
    assert torch.equal(getattr(q, wanted).grad, getattr(all_of_it, wanted).grad)
    assert all(getattr(q, n).grad is None for n in ("x", "weight", "bias") if n != wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
def test_a_sparse_gradient_holds_the_rows_that_are_listed(encoder, dtype, device):
    grads = []
    for sparse in (False, True):
        q = leaves(problem(3, 70, 130, dtype=dtype, exact=False, device=device))
        q.mask = q.mask & (torch.arange(130, device=device) < 30)
        found = encoder(q, **({"sparse_grad": True} if sparse else {}))
        lists = [c for c in (found.codes, found.aux) if c is not None]
        sum((c.values * weights(c, i)).sum() for i, c in enumerate(lists)).backward()
        grads.append(q.weight.grad)
    dense, rows = grads
    assert rows.dtype == dtype
    rows = rows.double().coalesce()
    listed = torch.cat([c.indices[c.mask] for c in lists]).unique()
    assert torch.equal(rows.indices()[0], listed.long())
    atol = 4 * REL[dtype] * float(dense.abs().max())
    torch.testing.assert_close(rows.to_dense(), dense.double(), rtol=0, atol=atol)


def test_gradients_are_the_same_bits_every_time(encoder, device):
    grads = []
    for _ in range(3):
        q = leaves(problem(21, 70, 130, exact=False, device=device))
        found = encoder(q)
        (found.codes.values.square().sum()).backward()
        grads.append((q.x.grad, q.weight.grad, q.bias.grad))
    for again in grads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(again, grads[0], strict=True))


def test_a_loss_on_dead_latents_reaches_the_encoder_of_them_alone(device):
    q = leaves(problem(21, 70, 130, exact=False, device=device))
    dead = torch.zeros(130, dtype=torch.bool, device=device)
    dead[[5, 88]] = True
    aux = encode_topk(q.x, q.weight, q.bias, k=12, aux=(dead, 40)).aux
    decoder = torch.randn(130, 70, device=device)
    decode(aux, decoder).square().sum().backward()
    touched = q.weight.grad.abs().sum(-1) > 0
    assert touched.nonzero().flatten().tolist() == [5, 88]
    assert (q.bias.grad != 0).nonzero().flatten().tolist() == [5, 88]


def test_relu_of_the_list_gives_selected_negatives_no_gradient(device):
    weight = torch.tensor([[1.0], [-1.0], [2.0]], device=device, requires_grad=True)
    x = torch.ones(1, 1, device=device)
    codes = encode_topk(x, weight, k=3).codes
    torch.relu(codes.values).sum().backward()
    assert weight.grad.tolist() == [[1.0], [0.0], [1.0]]


def test_the_rest_of_the_results_has_no_gradient(device):
    q = leaves(problem(5, 8, 20, device=device))
    found = encode_batch_topk(q.x, q.weight, q.bias, total=9, scale=q.scale.requires_grad_())
    assert found.codes.values.requires_grad
    assert not found.min_positive.requires_grad
    found.codes.values.sum().backward()
    assert q.scale.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.cpu
def test_autocast_multiplies_in_its_dtype(dtype):
    q = leaves(problem(21, 70, 130, exact=False))
    with torch.autocast("cpu", dtype):
        got = encode_topk(q.x, q.weight, q.bias, k=5).codes
    want = encode_topk(q.x.to(dtype), q.weight.to(dtype), q.bias, k=5).codes
    assert torch.equal(got.values, want.values)
    assert torch.equal(got.indices, want.indices)
    got.values.sum().backward()
    assert q.weight.grad.dtype == torch.float32
    assert q.weight.grad.any()


def test_second_derivatives_are_refused(encoder, device):
    q = leaves(problem(21, 70, 130, exact=False, device=device))
    value = encoder(q).codes.values.square().sum()
    (dw,) = torch.autograd.grad(value, q.weight, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"no derivative of this order; .*reference"):
        dw.sum().backward()


def test_forward_mode_is_refused(encoder):
    q = problem(21, 70, 130, exact=False)
    with forward_ad.dual_level():
        q.x = forward_ad.make_dual(q.x, torch.ones_like(q.x))
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            encoder(q)


def test_the_reference_has_derivatives_of_every_order():
    q = problem(3, 5, 12, exact=False).wide()
    for encoder in (
        lambda *a: encode_topk(*a, k=4, impl="reference").codes.values,
        lambda *a: encode_group_max(*a, groups=3, impl="reference").values,
        lambda *a: encode_batch_topk(*a, total=9, impl="reference").codes.values,
        lambda *a: encode_threshold(*a, threshold=0.3, impl="reference").codes.values,
    ):
        given = [t.double().requires_grad_() for t in (q.x, q.weight, q.bias)]
        assert torch.autograd.gradcheck(encoder, given)
        assert torch.autograd.gradgradcheck(lambda *a, f=encoder: f(*a).square(), given)
