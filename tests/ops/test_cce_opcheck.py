"""torch's own checks of every registered op: schema, autograd registration, fakes, AOT dispatch."""

from __future__ import annotations

import pytest
import torch
from cce_oracle import IGNORE, problem
from divergence_samples import SAMPLES as DIVERGENCE
from torch.library import opcheck

import gemma_ext  # noqa: F401  registers the ops, their fakes and autograd

HEAD = (5.0, 1.2, 0.8, IGNORE)
N, D, V = 11, 24, 300


def inputs(dtype: torch.dtype, *, bias: bool, grad: bool):
    p = problem(N, D, V, bias=bias, ignored=0.3, dtype=dtype, seed=1)
    e, c = (t.requires_grad_(grad) for t in (p.e, p.c))
    return e, c, p.targets, None if p.bias is None else p.bias.requires_grad_(grad)


def weights(wanted: bool) -> torch.Tensor | None:
    return torch.rand(V, generator=torch.Generator().manual_seed(2)) if wanted else None


def forward_args(dtype, variant: str, grad: bool):
    e, c, y, bias = inputs(dtype, bias=variant != "bare", grad=grad)
    full = variant == "full"
    eps = {"bare": 0.0, "full": 2.0**-3, "auto": -1.0}[variant]
    return (e, c, y, bias, weights(full), *HEAD, False, eps, full, full, False, full)


def backward_args(dtype, variant: str, grad: bool = False):
    args = forward_args(dtype, variant, grad)
    with torch.no_grad():
        nll, lse, low, mean, _, _, masses, summary, *_ = torch.ops.gemma_ext.cce_forward(*args)
    full = variant == "full"
    g = torch.Generator().manual_seed(4)
    d_nll, d_lse, d_mean, d_class, scale = (torch.randn(N, generator=g) for _ in range(5))
    return (
        *args[:5],
        *(nll, lse, low, mean, masses, summary, scale.abs() if variant == "auto" else None),
        *(d_nll, d_lse, *((d_mean, d_class) if full else (None, None))),
        *(*HEAD, False, 7, False, True, True, args[3] is not None),
    )


def fused_args(dtype, variant: str, grad: bool):
    e, c, y, bias = inputs(dtype, bias=variant != "bare", grad=grad)
    coef = torch.rand(N, generator=torch.Generator().manual_seed(5))
    return (e, c, y, bias, coef, 0.1 * coef, *HEAD, False, True, True, bias is not None)


def scale_args(dtype, variant: str):
    x = problem(N, D, V, dtype=dtype, seed=1).e
    return x, torch.tensor(1.0 if variant == "bare" else 0.3)


SAMPLES = {
    "cce_forward": lambda dtype, variant, grad: forward_args(dtype, variant, grad),
    "cce_backward": lambda dtype, variant, grad: backward_args(dtype, variant, grad),
    "cce_fused": lambda dtype, variant, grad: fused_args(dtype, variant, grad),
    "cce_scale_": lambda dtype, variant, _: scale_args(dtype, variant),
} | DIVERGENCE


def samples(name: str, dtype: torch.dtype, variant: str) -> list[tuple]:
    """Argument tuples of one op. None requires grad: a gradient of an op itself is refused."""
    return [SAMPLES[name](dtype, variant, False)]


OPS = list(SAMPLES)


def test_no_op_is_forgotten():
    registered = {
        name.removeprefix("gemma_ext::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("gemma_ext::cce_")
    }
    assert registered == set(OPS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("variant", ["bare", "auto", "full"])
@pytest.mark.parametrize("name", OPS)
def test_opcheck(name, variant, dtype):
    op = getattr(torch.ops.gemma_ext, name).default
    for args in samples(name, dtype, variant):
        opcheck(op, args, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scale(dtype):
    x = torch.randn(3, 5000).to(dtype)
    for factor in (1.0, 0.3):
        scaled = x.clone()
        torch.ops.gemma_ext.cce_scale_(scaled, torch.tensor(factor))
        assert torch.equal(scaled, (x.float() * factor).to(dtype))


@pytest.mark.parametrize("name", OPS)
def test_fake_shapes_follow_the_kernel(name):
    """Also for no row at all, which opcheck's sample never is."""
    op = getattr(torch.ops.gemma_ext, name).default
    for variant in ("bare", "full"):
        args = samples(name, torch.float32, variant)[0]
        real = op(*args)
        with torch._subclasses.FakeTensorMode() as mode:
            fake = op(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args))
        for r, f in zip(real or (), fake or (), strict=True):
            assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride())


BAD = {
    "e not a matrix": ("e", lambda e, c, y, b: (e[0], c, y, b)),
    "widths differ": ("c", lambda e, c, y, b: (e, c[:, 1:], y, b)),
    "rows differ": ("targets", lambda e, c, y, b: (e, c, y[1:], b)),
    "bias of another size": ("bias", lambda e, c, y, b: (e, c, y, b[1:])),
    "dtypes differ": ("c", lambda e, c, y, b: (e, c.bfloat16(), y, b)),
    "labels are floats": ("targets", lambda e, c, y, b: (e, c, y.float(), b)),
    "doubles": ("e", lambda e, c, y, b: (e.double(), c.double(), y, b)),
    "no vocabulary": ("c", lambda e, c, y, b: (e, c[:0], y, None)),
}


@pytest.mark.parametrize("case", BAD)
def test_raw_ops_refuse_what_does_not_fit(case):
    """The ops are public too: a wrong shape is an error, not a read out of bounds."""
    name, change = BAD[case]
    e, c, y, bias = inputs(torch.float32, bias=True, grad=False)
    bad = change(e, c, y, bias)
    with pytest.raises(RuntimeError, match=name):
        torch.ops.gemma_ext.cce_forward(*bad, None, *HEAD, False, 0.0, False, False, False)
    coef = torch.ones(len(bad[2]))
    with pytest.raises(RuntimeError, match=name):
        torch.ops.gemma_ext.cce_fused(*bad, coef, coef, *HEAD, False, True, True, False)


def test_masses_of_another_forward_are_refused():
    args = list(backward_args(torch.float32, "full"))
    args[9] = args[9][:, :, 1:].contiguous()
    with pytest.raises(RuntimeError, match="masses"):
        torch.ops.gemma_ext.cce_backward(*args)


def test_scale_of_another_size_is_refused():
    args = list(backward_args(torch.float32, "auto"))
    args[11] = torch.ones(N - 1)
    with pytest.raises(RuntimeError, match="scale"):
        torch.ops.gemma_ext.cce_backward(*args)
