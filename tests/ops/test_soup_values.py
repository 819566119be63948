"""`soup_` and `soup` against float64, with every dtype, layout and rounding."""

from __future__ import annotations

import pytest
import torch
from soup_problem import DEVICES, DTYPES, assert_same_bits, check_rounded, generator, models, ulp

from gemma_ext.ops.souping import Part, soup, soup_
from gemma_ext.reference import souping as formulas

pytestmark = pytest.mark.parametrize("device", DEVICES)


def expected(part: Part, weights, scale=1.0):
    x = torch.stack([x.cpu().double().reshape(-1) for x in part.sources])
    base = None if part.base is None else part.base.cpu().double().reshape(-1)
    mixed = torch.zeros(x.shape[1], dtype=torch.float64)
    for w, row in zip(weights, x, strict=True):
        mixed += w * (row if base is None else row - base)
    return mixed if base is None else base + scale * mixed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("base", [True, False], ids=["base", "plain"])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 16])
def test_weighted_sum_is_rounded_once(dtype, base, count, device):
    part = models((71, 611), count, dtype=dtype, base=base, seed=count, device=device)
    w = torch.rand(count, generator=generator(1), dtype=torch.float64)
    w = w / w.sum()
    soup_([part], w, scale=0.7)
    check_rounded(part.out, expected(part, w, 0.7))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("base", [True, False], ids=["base", "plain"])
def test_wide_sums_are_right_everywhere(dtype, base, device):
    part = models((91, 517), 5, dtype=dtype, base=base, seed=3, device=device)
    w = torch.rand(5, generator=generator(2), dtype=torch.float64)
    soup_([part], w, scale=1.3, wide=True)
    check_rounded(part.out, expected(part, w, 1.3), share=1.0, slack=1e-6)


@pytest.mark.parametrize("count", range(1, 17))
def test_any_number_of_models(count, device):
    part = models((5, 101), count, seed=count, device=device)
    soup_([part], [1.0 / count] * count)
    check_rounded(part.out, expected(part, [1.0 / count] * count), share=0.998)


def test_no_model_gives_the_base(device):
    part = models((3, 7), 0, device=device)
    soup_([part], [])
    assert torch.equal(part.out, part.base)


def test_dtypes_may_differ(device):
    dtypes = [torch.float16, torch.float32, torch.bfloat16, torch.bfloat16]
    for out in DTYPES:
        part = models((67, 129), 3, dtype=dtypes, out=out, seed=5, device=device)
        soup_([part], [0.2, 0.5, 0.3])
        assert part.out.dtype == out
        check_rounded(part.out, expected(part, [0.2, 0.5, 0.3]), share=0.999)


@pytest.mark.parametrize("base", [True, False], ids=["base", "plain"])
def test_one_hot_weights_give_that_model(base, device):
    part = models((33, 65), 3, base=base, seed=6, device=device)
    for m in range(3):
        soup_([part], [float(k == m) for k in range(3)])
        assert torch.equal(part.out, part.sources[m])


def test_weights_of_nothing_give_the_base(device):
    part = models((33, 65), 3, seed=7, device=device)
    soup_([part], 0.0)
    assert torch.equal(part.out, part.base)
    soup_([part], [0.3, 0.2, 0.5], scale=0.0)
    assert torch.equal(part.out, part.base)


@pytest.mark.parametrize("shape", [(0,), (1,), (), (0, 5), (1, 1), (3, 5, 7)], ids=str)
def test_sizes(shape, device):
    part = models(shape, 3, seed=8, device=device)
    soup_([part], [0.2, 0.3, 0.5])
    assert part.out.shape == shape
    check_rounded(part.out, expected(part, [0.2, 0.3, 0.5]))


def test_nothing_at_all(device):
    soup_([], [])
    assert soup([], torch.zeros(0)) == []


def test_many_tensors_with_weights_of_their_own(device):
    parts = [models((3 + t, 17), 2, name=f"t{t}", seed=t, device=device) for t in range(40)]
    w = torch.rand(40, 2, generator=generator(3), dtype=torch.float64)
    scale = torch.rand(40, generator=generator(4), dtype=torch.float64)
    soup_(parts, w, scale=scale)
    for part, mine, s in zip(parts, w, scale, strict=True):
        check_rounded(part.out, expected(part, mine, float(s)), share=0.99)


