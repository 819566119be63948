"""Every option of the loss against float64."""

from __future__ import annotations

import pytest
import torch
from gpu_problem import DEVICE, DTYPES, FORMS, IGNORE, check, error, ours, problem, truth

import gemma_ext
from gemma_ext.reference import cce as reference

N, D, V = 130, 72, 600


def positive(size: int, seed: int) -> torch.Tensor:
    """Weights of which every fifth is zero."""
    weights = torch.rand(size, generator=torch.Generator().manual_seed(seed)) + 0.1
    weights[::5] = 0
    return weights.to(DEVICE)


OPTIONS = {
    "mean": lambda: {"reduction": "mean"},
    "softcap": lambda: {"softcap": 4.0},
    "scale": lambda: {"logit_scale": -1.5},
    "temperature": lambda: {"temperature": 0.6, "softcap": 5.0},
    "ignore": lambda: {"ignore_index": 3},
    "shift": lambda: {"shift": 2},
    "smoothing": lambda: {"label_smoothing": 0.2, "softcap": 5.0},
    "z_loss": lambda: {"z_loss": 0.05},
    "weight": lambda: {"weight": positive(V, 1), "label_smoothing": 0.1},
    "tokens": lambda: {"token_weights": positive(N, 2), "reduction": "mean"},
    "items": lambda: {"num_items_in_batch": torch.tensor(11, device=DEVICE), "reduction": "mean"},
}


@pytest.mark.parametrize("form", ["fused", "filtered"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_option(name, dtype, form):
    p = problem(N, D, V, dtype, bias=True)
    options = FORMS[form] | OPTIONS[name]()
    if name == "ignore":
        p.targets[::3] = 3
        p.targets.clamp_(min=0)
    # of a mean of losses, fp16 gradients are subnormal
    check(ours(p, **options), truth(p, **options), scale=4 if dtype == torch.float16 else 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logprobs_and_entropy(dtype):
    p = problem(N, D, V, dtype)
    upstream = torch.randn(2, N, generator=torch.Generator().manual_seed(3)).to(DEVICE)

    def run(function, leaves, **options):
        values = torch.stack(function(targets=p.targets, softcap=6.0, **leaves, **options))
        (values * upstream).sum().backward()
        return {"loss": values.detach()} | {f"d{name}": t.grad for name, t in leaves.items()}

    got = run(gemma_ext.linear_logprobs, p.leaves(), impl="exact")
    check(got, run(reference.linear_logprobs, p.leaves(torch.float64)), scale=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outputs_beside_the_loss(dtype):
    p = problem(N, D, V, dtype)
    want = reference.rows(
        p.e.double(), p.c.double(), p.targets, want_entropy=True, want_argmax=True
    )
    got = gemma_ext.linear_cross_entropy(
        p.e, p.c, p.targets, return_lse=True, return_entropy=True, return_argmax=True
    )
    assert error(got.lse, want.lse) < 1e-6
    assert error(got.entropy, want.lse - want.mean_logit) < 1e-5
    assert torch.equal(got.argmax, want.argmax)
    valid = p.targets != IGNORE
    assert float(got.accuracy) == pytest.approx(
        float((want.argmax == p.targets)[valid].double().mean()), abs=1e-6
    )


@pytest.mark.parametrize("wanted", ["e", "c", "bias"])
@pytest.mark.parametrize("form", ["fused", "filtered"])
def test_one_gradient_alone(form, wanted):
    p = problem(N, D, V, bias=True)
    want = truth(p)
    leaves = p.leaves()
    for name, leaf in leaves.items():
        leaf.requires_grad_(name == wanted)
    options = {"reduction": "sum"} | FORMS[form]
    gemma_ext.linear_cross_entropy(targets=p.targets, **leaves, **options).backward()
    check({f"d{wanted}": leaves[wanted].grad}, {f"d{wanted}": want[f"d{wanted}"]})


def test_autocast_computes_in_its_dtype():
    p = problem(N, D, V)
    with torch.autocast(DEVICE, torch.bfloat16):
        got = ours(p, impl="exact")
    rounded = problem(N, D, V, torch.bfloat16)
    want = ours(rounded, impl="exact")
    assert torch.equal(got["loss"], want["loss"])
    assert got["de"].dtype == torch.float32
    assert torch.equal(got["dc"], want["dc"].float())
