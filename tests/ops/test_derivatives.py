"""What every op does when asked for a derivative that it lacks; transforms of torch.func."""

from __future__ import annotations

import pytest
import torch
from cce_oracle import assert_close, problem
from test_cce_opcheck import SAMPLES as CCE
from test_depth_kv_opcheck import SAMPLES as DEPTH_KV
from test_depth_linear_opcheck import SAMPLES as DEPTH_LINEAR
from test_sae_encode_opcheck import SAMPLES as SAE_ENCODERS
from test_sae_products_opcheck import SAMPLES as SAE_PRODUCTS
from test_soup_opcheck import SAMPLES as SOUP
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from gemma_ext import LinearCrossEntropy, linear_cross_entropy, linear_logprobs

SAMPLES = CCE | SOUP | SAE_ENCODERS | SAE_PRODUCTS | DEPTH_LINEAR
SAMPLES |= {name: lambda t, v, _, made=made: made(t, True) for name, made in DEPTH_KV.items()}
REFUSED = "impl='reference'"
WAYS = {
    "fused": {"impl": "exact"},
    "recomputed": {"impl": "exact", "reduction": "none"},
    "sampled": {"impl": "cce", "filter_eps": 2.0**-6},
}


def differentiable_ops() -> list[str]:
    """Every op of the package that takes a tensor and returns one."""
    found = []
    for name in torch._C._dispatch_get_all_op_names():
        if not name.startswith("gemma_ext::"):
            continue
        schema = torch._C._get_schema(name, "")
        kinds = [str(x.type) for x in (*schema.arguments, *schema.returns)]
        if any("Tensor" in kind for kind in kinds):
            found.append(name.removeprefix("gemma_ext::"))
    return sorted(found)


def tensors_of(outputs) -> list[torch.Tensor]:
    outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    return [t for t in outputs if t.is_floating_point()]


def is_tensors(items: list) -> bool:
    return len(items) > 0 and isinstance(items[0], torch.Tensor)


def arguments(name: str) -> list:
    assert name in SAMPLES, f"no sample of {name}: add one to SAMPLES"
    return list(SAMPLES[name](torch.float32, "full", False))


@pytest.mark.parametrize("name", differentiable_ops())
def test_op_refuses_reverse_mode(name):
    """An op whose gradient is right has a function around it; the op alone would drop terms."""
    args = arguments(name)
    listed = [x for a in args if isinstance(a, list) for x in a if isinstance(x, torch.Tensor)]
    for a in (*args, *listed):
        if isinstance(a, torch.Tensor) and a.is_floating_point():
            a.requires_grad_()
    op = getattr(torch.ops.gemma_ext, name)
    if listed or not op.default._schema.returns:
        with pytest.raises(NotImplementedError, match="has no derivative"):
            op(*args)
        return
    outputs = [t for t in tensors_of(op(*args)) if t.numel()]
    asked = any(isinstance(a, torch.Tensor) and a.requires_grad for a in args)
    assert all(t.requires_grad == asked for t in outputs)
    for out in outputs if asked else ():
        with pytest.raises(NotImplementedError, match="has no derivative of this order; "):
            out.sum().backward(retain_graph=True)


@pytest.mark.parametrize("name", differentiable_ops())
def test_op_refuses_forward_mode(name):
    op = getattr(torch.ops.gemma_ext, name)
    args = arguments(name)
    floating = [
        i for i, a in enumerate(args) if isinstance(a, torch.Tensor) and a.is_floating_point()
    ]
    lists = [
        i
        for i, a in enumerate(args)
        if isinstance(a, list) and is_tensors(a) and a[0].is_floating_point()
    ]
    for i in (*floating, *lists):
        with forward_ad.dual_level():
            x = args[i]
            first = x[0] if isinstance(x, list) else x
            dual = forward_ad.make_dual(first, torch.ones_like(first))
            given = [dual, *x[1:]] if isinstance(x, list) else dual
            with pytest.raises(NotImplementedError, match="has no forward-mode derivative"):
                op(*args[:i], given, *args[i + 1 :])


@pytest.mark.parametrize("leaf", ["e", "c", "bias"])
@pytest.mark.parametrize("way", WAYS)
def test_loss_refuses_second_derivatives(way, leaf):
    p = problem(12, 8, 600, seed=1)
    leaves = p.leaves()
    loss = linear_cross_entropy(targets=p.targets, **leaves, **WAYS[way]).sum()
    (grad,) = torch.autograd.grad(loss, leaves[leaf], create_graph=True)
    want = linear_cross_entropy(targets=p.targets, **leaves, **WAYS[way]).sum()
    (plain,) = torch.autograd.grad(want, leaves[leaf])
    assert torch.equal(grad, plain)
    with pytest.raises(NotImplementedError, match=REFUSED):
        grad.square().sum().backward()


@pytest.mark.parametrize("leaf", ["e", "c"])
@pytest.mark.parametrize("way", WAYS)
def test_loss_refuses_forward_mode(way, leaf):
    p = problem(12, 8, 600, seed=1)

    def loss(x):
        leaves = {"e": p.e, "c": p.c, leaf: x}
        return linear_cross_entropy(targets=p.targets, **leaves, **WAYS[way]).sum()

    x = getattr(p, leaf)
    with pytest.raises(NotImplementedError, match=REFUSED):
        torch.func.jvp(loss, (x,), (x,))
    with pytest.raises(NotImplementedError, match=REFUSED):
        torch.func.hessian(loss)(x)
    with pytest.raises(NotImplementedError, match=REFUSED):
        torch.func.grad(lambda y: torch.func.grad(loss)(y).square().sum())(x)


