"""What the device code promises beside the oracle tests; run by tests/simt/test_ops_on_host.py.

The plugin device_code stands in for CUDA: kernels as fibers, values out of Python's sight.
"""

from __future__ import annotations

import pytest
import torch
from cce_filter_oracle import zipf_problem
from cce_impls import KERNELS, Impl
from cce_oracle import assert_close, check, expected, gradients, problem, run
from device_code import schedule
from divergence_oracle import KINDS
from hypothesis import HealthCheck, given, settings
from test_cce_floors import check_common_number, check_rivals
from test_cce_fuzz import calls, check_call
from torch.utils._python_dispatch import TorchDispatchMode

from gemma_ext import linear_cross_entropy, linear_divergence, linear_logprobs

aten = torch.ops.aten
WAITS = {
    aten._local_scalar_dense,
    aten.equal,
    aten.is_nonzero,
    aten.item,
    aten.masked_select,
    aten.nonzero,
    aten.unique_consecutive,
    aten._unique2,
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IDS = ["fp32", "bf16", "fp16"]
AUTO = Impl("auto", "auto")


class NoWaiting(TorchDispatchMode):
    """Refuses what would make the host wait for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket not in WAITS, f"{func} reads a value"
        if func.overloadpacket in (aten.index, aten.index_put, aten.index_put_):
            assert all(i is None or i.dtype != torch.bool for i in args[1]), f"{func} by a mask"
        return func(*args, **(kwargs or {}))


# Rows around a block of 128, words around a tile of 256 and its half, widths around a step of 64
# and a 16-byte word.
@pytest.mark.parametrize(
    ("n", "v", "d"),
    [(0, 255, 8), (1, 1, 1), (127, 255, 7), (128, 256, 64), (129, 257, 65), (2, 129, 300)],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("impl", KERNELS, ids=str, indirect=True)
def test_shapes(impl, dtype, n, v, d):
    p = problem(n, d, v, ignored=0.1, dtype=dtype, seed=1)
    options = {"softcap": 5.0, "reduction": "sum"}
    floor = 1e-6 if v == 1 else 1e-8  # p - 1 = 0 has no relative error
    check(run(impl.loss, p, **options), expected(p, **options), floor=floor)


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("impl", KERNELS, ids=str, indirect=True)
def test_lean_shapes(impl, reduction, dtype):
    p = problem(130, 40, 600, ignored=0.2, dtype=dtype, seed=1)
    options = {"softcap": 5.0, "reduction": reduction}
    check(run(impl.loss, p, memory="lean", **options), expected(p, **options))


def test_lean_loss_is_the_default_loss():
    p = zipf_problem(130, 40, 600, ignored=0.2, dtype=torch.bfloat16, seed=1)
    flags = {"return_lse": True, "return_entropy": True, "return_argmax": True}
    usual, lean = (
        run(linear_cross_entropy, p, reduction="none", memory=memory, **flags)[0]
        for memory in ("default", "lean")
    )
    assert torch.equal(usual.argmax, lean.argmax)
    for name in ("loss", "lse", "entropy"):
        torch.testing.assert_close(getattr(lean, name), getattr(usual, name), rtol=0, atol=2e-6)


def test_lean_draws_are_unbiased():
    """Masses are rounded to 8 bits before the draw, which weighs by what it has drawn with."""
    p = zipf_problem(40, 24, 1000, dtype=torch.float32, seed=2)
    _, want = run(linear_cross_entropy, p, impl="exact")
    total = {name: torch.zeros_like(g, dtype=torch.float64) for name, g in want.items()}
    seeds, spread = 12, {}
    for seed in range(seeds):
        _, got = run(linear_cross_entropy, p, filter_eps=2.0**-5, filter_seed=seed, memory="lean")
        for name, g in got.items():
            total[name] += g.double() / seeds
            error = (g.double() - want[name].double()).norm() / want[name].double().norm()
            spread[name] = max(spread.get(name, 0.0), float(error))
    for name, g in want.items():
        error = (total[name] - g.double()).norm() / g.double().norm()
        assert spread[name] > 2e-3, f"d{name}: nothing was left out"
        assert error < 1.5 * spread[name] / seeds**0.5, f"d{name}: {error:.1e}"


OPTIONS = {
    "lean": {"memory": "lean", "return_entropy": True, "return_stats": True},
    "lean exact": {"memory": "lean", "impl": "exact"},
    "mean": {},
    "everything": {
        "softcap": 5.0,
        "logit_scale": 1.3,
        "temperature": 0.8,
        "label_smoothing": 0.1,
        "z_loss": 0.1,
        "shift": 1,
        "weight": torch.linspace(0.1, 1, 300),
        "token_weights": torch.linspace(0.5, 1.5, 24).reshape(2, 12),
        "return_lse": True,
        "return_entropy": True,
        "return_argmax": True,
        "return_stats": True,
    },
    "exact": {"impl": "exact", "z_loss": 0.1},
    "none": {"reduction": "none"},
    "threshold": {"filter_eps": 2.0**-8},
    "items": {"num_items_in_batch": torch.tensor(20)},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("name", OPTIONS)
def test_no_value_is_read(name, dtype):
    p = problem((2, 12), 16, 300, ignored=0.2, dtype=dtype)
    with NoWaiting():
        _, grads = run(linear_cross_entropy, p, 0.5, **OPTIONS[name])
    assert grads.keys() == {"e", "c", "bias"}


def test_no_value_is_read_for_log_probabilities():
    p = problem((2, 12), 16, 300, ignored=0.2)
    with NoWaiting():
        leaves = p.leaves()
        logp, entropy = linear_logprobs(leaves["e"], leaves["c"], p.targets, shift=1)
        gradients((logp + entropy).sum(), leaves)


@pytest.mark.parametrize("kind", KINDS)
def test_no_value_is_read_for_a_divergence(kind):
    p = problem((2, 12), 16, 300, ignored=0.2, dtype=torch.bfloat16)
    with NoWaiting():
        leaves = p.leaves()
        heads = (leaves["e"], leaves["c"], p.e.flip(0), p.c)
        loss = linear_divergence(*heads, p.targets, kind=kind, shift=1, ce_weight=0.5)
        gradients(loss, leaves)


def test_a_loss_scale_is_not_rounded_to_the_dtype_of_the_gradients():
    """A third is off by 2^-9 in bfloat16; the gradients made in the forward are scaled by it."""
    p = problem(64, 64, 300, dtype=torch.bfloat16)
    _, plain = run(linear_cross_entropy, p, 1.0, impl="exact")
    _, scaled = run(linear_cross_entropy, p, 1 / 3, impl="exact")
    for name in ("e", "c"):
        x, y = plain[name].double(), scaled[name].double()
        assert ((x * y).sum() / (x * x).sum()).item() == pytest.approx(1 / 3, rel=3e-4)


@pytest.mark.parametrize("impl", [*KERNELS, AUTO], ids=str, indirect=True)
def test_rivals_in_the_labels_own_tile_are_not_lost(impl):
    check_rivals(impl, 20.0, 20 * 2.0**-16)


@pytest.mark.parametrize("impl", [*KERNELS, AUTO], ids=str, indirect=True)
def test_a_number_common_to_all_logits_costs_its_own_rounding(impl):
    check_common_number(impl, 16384.0, "none")


@pytest.mark.parametrize("value", [400, -1, 2**31, -(2**40), 2**62])
@pytest.mark.parametrize("impl", [*KERNELS, AUTO], ids=str, indirect=True)
def test_label_outside_the_vocabulary_makes_its_loss_nan(impl, value):
    p = problem(20, 24, 400, ignored=0.2, seed=5)
    p.targets[7] = 3
    want, _ = expected(p, reduction="none")
    p.targets[7] = value
    loss, _ = run(impl.loss, p, reduction="none")
    others = torch.arange(20) != 7
    assert torch.isnan(loss).nonzero().tolist() == [[7]]
    assert_close(loss[others], want.loss[others], rtol=5e-6, floor=2e-6)
    assert torch.isnan(impl.loss(p.e, p.c, p.targets))
    assert torch.isnan(run(impl.loss, p)[0])


@pytest.mark.parametrize("impl", [*KERNELS, AUTO], ids=str, indirect=True)
def test_labels_are_checked_on_request(impl, monkeypatch):
    p = problem((2, 6), 24, 400, seed=5)
    p.targets[:, 0] = -3  # no position predicts the first label of a sequence
    monkeypatch.setenv("GEMMA_EXT_CHECK_LABELS", "1")
    check(run(impl.loss, p, shift=1), expected(p, shift=1))
    p.targets[1, 3], p.targets[1, 4] = 4242, -7
    message = r"expected targets in \[0, 400\) or ignore_index -100, got 4242 at flat position 9"
    for call in (
        lambda: impl.loss(p.e, p.c, p.targets, shift=1),
        lambda: run(impl.loss, p, shift=1),
        lambda: impl.logprobs(p.e, p.c, p.targets, shift=1),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    impl.rows(p.e.reshape(12, 24), p.c, p.targets.reshape(12), missing_target="none")
    monkeypatch.setenv("GEMMA_EXT_CHECK_LABELS", "0")
    assert torch.isnan(impl.loss(p.e, p.c, p.targets, shift=1))


@pytest.mark.parametrize("impl", [*KERNELS, Impl("cce", 2.0**-8)], ids=["exact", "all", "filter"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("memory", ["default", "lean"])
def test_runs_are_equal_bit_for_bit(impl, dtype, memory):
    """In whatever order the device runs its threads."""
    p = zipf_problem(130, 40, 600, ignored=0.2, dtype=dtype, seed=1)
    flags = {"return_lse": True, "return_entropy": True, "return_argmax": True}
    runs = []
    for seed in range(3):
        schedule(seed)
        out, grads = run(impl.loss, p, softcap=10.0, memory=memory, **flags)
        bare, bare_grads = run(impl.loss, p, softcap=10.0, memory=memory)
        values = (out.loss, out.lse, out.entropy, out.argmax, bare)
        runs.append([*values, *grads.values(), *bare_grads.values()])
    schedule(0)
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(calls)
def test_any_call_matches_float64(call):
    check_call(call, KERNELS)
