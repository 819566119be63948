"""torch's own checks of the encode ops, compilers, FLOPs, and what the bare ops refuse."""

from __future__ import annotations

import pytest
import torch
from sae_encoders import DEVICES, DTYPES, IDS, problem
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from gemma_ext.ops.sae import (
    decode,
    encode_batch_topk,
    encode_group_max,
    encode_threshold,
    encode_topk,
)

OPS = {
    "sae_topk": lambda q: (q.x, q.weight, q.bias, q.scale, q.mask, 4, 3, False),
    "sae_topk, bare": lambda q: (q.x, q.weight, None, None, None, 4, 0, True),
    "sae_group_max": lambda q: (q.x, q.weight, q.bias, 10),
    "sae_batch_topk": lambda q: (q.x, q.weight, q.bias, q.scale, q.mask, 30, 3),
    "sae_threshold": lambda q: (q.x, q.weight, q.bias, None, q.scale, q.mask, False, -1, 3),
    "sae_threshold, padded": lambda q: (q.x, q.weight, None, None, q.scale, None, True, 40, 0),
}
SAMPLES = {
    name: lambda dtype, variant, _, made=made: made(problem(9, 11, 40, dtype=dtype))
    for name, made in OPS.items()
    if "," not in name
}
# inputs with gradients have kernels of their own, which the differentiable calls on top replace
CHECKS = ("test_schema", "test_faketensor")
ENCODERS = {
    "topk": lambda x, w, b: encode_topk(x, w, b, k=4).codes,
    "groups": lambda x, w, b: encode_group_max(x, w, b, groups=10),
    "batch": lambda x, w, b: encode_batch_topk(x, w, b, total=30).codes,
    "threshold": lambda x, w, b: encode_threshold(x, w, b, threshold=1.0).codes,
    "padded": lambda x, w, b: encode_threshold(x, w, b, threshold=1.0, capacity=40).codes,
}


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("name", OPS)
def test_opcheck(name, dtype, device):
    q = problem(9, 11, 40, dtype=dtype, device=device)
    op = getattr(torch.ops.gemma_ext, name.split(",")[0])
    opcheck(op.default, OPS[name](q), test_utils=CHECKS)


@pytest.mark.parametrize("encoder", ENCODERS.values(), ids=ENCODERS)
def test_compiled_is_eager(encoder, device):
    torch._dynamo.reset()

    def step(x, weight, bias, decoder):
        codes = encoder(x, weight, bias)
        codes = codes.with_values(torch.relu(codes.values))
        return decode(codes, decoder).square().sum()

    patch = {"capture_dynamic_output_shape_ops": True, "error_on_recompile": True}
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(**patch):
        for n in (9, 14, 30):
            q = problem(n, 11, 40, exact=False, device=device)
            decoder = torch.randn(40, 11, device=device)
            results = []
            for fn in (step, compiled):
                given = [t.clone().requires_grad_() for t in (q.x, q.weight, q.bias, decoder)]
                loss = fn(*given)
                loss.backward()
                results.append([loss, *(t.grad for t in given)])
            for a, b in zip(*results, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_flops_are_those_of_the_bare_product():
    q = problem(9, 11, 40)
    with FlopCounterMode(display=False) as counter:
        encode_topk(q.x, q.weight, q.bias, k=4)
    assert counter.get_total_flops() == 2 * 9 * 11 * 40


def bare(name: str, **changes):
    q = problem(9, 11, 40)
    schema = getattr(torch.ops.gemma_ext, name).default._schema
    names = [argument.name for argument in schema.arguments]
    given = dict(zip(names, OPS[name](q), strict=True))
    return getattr(torch.ops.gemma_ext, name)(*(given | changes).values())


@pytest.mark.parametrize(
    ("name", "changes", "sentence"),
    [
        ("sae_topk", {"k": 0}, r"sae_topk: expected k in \[1, 40\], got 0"),
        ("sae_topk", {"k_aux": 0}, r"sae_topk: expected k_aux in \[1, 40\], got 0"),
        ("sae_topk", {"x": torch.ones(3)}, "expected x to have 2 dimensions, got 1"),
        ("sae_topk", {"x": torch.ones(3, 11).double()}, "expected x to be float32, bfloat16"),
        ("sae_topk", {"x": torch.ones(3, 11).half()}, "expected x and weight to have one dtype"),
        ("sae_topk", {"x": torch.ones(3, 4)}, r"expected weight to be \[F, 4\], got \[40, 11\]"),
        ("sae_topk", {"weight": torch.ones(0, 11)}, "expected 1 to 2.31 - 1 rows of weight"),
        ("sae_topk", {"bias": torch.ones(3)}, r"expected bias to be \[40\]"),
        ("sae_topk", {"aux_mask": torch.ones(40)}, "expected aux_mask to be bool"),
        ("sae_group_max", {"groups": 7}, "expected groups to divide 40 features, got 7"),
        ("sae_batch_topk", {"total": 361}, r"expected total in \[0, 360\], got 361"),
        ("sae_threshold", {"limit": torch.ones(3)}, r"expected limit to be \[40\]"),
        ("sae_threshold", {"capacity": 41}, r"expected capacity in \[1, 40\], got 41"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_bare_ops_refuse(name, changes, sentence):
    with pytest.raises(RuntimeError, match=sentence):
        bare(name, **changes)