@pytest.mark.parametrize("shape", [(37, 23), (5, 1), (4, 700), (11,)], ids=str)
def test_weights_of_rows(shape, device):
    parts = [models(shape, 3, seed=9, device=device), models((2, 9), 3, seed=10, device=device)]
    rows = [1 if len(shape) == 1 else shape[0], 2]
    w = torch.rand(sum(rows), 3, generator=generator(5), dtype=torch.float64)
    scale = torch.rand(sum(rows), generator=generator(6), dtype=torch.float64)
    soup_(parts, w, scale=scale, rows=True)
    first = 0
    for part, count in zip(parts, rows, strict=True):
        for r in range(count):
            row = Part(
                [x.reshape(count, -1)[r] for x in part.sources], part.base.reshape(count, -1)[r]
            )
            want = expected(row, w[first + r], float(scale[first + r]))
            check_rounded(part.out.reshape(count, -1)[r], want, share=0.98)
        first += count


def test_any_layout(device):
    part = models((30, 40), 3, seed=11, device=device)
    want = models((30, 40), 3, seed=11, device=device)
    soup_([want], [0.5, 0.2, 0.3])
    strided = Part(
        [x.T.contiguous().T for x in part.sources],
        torch.stack([part.base, part.base], -1)[..., 0],
        torch.empty(40, 30, dtype=part.out.dtype, device=device).T,
        part.name,
    )
    soup_([strided], [0.5, 0.2, 0.3])
    assert torch.equal(strided.out, want.out)
    skewed = Part(  # not at multiples of a vector
        [torch.cat([x.reshape(-1)[:1], x.reshape(-1)])[1:] for x in part.sources],
        part.base.reshape(-1),
        torch.empty(1203, dtype=part.out.dtype, device=device)[3:],
        part.name,
    )
    soup_([skewed], [0.5, 0.2, 0.3])
    assert torch.equal(skewed.out.reshape(30, 40), want.out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("which", ["base", 0, 2])
def test_out_may_be_an_input(dtype, which, device):
    part = models((60, 70), 3, dtype=dtype, seed=12, device=device)
    soup_([part], [0.5, 0.2, 0.3])
    target = part.base if which == "base" else part.sources[which]
    soup_([Part(part.sources, part.base, target, part.name)], [0.5, 0.2, 0.3])
    assert_same_bits(target, part.out)


def test_large_results_that_go_past_the_caches(device):
    part = models((1021, 8501), 2, spread=1e-2, seed=13, device=device)
    soup_([part], [0.25, 0.5])
    x, y = (s.float() for s in part.sources)
    base = part.base.float()
    want = (base + (0.25 * (x - base) + 0.5 * (y - base))).to(part.out.dtype)
    assert torch.equal(part.out, want)


SPECIAL = (0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-40, -1e-45, 3.3e38, 1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_special_values(dtype, rounding, device):
    grid = torch.tensor(SPECIAL, device=device)
    a, b = grid.repeat(len(SPECIAL)).to(dtype), grid.repeat_interleave(len(SPECIAL)).to(dtype)
    for base in (None, torch.ones_like(a)):
        out = torch.empty_like(a)
        soup_([Part([a, b], base, out)], [0.5, 0.5], rounding=rounding)
        want = formulas.rounded(expected(Part([a, b], base), [0.5, 0.5]), dtype).to(device)
        assert torch.equal(out.isnan(), want.isnan())
        assert torch.equal(out.isinf(), want.isinf())
        if rounding == "nearest":
            assert torch.equal(out.nan_to_num(7.0), want.nan_to_num(7.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_stochastic_rounding_is_unbiased(dtype, device):
    """Every value becomes one of its neighbours, and their mean is the value."""
    n, x = 40_000, 0.0201234
    part = Part(
        [torch.full((n,), x, device=device)], None, torch.empty(n, dtype=dtype, device=device)
    )
    soup_([part], 1.0, rounding="stochastic", seed=4)
    step = float(ulp(torch.tensor(x, dtype=torch.float64), dtype))
    found = part.out.double().cpu()
    assert ((found - x).abs() < step).all()
    assert len(found.unique()) == 2
    assert abs(float(found.mean()) - x) < 4 * 0.5 * step / n**0.5


def test_stochastic_rounding_of_tiny_halves(device):
    for x in (3e-6, 2.0**-24 * 0.3, 2.0**-30, 2.0**-36):
        n = 1 << 20
        out = torch.empty(n, dtype=torch.float16, device=device)
        soup_([Part([torch.full((n,), x, device=device)], None, out)], 1.0, rounding="stochastic")
        found = out.double().cpu()
        assert abs(float(found.mean()) - x) <= 4 * (2.0**-24 * x / n) ** 0.5


def test_small_steps_add_up_under_stochastic_rounding(device):
    """200 additions of 2e-4 of a bfloat16 0.02 reach 0.020819; nearest rounding stays behind."""
    n = 4096
    start, step = torch.full((n,), 0.02, device=device), 0.02 * 2e-4
    for rounding in ("nearest", "stochastic"):
        x = start.bfloat16()
        exact = float(x[0])
        for i in range(200):
            exact = exact + step
            more = torch.full((n,), step, device=device)
            soup_([Part([x, more], None, x, "x")], [1.0, 1.0], rounding=rounding, seed=i)
        error = abs(float(x.double().mean()) - exact)
        assert error > 5e-4 if rounding == "nearest" else error < 4 * 3.1e-4 / n**0.5


def test_stochastic_rounding_depends_on_seed_name_and_position(device):
    part = models((50, 60), 2, seed=14, device=device)

    def rounded(seed, name="w"):
        out = torch.empty_like(part.out)
        soup_([Part(part.sources, part.base, out, name)], 0.5, rounding="stochastic", seed=seed)
        return out

    assert torch.equal(rounded(1), rounded(1))
    assert not torch.equal(rounded(1), rounded(2))
    assert not torch.equal(rounded(1), rounded(1, "v"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reference_is_the_formula(dtype, device):
    part = models((31, 33), 3, dtype=dtype, seed=15, device=device)
    soup_([part], [0.3, 0.3, 0.4], scale=1.1, impl="reference")
    want = expected(part, [0.3, 0.3, 0.4], 1.1)
    assert_same_bits(part.out.cpu(), formulas.rounded(want, dtype).reshape(part.out.shape))
    check_rounded(part.out, want, share=1.0, slack=0)


def test_rounding_of_float64_happens_once(device):
    """Values just beside a midpoint of bfloat16, which float32 would move onto it."""
    for dtype in (torch.bfloat16, torch.float16):
        half = torch.finfo(dtype).eps / 2
        mid = torch.tensor([1 + half, 1 + 3 * half, 1 + half, -1 - half], dtype=torch.float64)
        x = mid + torch.tensor([1e-12, -1e-12, -1e-12, -1e-12], dtype=torch.float64)
        want = torch.tensor([1 + 2 * half, 1 + 2 * half, 1.0, -1 - 2 * half], dtype=torch.float64)
        assert torch.equal(formulas.rounded(x, dtype).double(), want)


def test_gradients(device):
    parts = [models((9, 31), 3, dtype=torch.float32, seed=t, device=device) for t in range(3)]
    parts[1] = Part(parts[1].sources, parts[1].base, None, "y")
    tensors = [x.requires_grad_() for part in parts for x in (*part.sources, part.base)]
    w = torch.rand(3, 3, generator=generator(8)).to(device).requires_grad_()
    scale = torch.rand(3, generator=generator(9)).to(device).requires_grad_()
    outs = soup(parts, w, scale=scale)
    upstream = [torch.randn(9, 31, generator=generator(t)).to(device) for t in range(3)]
    found = torch.autograd.grad(outs, [w, scale, *tensors], upstream)
    want = torch.zeros(())
    wide = [x.detach().double().requires_grad_() for x in (w, scale, *tensors)]
    for t, g in enumerate(upstream):
        *xs, base = wide[2 + 4 * t : 6 + 4 * t]
        mixed = sum(wide[0][t, m] * (x - base) for m, x in enumerate(xs))
        want = want + ((base + wide[1][t] * mixed) * g).sum()
    for a, b in zip(found, torch.autograd.grad(want, wide), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)


def test_gradients_without_a_base_and_in_bfloat16(device):
    part = models((40, 50), 2, base=False, seed=16, device=device)
    w = torch.tensor([0.4, 0.6], device=device, requires_grad=True)
    (out,) = soup([part], w)
    g = torch.randn(40, 50, generator=generator(10)).bfloat16().to(device)
    (found,) = torch.autograd.grad(out, w, g)
    want = torch.stack([(x.double() * g.double()).sum() for x in part.sources])
    torch.testing.assert_close(found.double(), want, rtol=1e-6, atol=0)


def test_a_gradient_that_is_not_wanted_is_not_computed(device):
    part = models((4, 5), 2, dtype=torch.float32, device=device)
    part.sources[1].requires_grad_()
    (out,) = soup([part], torch.tensor([0.5, 0.5], device=device))
    out.sum().backward()
    torch.testing.assert_close(part.sources[1].grad, torch.full((4, 5), 0.5, device=device))
    assert part.sources[0].grad is None


def test_second_derivatives_are_refused(device):
    part = models((4, 5), 2, dtype=torch.float32, device=device)
    w = torch.tensor([0.5, 0.5], device=device, requires_grad=True)
    (out,) = soup([part], w)
    (grad,) = torch.autograd.grad(out.square().sum(), w, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_a_live_parameter_is_written_and_autograd_knows(device):
    x = torch.nn.Parameter(torch.ones(8, device=device))
    y = (x * x).sum()
    soup_([Part([x], None, x)], 2.0)
    assert torch.equal(x.detach(), torch.full((8,), 2.0, device=device))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
