"""float64 oracle of the cce family, written from the formulas and from nothing in the package.

    a_nv = logit_scale * e_n . c_v + bias_v        s = cap * tanh(a / cap) / T, or a / T uncapped
    lse_n = log sum_v exp(s_nv)                    p_nv = exp(s_nv - lse_n)
    nll_n = lse_n - s_{n,y_n}                      entropy_n = lse_n - sum_v p_nv s_nv
    row_n = (1 - alpha) w_y nll_n + (alpha / V) sum_v w_v (lse_n - s_nv) + lambda lse_n^2

Shapes: e (..., T, D), c (V, D), targets (..., T); rows with targets == ignore_index never enter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IGNORE = -100


@dataclass
class Result:
    """What one evaluation gave; per-token tensors have the shape of ``reduction="none"``."""

    loss: Tensor
    lse: Tensor
    entropy: Tensor
    argmax: Tensor
    accuracy: Tensor


def scores(
    e: Tensor,
    c: Tensor,
    bias: Tensor | None = None,
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    """Capped and tempered logits s, [N, V]."""
    a = logit_scale * (e @ c.T)
    if bias is not None:
        a = a + bias
    if softcap is not None:
        a = softcap * torch.tanh(a / softcap)
    return a / temperature


def evaluate(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = IGNORE,
    softcap: float | None = None,
    reduction: str = "mean",
    shift: int = 0,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    weight: Tensor | None = None,
    token_weights: Tensor | None = None,
    num_items_in_batch: int | Tensor | None = None,
    probe: Tensor | None = None,
) -> Result:
    """The loss and every optional output, differentiable by autograd in the dtype of ``e``.

    ``probe`` [valid rows, V] is added to the uncapped logits: at zero, its gradient is dA.
    """
    k = int(shift)
    if k:
        e, targets = e[..., : targets.shape[-1] - k, :], targets[..., k:]
        token_weights = None if token_weights is None else token_weights[..., k:]
    shape, vocab = targets.shape, c.shape[0]
    flat_e, y = e.reshape(-1, e.shape[-1]), targets.reshape(-1).long()
    rows = torch.nonzero(y != ignore_index).squeeze(1)
    y = y[rows]
    s = scores(
        flat_e[rows],
        c,
        bias if probe is None else probe if bias is None else bias + probe,
        softcap=softcap,
        logit_scale=logit_scale,
        temperature=temperature,
    )
    lse = torch.logsumexp(s, 1)
    nll = lse - s.gather(1, y[:, None]).squeeze(1)
    p = torch.softmax(s, 1)
    entropy = lse - (p * s).sum(1)
    w = torch.ones(vocab, dtype=s.dtype) if weight is None else weight.to(s.dtype)
    row = (1 - label_smoothing) * w[y] * nll + z_loss * lse**2
    if label_smoothing:
        row = row + label_smoothing / vocab * (w * (lse[:, None] - s)).sum(1)
    tw = torch.ones_like(row)
    if token_weights is not None:
        tw = token_weights.reshape(-1)[rows].to(s.dtype)
    row = row * tw

    def scatter(values: Tensor, fill: float = 0.0) -> Tensor:
        full = torch.full((flat_e.shape[0],), fill, dtype=values.dtype)
        return full.index_put((rows,), values).reshape(shape)

    if reduction == "none":
        loss = scatter(row)
    elif reduction == "sum" or not len(rows):
        loss = row.sum()
    elif num_items_in_batch is not None:
        loss = row.sum() / num_items_in_batch
    else:
        loss = row.sum() / (w[y] * tw).sum()
    best = s.argmax(1) if vocab else y
    hits = (best == y).sum() / max(len(rows), 1)
    return Result(loss, scatter(lse), scatter(entropy), scatter(best.double(), -1).long(), hits)


@dataclass
class Problem:
    """Inputs of one call; ``weights`` etc. are handed over through ``options``."""

    e: Tensor
    c: Tensor
    targets: Tensor
    bias: Tensor | None = None

    def leaves(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Fresh leaves that require grad; layout is kept unless a dtype is given."""
        named = {"e": self.e, "c": self.c} | ({} if self.bias is None else {"bias": self.bias})
        fresh = {n: t.detach() if dtype is None else t.detach().to(dtype) for n, t in named.items()}
        return {n: t.requires_grad_() for n, t in fresh.items()}


