"""The atomic inner product, coherence and the windows, against dense float64 and known answers."""

import math

import numpy
import pytest
import torch

from gemma_ext.papers import atoms
from gemma_ext.papers.atoms.coherence import BINS, DECADES
from gemma_ext.papers.atoms.synthetic import random_world, spikes_and_waves


def normal(*shape, seed=None):
    generator = torch.Generator()
    generator.manual_seed(seed) if seed is not None else generator.seed()
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def dense_cosines(unit):
    g = (unit @ unit.T).abs()
    at = torch.ones_like(g, dtype=torch.bool).triu(1)
    return g, g[at].sort().values


def test_cosines_survive_every_linear_map_of_the_states():
    codes = normal(4000, 20).abs() * (normal(4000, 20) > 0.8)
    d, a = normal(20, 9), normal(9, 9)
    cosines = []
    for change in (torch.eye(9, dtype=torch.float64), a):
        moved, moments = d @ change.T, atoms.Moments(9)
        moments.add(codes @ moved)
        product = atoms.atomic_product(moments.matrix("raw"))
        unit = product.unit(moved)
        plain = torch.nn.functional.normalize(moved, dim=1)
        cosines.append((unit @ unit.T, plain @ plain.T))
    torch.testing.assert_close(cosines[0][0], cosines[1][0], rtol=0, atol=1e-9)
    assert (cosines[0][1] - cosines[1][1]).abs().max() > 0.1


def test_shrinkage_ends_the_invariance():
    d, a = normal(20, 6), torch.diag(torch.tensor([1.0, 1, 1, 1, 1, 100], dtype=torch.float64))
    units = []
    for change in (torch.eye(6, dtype=torch.float64), a):
        moved = d @ change
        units.append(atoms.atomic_product(moved.T @ moved, shrinkage=1e-2).unit(moved))
    assert (units[0] @ units[0].T - units[1] @ units[1].T).abs().max() > 1e-3


def test_a_square_dictionary_is_orthogonal_and_exact():
    d = normal(7, 7)
    product = atoms.product_of(d)
    unit = product.unit(d)
    torch.testing.assert_close(unit @ unit.T, torch.eye(7).double(), rtol=0, atol=1e-9)
    assert atoms.coherence(unit).largest < 1e-9
    torch.testing.assert_close(product.norms(d), torch.ones(7).double())


def test_the_product_of_the_atoms_is_a_projector():
    d = normal(31, 12)
    product = atoms.product_of(d)
    white = product.whiten(d)
    spectrum = torch.linalg.eigvalsh(white @ white.T)
    ones = torch.cat([torch.zeros(19), torch.ones(12)]).double()
    torch.testing.assert_close(spectrum, ones, rtol=0, atol=1e-10)
    torch.testing.assert_close(white.square().sum(), torch.tensor(12.0).double())


