"""Spherical methods: what the Gram matrix gives against iterations on the vectors themselves."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from merge_oracle import SHAPES, assert_near, family, run, stack, tensors

from gemma_ext.souping.methods import METHODS, directions


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x)


def arc(t: float, a: np.ndarray, b: np.ndarray, straight: float) -> np.ndarray:
    c = float(unit(a) @ unit(b))
    if abs(c) > straight:
        return (1 - t) * a + t * b
    angle = math.acos(c)
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


def by_lines(f, *arrays, axis=None):
    """f of the flattened arrays, of their rows (axis -1) or of their columns (axis 0)."""
    if axis is None or arrays[0].ndim == 1:
        return f(*(x.ravel() for x in arrays)).reshape(arrays[0].shape)
    moved = [np.moveaxis(x, axis, -1) for x in arrays]
    lines = [f(*line) for line in zip(*moved, strict=True)]
    return np.moveaxis(np.stack(lines), -1, axis)


@pytest.mark.parametrize("size", [0.01, 3.0], ids=["straight", "arc"])
@pytest.mark.parametrize("t", [0.2, 0.5])
def test_slerp(size, t):
    tunes, base = family(1, seed=2, size=size)
    got = run(METHODS["slerp"], tunes, base, t=t)
    true = {
        n: by_lines(
            lambda a, b: arc(t, a, b, 0.9995),
            base[n].double().numpy(),
            tunes[0][n].double().numpy(),
        )
        for n in SHAPES
    }
    assert_near(got, {n: torch.from_numpy(x) for n, x in true.items()})


def test_slerp_of_opposites_is_a_line():
    base = tensors(0)
    other = [{n: -t for n, t in base.items()}]
    assert_near(run(METHODS["slerp"], other, base, t=0.5), {n: 0 * t for n, t in base.items()})


@pytest.mark.parametrize("based", [False, True])
@pytest.mark.parametrize(
    ("flatten", "row_wise", "axis"), [(True, False, None), (False, False, -1), (False, True, 0)]
)
def test_nuslerp(based, flatten, row_wise, axis):
    tunes, base = family(2, seed=2, size=0.5)
    got = run(METHODS["nuslerp"], tunes, base if based else None, weight=[0.3, 0.9],
              nuslerp_flatten=flatten, nuslerp_row_wise=row_wise)  # fmt: skip
    true = {}
    for n in SHAPES:
        origin = base[n].double().numpy() if based else 0.0
        a, b = (tune[n].double().numpy() - origin for tune in tunes)
        true[n] = torch.from_numpy(
            origin + by_lines(lambda x, y: arc(0.75, x, y, 1 - 1e-15), a, b, axis=axis)
        )
    assert_near(got, true)


def test_nuslerp_of_weights_that_cancel_takes_the_middle():
    tunes, _ = family(2, size=0.5)
    one = run(METHODS["nuslerp"], tunes, weight=[1.0, -1.0])
    assert_near(one, run(METHODS["nuslerp"], tunes, weight=[0.4, 0.4]), 1e-7)


def multislerp(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(x, axis=1)
    u = x / lengths[:, None]
    m = unit(weights @ u)
    v = weights @ (u - (u @ m)[:, None] * m)
    angle = np.linalg.norm(v)
    turned = math.cos(angle) * m + (math.sin(angle) * v / angle if angle > 0 else 0)
    return turned * (weights @ lengths)


@pytest.mark.parametrize("size", [0.05, 2.0])
@pytest.mark.parametrize("based", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_multislerp(size, based, normalize):
    tunes, base = family(4, seed=1, size=size)
    weights = np.array([0.3, 0.1, 0.9, 0.4])
    got = run(METHODS["multislerp"], tunes, base if based else None, weight=list(weights),
              normalize_weights=normalize)  # fmt: skip
    used = weights / weights.sum() if normalize else weights
    true = {}
    for n, shape in SHAPES.items():
        origin = base[n].double().numpy().ravel() if based else 0.0
        x = np.stack([tune[n].double().numpy().ravel() for tune in tunes]) - origin
        true[n] = torch.from_numpy((origin + multislerp(x, used)).reshape(shape))
    assert_near(got, true, 5e-6)


def test_multislerp_has_no_middle_of_what_cancels():
    base = tensors(0, shapes={"w": (6,)})
    opposite = {"w": -base["w"]}
    two = run(METHODS["multislerp"], [base, opposite], weight=0.5)
    assert_near(two, {"w": torch.zeros(6)})
    three = [{"w": torch.tensor(v)} for v in ([1.0, 0.0], [-0.5, 0.75**0.5], [-0.5, -(0.75**0.5)])]
    with pytest.raises(ValueError, match=r"expected directions whose weighted mean is not zero"):
        run(METHODS["multislerp"], three, weight=1.0, eps=1e-6)


def karcher(x: np.ndarray, steps: int, tol: float) -> np.ndarray:
    lengths = np.linalg.norm(x, axis=1)
    held = x[lengths > 0] / lengths[lengths > 0, None]
    u = unit(held.mean(0))
    for _ in range(steps):
        c = np.clip(held @ u, -1, 1)
        angle = np.arccos(c)
        factor = np.where(angle > 1e-9, angle / np.maximum(np.sin(angle), 1e-300), 1.0)
        step = (factor[:, None] * (held - c[:, None] * u)).mean(0)
        length = np.linalg.norm(step)
        if length < tol:
            break
        u = unit(math.cos(length) * u + math.sin(length) * step / length)
    return u * lengths.mean()


@pytest.mark.parametrize("size", [0.01, 0.3, 2.0])
@pytest.mark.parametrize("steps", [1, 10, 100])
def test_karcher(size, steps):
    tunes, base = family(3, seed=6, size=size)
    got = run(METHODS["karcher"], tunes, max_iter=steps, tol=1e-10)
    true = {
        n: torch.from_numpy(
            karcher(np.stack([t[n].double().numpy().ravel() for t in tunes]), steps, 1e-10)
        ).view(base[n].shape)
        for n in SHAPES
        if base[n].numel() > 1
    }
    assert_near({n: got[n] for n in true}, true, 5e-6)


def test_karcher_is_the_mean_of_directions():
    """The logarithms at the mean add up to nothing."""
    x = torch.randn(5, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mean = directions.karcher(x @ x.T, max_iter=200, tol=1e-12) @ x
    u, units = mean / mean.norm(), x / x.norm(dim=1, keepdim=True)
    c = units @ u
    logs = (c.acos() / (1 - c * c).sqrt()).unsqueeze(1) * (units - c.unsqueeze(1) * u)
    assert float(logs.sum(0).norm()) < 1e-10
    assert float(mean.norm()) == pytest.approx(float(x.norm(dim=1).mean()))


@pytest.mark.parametrize("name", ["karcher", "multislerp"])
def test_zero_tensors_have_no_direction(name):
    zero = {"w": torch.zeros(5)}
    more = {} if name == "karcher" else {"weight": 1.0}
    assert_near(run(METHODS[name], [zero, zero], **more), zero)
    if name == "karcher":
        one = {"w": torch.arange(5.0)}
        assert_near(run(METHODS[name], [zero, one]), {"w": torch.arange(5.0) / 2})


def test_karcher_of_antipodes_is_one_of_them():
    x = torch.arange(6.0)
    assert_near(run(METHODS["karcher"], [{"w": x}, {"w": -x}]), {"w": x}, 1e-6)


@pytest.mark.parametrize("filter_wise", [False, True])
def test_model_stock(filter_wise):
    tunes, base = family(3, seed=8)
    got = run(METHODS["model_stock"], tunes, base, filter_wise=filter_wise)
    true = {}
    for n in SHAPES:
        d, b = stack(tunes, base, n).numpy(), base[n].double().numpy()
        rows = d.reshape(3, -1, d.shape[-1]) if filter_wise else d.reshape(3, 1, -1)
        merged = np.empty(rows.shape[1:])
        for r in range(rows.shape[1]):
            pairs = [
                rows[i, r]
                @ rows[j, r]
                / max(np.linalg.norm(rows[i, r]) * np.linalg.norm(rows[j, r]), 1e-6)
                for i in range(3)
                for j in range(i)
            ]
            c = np.mean(pairs)
            t = 3 * c / (1 + 2 * c) if abs(1 + 2 * c) >= 1e-6 else 0.0
            merged[r] = t * rows[:, r].mean(0)
        true[n] = torch.from_numpy(b + merged.reshape(b.shape))
    assert_near(got, true, 1e-5)


def test_model_stock_of_opposing_deltas_is_the_base():
    tunes, base = family(1)
    opposite = {n: 2 * base[n] - tunes[0][n] for n in base}
    assert_near(run(METHODS["model_stock"], [tunes[0], opposite], base), base, 1e-6)


@pytest.mark.parametrize("gap", [1e-3, 1e-5, 1e-7])
def test_nearly_parallel_directions_keep_their_angle(gap):
    """bfloat16 siblings: the cosine is one but for its last digits."""
    a, b = torch.zeros(2, 2, dtype=torch.float64).fill_diagonal_(1.0)
    other = math.cos(gap) * a + math.sin(gap) * b
    x = torch.stack([a, other])
    middle = directions.slerp(x @ x.T, 0.25) @ x
    true = math.cos(gap / 4) * a + math.sin(gap / 4) * b
    assert float((middle - true).norm()) < 1e-15