def problem(
    n: int | Sequence[int],
    d: int,
    v: int,
    *,
    spread: float = 3.0,
    bias: bool = True,
    ignored: float = 0.0,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Problem:
    """Random inputs whose logits have a standard deviation of ``spread``."""
    g = torch.Generator().manual_seed(seed + 1009 * d + 9176 * v)
    shape = (n,) if isinstance(n, int) else tuple(n)
    e = torch.randn(*shape, d, generator=g)
    c = torch.randn(v, d, generator=g) * (spread / math.sqrt(d))
    targets = torch.randint(0, v, shape, generator=g)
    if ignored:
        targets = targets.masked_fill(torch.rand(shape, generator=g) < ignored, IGNORE)
    b = torch.randn(v, generator=g).to(dtype) if bias else None
    return Problem(e.to(dtype), c.to(dtype), targets, b)


def expected(
    p: Problem, upstream: Tensor | float | None = None, **options: Any
) -> tuple[Result, dict[str, Tensor]]:
    """Oracle result and float64 gradients of ``sum(upstream * loss)``."""
    leaves = p.leaves(torch.float64)
    options = {
        k: o.double() if isinstance(o, Tensor) and o.is_floating_point() else o
        for k, o in options.items()
    }
    out = evaluate(targets=p.targets, **leaves, **options)
    loss = out.loss if upstream is None else out.loss * upstream
    return out, gradients(loss.sum(), leaves)


def gradient_sizes(p: Problem, **options: Any) -> dict[str, Tensor]:
    """sum of |terms| of every gradient entry: what rounding errors are relative to.

    Shapes as the gradients; shift must be 0.
    """
    rows = torch.nonzero(p.targets.reshape(-1) != options.get("ignore_index", IGNORE)).squeeze(1)
    probe = torch.zeros(len(rows), p.c.shape[0], dtype=torch.float64, requires_grad=True)
    leaves = {n: t.detach() for n, t in p.leaves(torch.float64).items()}
    out = evaluate(targets=p.targets, probe=probe, **leaves, **options)
    (da,) = torch.autograd.grad(out.loss.sum(), probe)
    da, kappa = da.abs(), abs(options.get("logit_scale", 1.0))
    e = leaves["e"].reshape(-1, p.e.shape[-1])
    de = torch.zeros_like(e)
    de[rows] = kappa * da @ leaves["c"].abs()
    sizes = {"e": de.view(p.e.shape), "c": kappa * da.T @ e[rows].abs()}
    return sizes | ({} if p.bias is None else {"bias": da.sum(0)})


def gradients(scalar: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """d scalar / d leaf by name; zeros where the graph does not reach a leaf."""
    got = torch.autograd.grad(scalar, list(leaves.values()), allow_unused=True)
    return {
        n: torch.zeros_like(t) if d is None else d
        for (n, t), d in zip(leaves.items(), got, strict=True)
    }


def run(
    fn: Callable[..., Any], p: Problem, upstream: Tensor | float | None = None, **options: Any
) -> tuple[Any, dict[str, Tensor]]:
    """Call ``fn`` with fresh leaves; return its output and the gradients of its loss."""
    leaves = p.leaves()
    out = fn(leaves["e"], leaves["c"], p.targets, bias=leaves.get("bias"), **options)
    loss = out if isinstance(out, Tensor) else out.loss
    loss = loss if upstream is None else loss * upstream
    return out, gradients(loss.sum(), leaves)


# Relative error that storage in a dtype leaves after fp32 accumulation. Outputs of loss and lse are
# fp32 always; gradients are rounded once to the dtype of their input (half an ulp is 2^-9 in bf16,
# 2^-12 in fp16) and bf16 may also round the gradient of the logits.
VALUE_TOL = {torch.float32: 5e-6, torch.bfloat16: 5e-6, torch.float16: 5e-6, torch.float64: 1e-12}
VALUE_FLOOR = 2e-6
GRAD_TOL = {torch.float32: 2e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3, torch.float64: 1e-11}


def assert_close(
    actual: Tensor, want: Tensor, *, rtol: float, floor: float = 1e-8, what: str = "value"
) -> None:
    """Shapes, then non-finite positions, then norm-relative and largest-entry error.

    ``floor`` is the absolute error per entry that is accepted whatever the size of ``want``.
    """
    assert actual.shape == want.shape, f"{what}: shape {tuple(actual.shape)} {tuple(want.shape)}"
    a, w = actual.detach().double().to(want.device), want.detach().double()
    assert torch.equal(torch.isnan(a), torch.isnan(w)), f"{what}: nan positions differ"
    inf = torch.isinf(w)
    assert torch.equal(torch.isinf(a), inf), f"{what}: inf positions differ"
    assert torch.equal(a[inf], w[inf]), f"{what}: signs of inf differ"
    finite = torch.isfinite(w)
    a, w = a[finite], w[finite]
    if not w.numel():
        return
    diff = a - w
    # fp16 entries cannot be nearer than the smallest subnormal.
    floor = 1e-7 if actual.dtype == torch.float16 else floor
    norm = diff.norm() / (w.norm() + floor * math.sqrt(w.numel()) / rtol)
    top = diff.abs().max() / (w.abs().max() + floor / rtol)
    assert norm <= rtol, f"{what}: relative error {norm:.3e} > {rtol:.1e}"
    assert top <= 2 * rtol, f"{what}: largest entry off by {top:.3e} > {2 * rtol:.1e} of the top"


def check(
    got: tuple[Any, dict[str, Tensor]],
    want: tuple[Result, dict[str, Tensor]],
    *,
    scale: float = 1.0,
    floor: float = 1e-8,
) -> None:
    """Compare loss, gradients and whichever optional outputs ``got`` carries.

    ``scale`` widens the tolerances; ``floor`` is the absolute error of a gradient entry, for
    gradients that cancel (p_y -> 1).
    """
    out, grads = got
    truth, true_grads = want
    dtype = grads["e"].dtype
    loss = out if isinstance(out, Tensor) else out.loss
    values = {"loss": (loss, truth.loss)}
    if not isinstance(out, Tensor):
        pairs = {n: (getattr(out, n), getattr(truth, n)) for n in ("lse", "entropy")}
        values |= {n: pair for n, pair in pairs.items() if pair[0] is not None}
    for name, (actual, true) in values.items():
        tol = scale * VALUE_TOL[dtype]
        # nll = lse - s_y cancels: its error is that of logits of size ten, not of its own size.
        assert_close(actual, true, rtol=tol, floor=scale * VALUE_FLOOR, what=name)
    assert grads.keys() == true_grads.keys()
    for name, grad in grads.items():
        tol = scale * GRAD_TOL[grad.dtype]
        assert_close(grad, true_grads[name], rtol=tol, floor=floor, what=f"d{name}")
