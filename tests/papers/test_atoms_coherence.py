"""Coherence by tiles, windows and stability, against dense float64 and known answers."""

import math

import pytest
import torch

from gemma_ext.papers import atoms
from gemma_ext.papers.atoms.coherence import BINS, DECADES
from gemma_ext.papers.atoms.synthetic import spikes_and_waves


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def dense_cosines(unit):
    g = (unit @ unit.T).abs()
    at = torch.ones_like(g, dtype=torch.bool).triu(1)
    return g, g[at].sort().values


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


def test_bad_input_is_named():
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
