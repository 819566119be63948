"""torch's own checks of the product ops and of steering, and what the bare ops refuse."""

from __future__ import annotations

import pytest
import torch
from sae_lists import problem
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from gemma_ext.ops.sae import Steering, decode, decode_error, nested_errors, steer
from gemma_ext.ops.sae.steer_requests import pack

FORM = {"bare": "padded", "auto": "counts", "full": "csr"}
WIDTHS = [2, 9]


def lists(dtype, variant):
    p = problem(6, 3, 9, 10, form=FORM[variant], dtype=dtype)
    c = p.codes
    return p, (c.values, c.indices, c.offsets, c.counts)


def bias(p, variant):
    return None if variant == "bare" else p.bias


def sample_decode(dtype, variant, _):
    p, given = lists(dtype, variant)
    return *given, p.weight, bias(p, variant)


def sample_error(dtype, variant, _):
    p, given = lists(dtype, variant)
    return *given, p.weight, bias(p, variant), p.rows


def sample_backward(dtype, variant, _):
    p, given = lists(dtype, variant)
    scale = None if variant == "bare" else torch.rand(6)
    flags = (variant == "full", False, variant != "auto", variant != "bare", True)
    return *given, p.weight, p.rows, scale, *flags


def sample_scatter(dtype, variant, _):
    p, given = lists(dtype, variant)
    return *given, p.rows, 9


def levels(variant):
    return WIDTHS if variant == "full" else []


def sample_nested(dtype, variant, _):
    p, given = lists(dtype, variant)
    return *given, p.weight, bias(p, variant), p.rows, levels(variant)


def sample_nested_backward(dtype, variant, _):
    upstream = torch.rand(6, len(levels(variant)) or 3)
    flags = (variant == "full", variant != "auto", variant != "bare", True, variant != "auto")
    return *sample_nested(dtype, variant, _), upstream, *flags


def sample_steer(dtype, variant, _):
    torch.manual_seed(0)
    table = torch.randn(2, 5).to(dtype)
    options = {} if variant == "bare" else {"encoder": table + 1, "gate": "per_token"}
    if variant == "full":
        options = {**options, "gate": "per_input", "mode": "clamp", "level": 1.0}
    r = pack([Steering(table, 2.0, **options)]).spread(3)
    masks = (None, None) if variant == "bare" else (torch.rand(3, 4) > 0.3, torch.rand(3, 4) > 0.3)
    x = torch.randn(3, 4, 5).to(dtype)
    state = torch.tensor([-2, -1, 4], dtype=torch.int32)
    fields = ("decoder", "encoder", "tables", "offsets", "latents", "modes", "amounts", "gates")
    return x, *(getattr(r, name) for name in fields), state, *masks