def test_log_probabilities_refuse_what_the_loss_refuses():
    p = problem(12, 8, 600, seed=1)
    leaves = p.leaves()
    logp, entropy = linear_logprobs(leaves["e"], leaves["c"], p.targets)
    (grad,) = torch.autograd.grad((logp + entropy).sum(), leaves["e"], create_graph=True)
    with pytest.raises(NotImplementedError, match=REFUSED):
        grad.sum().backward()
    with pytest.raises(NotImplementedError, match=REFUSED):
        torch.func.jvp(lambda e: linear_logprobs(e, p.c, p.targets)[0], (p.e,), (p.e,))


def test_the_reference_has_them():
    p = problem(5, 4, 30, dtype=torch.float64, ignored=0.2, seed=2)
    p.targets[0] = 3

    def loss(e, c, bias):
        options = {"softcap": 3.0, "z_loss": 0.1, "impl": "reference", "return_entropy": True}
        out = linear_cross_entropy(e, c, p.targets, bias=bias, **options)
        return out.loss + out.entropy.sum()

    leaves = tuple(p.leaves().values())
    assert torch.autograd.gradcheck(loss, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(loss, leaves)


def loss_of_c(p, way):
    def loss(c, e, targets):
        return linear_cross_entropy(e, c, targets, **{"impl": "reference"} | way).sum()

    return loss, (p.c, p.e, p.targets)


@pytest.mark.parametrize("way", WAYS)
def test_gradients_through_torch_func(way):
    p = problem(12, 8, 600, ignored=0.2, seed=3)
    options = WAYS[way] | ({"filter_eps": 1e-30} if way == "sampled" else {})
    (loss, args), (want, _) = loss_of_c(p, options), loss_of_c(p, {})
    if options.get("reduction") == "none":
        want = loss_of_c(p, {"reduction": "none"})[0]
    true = torch.func.grad(want, argnums=(0, 1))(*args)
    value, pull = torch.func.vjp(lambda c, e: loss(c, e, p.targets), p.c, p.e)
    ways = {
        "grad": torch.func.grad(loss, argnums=(0, 1))(*args),
        "vjp": pull(torch.ones_like(value)),
        "jacrev": torch.func.jacrev(loss, argnums=(0, 1))(*args),
    }
    for name, got in ways.items():
        for mine, theirs in zip(got, true, strict=True):
            assert_close(mine, theirs.double(), rtol=2e-5, what=name)


@pytest.mark.parametrize("way", WAYS)
def test_gradient_of_each_sample(way):
    """vmap(grad): one call per sample, as for per-sample clipping."""
    p = problem((5, 4), 8, 600, seed=4)
    options = WAYS[way] | ({"filter_eps": 1e-30} if way == "sampled" else {})
    loss, (c, e, y) = loss_of_c(p, options)
    want, _ = loss_of_c(p, {"reduction": options.get("reduction", "mean")})
    got = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(c, e, y)
    for i in range(5):
        true = torch.func.grad(want)(c, e[i], y[i])
        assert_close(got[i], true.double(), rtol=2e-5, what=f"sample {i}")


@pytest.mark.parametrize("way", WAYS)
def test_hooks_and_checkpointing_see_the_same_tensors(way):
    """Non-reentrant checkpointing compares what both forwards save."""
    p = problem(30, 8, 1500, seed=5)

    def loss(e, c):
        return linear_cross_entropy(e, c, p.targets, **WAYS[way]).sum()

    grads = []
    for call in (loss, lambda e, c: checkpoint(loss, e, c, use_reentrant=False)):
        leaves = p.leaves()
        grads.append(
            torch.autograd.grad(call(leaves["e"], leaves["c"]), (leaves["e"], leaves["c"]))
        )
    for plain, checkpointed in zip(*grads, strict=True):
        assert torch.equal(plain, checkpointed)


@pytest.mark.parametrize(("way", "products"), [("fused", 3), ("recomputed", 4), ("sampled", 4)])
def test_flops_are_counted(way, products):
    p = problem(12, 8, 600, seed=6)
    leaves = p.leaves()
    with FlopCounterMode(display=False) as counter:
        loss = linear_cross_entropy(leaves["e"], leaves["c"], p.targets, **WAYS[way])
        loss.sum().backward()
    assert counter.get_total_flops() == products * 2 * 12 * 8 * 600
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        linear_cross_entropy(p.e, p.c, p.targets, **WAYS[way])
    assert counter.get_total_flops() == 2 * 12 * 8 * 600


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("way", WAYS)
def test_traced_with_make_fx(way, mode):
    """Labels are looked at behind the tracer's back."""
    p = problem(12, 8, 600, seed=6)

    def loss(e, c, targets):
        return linear_cross_entropy(e, c, targets, **WAYS[way]).sum()

    args = p.e, p.c, p.targets
    assert torch.equal(make_fx(loss, tracing_mode=mode)(*args)(*args), loss(*args))
    gradient = torch.func.grad(loss, argnums=(0, 1))
    got = make_fx(gradient, tracing_mode=mode)(*args)(*args)
    for traced, plain in zip(got, gradient(*args), strict=True):
        assert torch.equal(traced, plain)


def test_exported():
    p = problem(12, 8, 600, bias=False, seed=6)
    module = torch.export.export(LinearCrossEntropy(softcap=5.0), (p.e, p.c, p.targets)).module()
    want = linear_cross_entropy(p.e, p.c, p.targets, softcap=5.0)
    assert torch.equal(module(p.e, p.c, p.targets), want)
