"""The atomic inner product and its moments, against dense float64 and known answers."""

import numpy
import pytest
import torch

from gemma_ext.papers import atoms
from gemma_ext.papers.atoms.synthetic import random_world


def normal(*shape, seed=None):
    generator = torch.Generator()
    generator.manual_seed(seed) if seed is not None else generator.seed()
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


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