SAMPLES = {
    "sae_decode": sample_decode,
    "sae_decode_error": sample_error,
    "sae_decode_backward": sample_backward,
    "sae_scatter": sample_scatter,
    "sae_nested": sample_nested,
    "sae_nested_backward": sample_nested_backward,
    "sae_steer": sample_steer,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("variant", ["bare", "auto", "full"])
@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(name, variant, dtype):
    op = getattr(torch.ops.gemma_ext, name).default
    opcheck(op, SAMPLES[name](dtype, variant, False))


def test_opcheck_of_a_gradient_of_rows_alone():
    """Its size depends on the lists."""
    p, given = lists(torch.float32, "full")
    flags = (True, True, True, True, True)
    opcheck(
        torch.ops.gemma_ext.sae_decode_backward.default,
        (*given, p.weight, p.rows, None, *flags),
    )


@pytest.mark.parametrize("variant", ["bare", "auto", "full"])
@pytest.mark.parametrize("name", SAMPLES)
def test_fake_shapes_follow_the_kernel(name, variant):
    op = getattr(torch.ops.gemma_ext, name).default
    args = SAMPLES[name](torch.bfloat16, variant, False)
    real = op(*args)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        fake = op(*args)
    real, fake = ((x,) if isinstance(x, torch.Tensor) else x for x in (real, fake))
    described = [[(t.shape, t.dtype, t.stride()) for t in out] for out in (real, fake)]
    assert described[0] == described[1]


def changed(name, variant, **changes):
    """Arguments by name, with some replaced."""
    op = getattr(torch.ops.gemma_ext, name).default
    names = [a.name for a in op._schema.arguments]
    args = dict(zip(names, SAMPLES[name](torch.float32, variant, False), strict=True))
    for key, change in changes.items():
        args[key] = change(args[key]) if callable(change) else change
    return op, args


BAD = {
    "indices of another shape": ("sae_decode", "bare", {"indices": lambda i: i[:, 1:]}),
    "indices of another dtype": ("sae_decode", "bare", {"indices": lambda i: i.long()}),
    "values of another dtype": ("sae_decode", "bare", {"values": lambda v: v.double()}),
    "values of another rank": ("sae_decode", "full", {"values": lambda v: v[None]}),
    "offsets of another dtype": ("sae_decode", "full", {"offsets": lambda o: o.int()}),
    "no offset": ("sae_decode", "full", {"offsets": lambda o: o[:0]}),
    "offsets and counts": ("sae_decode", "full", {"counts": torch.ones(6, dtype=torch.int64)}),
    "counts too few": ("sae_decode", "auto", {"counts": lambda c: c[1:]}),
    "a count too large": ("sae_decode", "auto", {"counts": lambda c: c + 9}),
    "offsets that fall": ("sae_decode", "full", {"offsets": lambda o: o.flip(0)}),
    "offsets that start late": ("sae_decode", "full", {"offsets": lambda o: o.clamp(min=1)}),
    "an index too large": ("sae_decode", "bare", {"indices": lambda i: i + 9}),
    "a weight too short": ("sae_decode", "bare", {"weight": lambda w: w[:1]}),
    "a flat weight": ("sae_decode", "bare", {"weight": lambda w: w[0]}),
    "a wide weight": ("sae_decode", "bare", {"weight": lambda w: w.double()}),
    "a short bias": ("sae_decode", "full", {"bias": lambda b: b[1:]}),
    "a target of another width": ("sae_decode_error", "full", {"target": lambda t: t[:, 1:]}),
    "a target too short": ("sae_decode_error", "full", {"target": lambda t: t[1:]}),
    "a gradient too short": ("sae_decode_backward", "full", {"grad": lambda g: g[1:]}),
    "a scale too short": ("sae_decode_backward", "full", {"scale": lambda s: s[1:]}),
    "rows too few": ("sae_scatter", "full", {"rows": lambda r: r[1:]}),
    "features too few": ("sae_scatter", "bare", {"features": 1}),
    "a negative width": ("sae_scatter", "bare", {"features": -1}),
    "widths that do not ascend": ("sae_nested", "full", {"widths": [4, 4]}),
    "widths too large": ("sae_nested", "full", {"widths": [4, 10]}),
    "places in rows of any length": ("sae_nested", "full", {"widths": []}),
    "levels too few": ("sae_nested_backward", "full", {"d_squared": lambda d: d[:, 1:]}),
    "x of another rank": ("sae_steer", "full", {"x": lambda x: x[0]}),
    "x of another width": ("sae_steer", "full", {"x": lambda x: x[..., 1:]}),
    "a decoder of another width": ("sae_steer", "full", {"decoder": lambda d: d[:, 1:]}),
    "encoders too few": ("sae_steer", "full", {"encoder": lambda e: e[1:]}),
    "no encoder for a gate": ("sae_steer", "auto", {"encoder": lambda e: e[:0, :0]}),
    "no encoder for a mode": (
        "sae_steer",
        "full",
        {"encoder": lambda e: e[:0, :0], "gates": lambda g: g * 0},
    ),
    "tables of another dtype": ("sae_steer", "full", {"tables": lambda t: t.double()}),
    "requests too few": ("sae_steer", "full", {"offsets": lambda o: o[1:]}),
    "requests that start late": ("sae_steer", "full", {"offsets": lambda o: o + 1}),
    "a latent too large": ("sae_steer", "full", {"latents": lambda i: i + 1}),
    "an unknown mode": ("sae_steer", "full", {"modes": lambda m: m + 7}),
    "an unknown gate": ("sae_steer", "full", {"gates": lambda g: g + 5}),
    "a short state": ("sae_steer", "full", {"state": lambda s: s[1:]}),
    "a short mask": ("sae_steer", "full", {"reads": lambda r: r[1:]}),
    "a mask of another dtype": ("sae_steer", "full", {"writes": lambda w: w.int()}),
}


@pytest.mark.parametrize("case", BAD)
def test_bare_ops_refuse_what_does_not_fit(case):
    """The ops are public too: a wrong shape is an error, not a read out of bounds."""
    name, variant, changes = BAD[case]
    op, args = changed(name, variant, **changes)
    with pytest.raises(RuntimeError, match=f"{name}: expected"):
        op(**args)


CALLS = {
    "decode": lambda c, w, b, x: decode(c, w, b, unit_norm=True).cos().sum(),
    "decode_error": lambda c, w, b, x: sum(t.cos().sum() for t in decode_error(c, w, b, x)),
    "widths": lambda c, w, b, x: nested_errors(c, w, b, x, widths=WIDTHS).cos().sum(),
    "rank": lambda c, w, b, x: nested_errors(c, w, b, x, by="rank").cos().sum(),
}


def call_and_gradients(fn, p):
    leaves = p.leaves()
    loss = fn(
        p.codes.with_values(leaves["values"]), leaves["weight"], leaves["bias"], leaves["rows"]
    )
    return loss, torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)


@pytest.mark.parametrize("name", CALLS)
def test_one_graph(name):
    p = problem((2, 3), 3, 9, 10)
    want = call_and_gradients(CALLS[name], p)
    compiled = torch.compile(CALLS[name], fullgraph=True, backend="aot_eager")
    got = call_and_gradients(compiled, p)
    assert torch.equal(got[0], want[0])
    for a, b in zip(got[1], want[1], strict=True):
        assert a is b is None or torch.equal(a, b)


def test_steering_in_one_graph():
    table = torch.randn(2, 5)
    spec = Steering(table, 2.0, encoder=table, gate="per_token").requests
    compiled = torch.compile(lambda x: steer(x, spec), fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 4, 5)
    assert torch.equal(compiled(x), steer(x, spec))


@pytest.mark.parametrize("name", CALLS)
def test_second_derivatives_are_refused(name):
    p = problem(4, 3, 9, 10)
    leaves = p.leaves()
    codes = p.codes.with_values(leaves["values"])
    loss = CALLS[name](codes, leaves["weight"], leaves["bias"], leaves["rows"])
    (grad,) = torch.autograd.grad(loss, leaves["weight"], create_graph=True)
    with pytest.raises(NotImplementedError, match="impl='reference'"):
        grad.square().sum().backward()


def test_forward_mode_is_refused():
    p = problem(4, 3, 9, 10)
    for name in ("decode", "widths"):
        with pytest.raises(NotImplementedError, match="forward-mode"):
            torch.func.jvp(
                lambda w, name=name: CALLS[name](p.codes, w, p.bias, p.rows),
                (p.weight,),
                (p.weight,),
            )


def test_flops_are_counted():
    p = problem(4, 3, 9, 10)
    leaves = p.leaves()
    with FlopCounterMode(display=False) as counter:
        decode(p.codes.with_values(leaves["values"]), leaves["weight"]).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 4 * 3 * 10