def test_encoder_rows_read_their_own_atom_with_gain_one():
    d = normal(10, 6)
    c = normal(6, 6)
    product = atoms.atomic_product(c @ c.T + torch.eye(6).double())
    s = torch.linalg.inv(c @ c.T + torch.eye(6).double())
    torch.testing.assert_close(product.norms(d), (d @ s * d).sum(1).sqrt())
    expected = d @ s / (d @ s * d).sum(1, keepdim=True)
    torch.testing.assert_close(product.encoder(d), expected)
    torch.testing.assert_close((product.encoder(d) @ d.T).diagonal(), torch.ones(10).double())
    torch.testing.assert_close(product.colour(product.whiten(d)), d)
    assert product.condition == pytest.approx(float(torch.linalg.cond(torch.linalg.inv(s))))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_moments_are_those_of_the_data(dtype):
    x = (normal(3, 41, 5) * 2 + 1).to(dtype)
    moments = atoms.Moments(5)
    for part in (x[:1], x[1:]):
        moments.add(part, tile=17)
    flat = x.reshape(-1, 5).double()
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    centred = torch.cov(flat.T, correction=0)
    torch.testing.assert_close(moments.matrix(), centred, rtol=tolerance, atol=tolerance)
    raw = flat.T @ flat / len(flat)
    torch.testing.assert_close(moments.matrix("raw"), raw, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(moments.mean, flat.mean(0))


def test_a_large_mean_costs_no_digits():
    x = (torch.randn(1_000_000, 4) + 100).bfloat16()
    moments = atoms.Moments(4)
    for part in x.split(65_536):
        moments.add(part)
    exact = torch.cov(x.double().T, correction=0)
    assert (moments.matrix() - exact).abs().max() < 1e-4
    assert exact.diagonal().mean() == pytest.approx(1.02, abs=0.01)


def test_non_negative_codes_need_the_centred_moment():
    generator = torch.Generator().manual_seed(0)
    d = torch.nn.functional.normalize(normal(60, 24, seed=1), dim=1)
    codes = torch.rand(100_000, 60, generator=generator, dtype=torch.float64)
    codes *= torch.rand(100_000, 60, generator=generator) < 0.1
    moments = atoms.Moments(24)
    moments.add(codes @ d)
    true = atoms.product_of(d).unit(d)
    error = {}
    for kind in ("raw", "centred"):
        unit = atoms.atomic_product(moments.matrix(kind)).unit(d)
        error[kind] = float((unit @ unit.T - true @ true.T).abs().max())
    assert error["centred"] < 0.02
    assert error["raw"] > 4 * error["centred"]


@pytest.mark.parametrize(("features", "width", "tile"), [(512, 48, 100), (37, 40, 1024), (2, 3, 1)])
def test_coherence_is_that_of_all_pairs(features, width, tile):
    unit = torch.nn.functional.normalize(normal(features, width), dim=1)
    found = atoms.coherence(unit, tile=tile)
    g, values = dense_cosines(unit)
    assert found.counts.sum() == found.pairs == values.numel()
    assert found.largest == pytest.approx(float(values[-1]), abs=1e-15)
    i, j = found.pair
    assert i < j
    assert g[i, j] == values[-1]
    for q in (0.01, 0.5, 0.99, 1.0):
        exact = float(values[max(1, math.ceil(q * values.numel())) - 1])
        assert atoms.exact_quantile(unit, found, q, tile=tile) == pytest.approx(exact, abs=1e-15)
        assert exact <= found.quantile(q) * (1 + 1e-12)
        assert found.quantile(q) <= exact * 10 ** (DECADES / BINS) * (1 + 1e-9)
    assert found.largest >= found.welch


@pytest.mark.parametrize("sign", [1, -1])
def test_a_copy_of_an_atom_is_seen(sign):
    unit = torch.nn.functional.normalize(normal(50, 20), dim=1)
    unit = torch.cat([unit, sign * unit[7:8]])
    found = atoms.coherence(unit, tile=16)
    assert found.largest == pytest.approx(1.0)
    assert found.pair == (7, 50)


def test_a_simplex_attains_the_welch_bound():
    width = 10
    corners = torch.eye(width + 1, dtype=torch.float64) - 1 / (width + 1)
    basis = torch.linalg.svd(corners).Vh[:width]
    unit = torch.nn.functional.normalize(corners @ basis.T, dim=1)
    found = atoms.coherence(unit)
    assert found.largest == pytest.approx(1 / width)
    assert found.welch == pytest.approx(1 / width)
    assert atoms.welch(5, 9) == 0


def test_babel_function_is_the_largest_sum_of_a_row():
    unit = torch.nn.functional.normalize(normal(45, 11), dim=1)
    g = (unit @ unit.T).abs().fill_diagonal_(0)
    expected = g.sort(dim=1, descending=True).values.cumsum(1).amax(0)
    for tile in (7, 64):
        torch.testing.assert_close(atoms.babel(unit, 44, tile=tile), expected[:44])
    torch.testing.assert_close(atoms.babel(unit, 3), expected[:3])


def test_how_sparse_a_code_must_be_to_be_unique():
    flat = torch.full((9,), 0.1).cumsum(0)  # mu_1(K) = K / 10
    assert atoms.unique_up_to(flat) == 5  # .5 + .4 < 1 and .6 + .5 > 1
    assert atoms.unique_up_to(torch.tensor([1.0])) == 0
    assert atoms.unique_up_to(torch.tensor([0.1, 0.2])) == 2


@pytest.mark.parametrize("k", [2, 4])
def test_restricted_isometry_is_within_gershgorin(k):
    unit = torch.nn.functional.normalize(normal(60, 30), dim=1)
    defect = atoms.isometry_defect(unit, k, 500)
    assert 0 < defect <= (k - 1) * atoms.coherence(unit).largest + 1e-12
    assert atoms.isometry_defect(torch.eye(8), k, 20) < 1e-6


def test_a_random_dictionary_is_as_incoherent_as_predicted():
    width, features = 144, 576
    unit = atoms.product_of(d := normal(features, width)).unit(d)
    found = atoms.coherence(unit)
    _, values = dense_cosines(unit)
    predicted = math.sqrt((1 - width / features) / width)
    assert values.square().mean().sqrt() == pytest.approx(predicted, rel=0.05)
    assert found.welch == pytest.approx(predicted, rel=0.01)
    assert found.quantile(0.99) == pytest.approx(2.576 * predicted, rel=0.05)
    k_11 = torch.zeros(5, dtype=torch.int64)
    k_11[4] = 1
    assert atoms.stability(found, k_11) > 0.85  # "stable", and it is noise


def equiangular(found, value):
    """The same record with every pair at one value."""
    counts = torch.zeros(BINS, dtype=torch.int64)
    counts[int((math.log10(value) / DECADES + 1) * BINS)] = found.pairs
    return atoms.Coherence(counts, value, (0, 1), found.features, found.width)


def test_stability_of_known_distributions():
    found = equiangular(atoms.coherence(torch.eye(11)), 0.1)
    tokens = torch.zeros(7, dtype=torch.int64)
    tokens[5] = 3
    assert atoms.stability(found, tokens) == 1  # 0.1 < 1/9
    assert atoms.stability(found, tokens.roll(1)) == 0  # 0.1 > 1/11
    half = torch.tensor([0, 1, 0, 0, 0, 0, 1])
    assert atoms.stability(found, half) == 0.5
    assert atoms.stability(found, torch.tensor([2])) == 1


def test_stability_against_a_search_over_quantiles():
    unit = torch.nn.functional.normalize(normal(80, 30), dim=1)
    found = atoms.coherence(unit)
    active = torch.tensor([1, 10, 40, 30, 9])
    running = active.cumsum(0) / active.sum()

    def holds(q):
        k = int(torch.searchsorted(running, q - 1e-9))
        return found.quantile(q) < atoms.uniqueness_bound(k)

    steps = [i / 4000 for i in range(1, 4001)]
    expected = max((q for q in steps if holds(q)), default=0.0)
    assert atoms.stability(found, active) == pytest.approx(expected, abs=2 / 4000)


def test_window_of_a_threshold():
    found = atoms.window(0.125, 3, 0.8, 1.0)
    assert found.low == 0.375
    assert found.high == pytest.approx(0.55)
    assert found.error == 0.25
    assert found.feasible
    assert found.middle == pytest.approx(0.4625)
    assert not atoms.window(0.125, 5, 0.8, 1.0).feasible
    with pytest.raises(ValueError, match=r"expected low < high, got low 0\.625, high 0\.3"):
        _ = atoms.window(0.125, 5, 0.8, 1.0).middle


def test_spikes_and_waves():
    world = spikes_and_waves(64, 3)
    found = atoms.coherence(world.atoms)
    assert found.largest == 0.125
    assert found.largest > atoms.uniqueness_bound(5)
    assert found.largest < atoms.uniqueness_bound(4)
    unit = atoms.product_of(world.atoms).unit(world.atoms)
    torch.testing.assert_close(unit @ unit.T, world.atoms @ world.atoms.T)
    comb = torch.zeros(64, dtype=torch.float64)
    comb[::8] = 1  # eight spikes, and eight waves
    waves = world.atoms[64:] @ comb
    assert int((waves.abs() > 1e-9).sum()) == 8
    torch.testing.assert_close(waves @ world.atoms[64:], comb)


def test_stretched_atoms_are_orthogonal_only_under_their_product():
    world = random_world(64, 32, 2, torch.Generator().manual_seed(3), stretch=30)
    plain = torch.nn.functional.normalize(world.atoms, dim=1)
    unit = atoms.product_of(world.atoms).unit(world.atoms)
    assert atoms.coherence(unit).quantile(0.99) < 0.7 * atoms.coherence(plain).quantile(0.99)


def test_files_of_second_moments(tmp_path):
    k = numpy.random.default_rng().normal(size=(50, 6)).astype("float32")
    path = tmp_path / "mom2.npz"
    numpy.savez(
        path,
        **{"mom2.constructor": "x", "mom2.count": 50, "mom2.mom2": k.T @ k, "sample_size": 50},
    )
    moment, count = atoms.load_mom2(path)
    assert count == 50
    torch.testing.assert_close(moment, torch.from_numpy(k.T @ k).double() / 50)
    numpy.savez(path, **{"mom2.count": 50})
    with pytest.raises(ValueError, match=r"expected arrays mom2\.mom2 and mom2\.count"):
        atoms.load_mom2(path)
    numpy.savez(path, **{"mom2.count": 0, "mom2.mom2": k})
    with pytest.raises(ValueError, match="expected a square sum over at least one sample"):
        atoms.load_mom2(path)


def test_bad_input_is_named():
    moments = atoms.Moments(4)
    with pytest.raises(ValueError, match="moments: expected at least one row"):
        moments.matrix()
    with pytest.raises(ValueError, match="kind: expected one of raw, centred, got 'mean'"):
        moments.matrix("mean")
    with pytest.raises(ValueError, match="x: expected rows of 4, got 5"):
        moments.add(torch.ones(2, 5))
    moments.add(torch.ones(0, 4))
    assert moments.count == 0
    with pytest.raises(ValueError, match="moment: expected a square matrix"):
        atoms.atomic_product(torch.ones(2, 3))
    with pytest.raises(ValueError, match="shrinkage: expected 0 or more"):
        atoms.atomic_product(torch.eye(2), shrinkage=-1)
    with pytest.raises(ValueError, match=r"positive definite.*raise shrinkage"):
        atoms.atomic_product(torch.ones(2, 2))
    assert atoms.atomic_product(torch.ones(2, 2), shrinkage=1e-3).condition > 100
    with pytest.raises(ValueError, match="unit: expected at least two rows"):
        atoms.coherence(torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"q: expected a number in \(0, 1\]"):
        atoms.coherence(torch.eye(3)).quantile(0)
    with pytest.raises(ValueError, match="k: expected 1 to 2, got 3"):
        atoms.babel(torch.eye(3), 3)
    with pytest.raises(ValueError, match="k: expected 1 to 3, got 0"):
        atoms.isometry_defect(torch.eye(3), 0, 1)
    with pytest.raises(ValueError, match="k: expected 1 or more"):
        atoms.window(0.1, 0, 1, 1)
    with pytest.raises(ValueError, match="smallest: expected above 0"):
        atoms.window(0.1, 1, 2, 1)
    with pytest.raises(ValueError, match="active: expected counts"):
        atoms.stability(atoms.coherence(torch.eye(3)), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="width: expected a power of two"):
        spikes_and_waves(6, 1)
