"""The threshold-activated SAE: supports by threshold, values by refit, learned atoms, metrics."""

import dataclasses
import json
import math

import pytest
import torch

from gemma_ext.ops.sae import encode_threshold
from gemma_ext.papers import atoms
from gemma_ext.papers.atoms.synthetic import random_world, spikes_and_waves


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def plain(width):
    return atoms.atomic_product(torch.eye(width, dtype=torch.float64))


def supports(codes):
    return [set(part.tolist()) for part in codes.indices.tensor_split(codes.offsets[1:-1])]


def test_inside_the_window_supports_are_exact_and_a_refit_makes_values_exact():
    world = spikes_and_waves(64, 3)
    window = atoms.window(0.125, 3, world.smallest, world.largest)
    found = atoms.Dictionary.of(world.atoms, atoms.product_of(world.atoms), window.middle)
    m, values, indices = world.draw(5000, torch.Generator().manual_seed(torch.seed() % 2**31))
    codes = found.encode(m)
    assert supports(codes) == [set(row.tolist()) for row in indices]
    true = values.gather(1, indices.argsort(1)).flatten()
    error = (codes.values - true).abs().max()
    assert 0.1 < error <= window.error + 1e-6
    refitted = found.refit(m, codes)
    assert (refitted.values - true).abs().max() < 1e-12
    assert found.refit(m.float(), codes).values.dtype == torch.float32


def test_a_square_dictionary_is_read_exactly():
    d = normal(9, 9)
    delta = torch.rand(40, 9).double() + 0.5
    delta *= torch.rand(40, 9) < 0.3
    codes = atoms.Dictionary.of(d, atoms.product_of(d), 0.25).encode(delta @ d)
    torch.testing.assert_close(codes.dense().double(), delta, rtol=0, atol=1e-3)


def test_a_code_on_the_threshold_is_active():
    d = torch.eye(3)
    found = atoms.Dictionary.of(d, plain(3), torch.tensor([0.5, 0.25, 2.0]))
    codes = found.encode(torch.tensor([[0.5, 0.125, 2.5], [0.25, 0.25, 0.0]]))
    assert supports(codes) == [{0, 2}, {1}]
    rows, bias = found.encoder()
    x = torch.tensor([[0.5, 0.125, 2.5], [0.25, 0.25, 0.0]])
    strict = encode_threshold(x, rows, bias, threshold=found.threshold).codes
    assert supports(strict) == [{2}, set()]  # as Gemma Scope's JumpReLU


def test_a_bias_is_taken_away_and_given_back():
    d, b = normal(8, 5), normal(5)
    product = atoms.product_of(d)
    m = normal(2, 3, 5)
    with_bias = atoms.Dictionary.of(d, product, 0.1, b)
    without = atoms.Dictionary.of(d, product, 0.1)
    codes = with_bias.encode(m)
    torch.testing.assert_close(codes.dense(), without.encode(m - b).dense(), rtol=0, atol=1e-4)
    assert codes.shape == (2, 3)
    expected = codes.dense() @ d.float() + b.float()
    torch.testing.assert_close(with_bias.decode(codes), expected, rtol=1e-5, atol=1e-5)


def test_a_refit_is_least_squares_under_the_product():
    d, c = normal(20, 7), normal(7, 7)
    product = atoms.atomic_product(c @ c.T)
    found = atoms.Dictionary.of(d, product, 0.6)
    m = normal(60, 7)
    codes = found.encode(m)
    counts = codes.offsets.diff()
    assert counts.min() < counts.max() <= 20
    refitted = found.refit(m, codes)
    before = product.whiten(m - codes.dense().double() @ d).norm(dim=1)
    after = product.whiten(m - refitted.dense() @ d).norm(dim=1)
    assert (after <= before + 1e-9).all()
    assert (after < before - 1e-3).any()
    white, target = product.whiten(d), product.whiten(m)
    for row in range(60):
        at = codes.indices[codes.offsets[row] : codes.offsets[row + 1]].long()
        best = torch.linalg.lstsq(white[at].T, target[row], driver="gelsd").solution
        got = refitted.values[codes.offsets[row] : codes.offsets[row + 1]]
        if len(at) < 7:
            torch.testing.assert_close(got, best, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(
            (got @ white[at] - target[row]).norm(),
            (best @ white[at] - target[row]).norm(),
            rtol=1e-5,
            atol=1e-6,
        )


def test_a_refit_of_dependent_or_no_atoms():
    d = torch.cat([torch.eye(3), torch.eye(3)[:1]]).double()
    found = atoms.Dictionary.of(d, plain(3), 0.5)
    codes = found.encode(torch.tensor([[2.0, 0.0, 1.0], [0.0, 0.0, 0.0]]))
    assert supports(codes) == [{0, 2, 3}, set()]
    refitted = found.refit(torch.tensor([[2.0, 0.0, 1.0], [0.0, 0.0, 0.0]]), codes)
    torch.testing.assert_close(refitted.values, torch.tensor([1.0, 1.0, 1.0]))  # halves of 2, and 1
    empty = found.encode(torch.zeros(0, 3))
    assert found.refit(torch.zeros(0, 3), empty).values.numel() == 0


def test_the_estimate_from_states_finds_supports_that_the_plain_product_does_not():
    generator = torch.Generator().manual_seed(5)
    world = random_world(96, 64, 2, generator, stretch=20)
    moments = atoms.Moments(64)
    moments.add(world.draw(50_000, generator)[0])
    m, _, indices = world.draw(2000, generator)
    true = [set(row.tolist()) for row in indices]
    right = {}
    for name, product in (
        ("atomic", atoms.atomic_product(moments.matrix("centred"))),
        ("plain", plain(64)),
    ):
        rows = atoms.Dictionary.of(world.atoms, product, 0.5)
        right[name] = sum(a == b for a, b in zip(supports(rows.encode(m)), true, strict=True))
    assert right["atomic"] > 2 * right["plain"]


@pytest.fixture(scope="module")
def learned():
    generator = torch.Generator().manual_seed(0)
    world = random_world(64, 32, 2, generator, stretch=10)
    x = world.draw(20_000, generator)[0].float()
    moments = atoms.Moments(32)
    moments.add(x)
    product = atoms.atomic_product(moments.matrix())
    recipe = atoms.Recipe(64, 2, steps=600, batch=512, rate=1e-2)
    ticks = []
    done = atoms.learn(x, product, recipe, advance=ticks.append)
    assert sum(ticks) == 600
    return world, product, recipe, done, world.draw(2000, generator)[0].float()


def test_known_atoms_are_learned(learned):
    world, product, _, done, held_out = learned
    control = atoms.random_dictionary(product, 64, held_out, 2)
    true = product.unit(world.atoms)
    cosine, share = atoms.recovery(product.unit(done.dictionary.atoms), true)
    chance, lucky = atoms.recovery(product.unit(control.atoms), true)
    assert share > 0.8
    assert cosine > 0.9 > 0.8 > chance
    assert lucky < 0.1
    ours = atoms.evaluate(done.dictionary, [held_out])
    theirs = atoms.evaluate(control, [held_out])
    assert ours.r2_refit > ours.r2 > 0.85 > 0.6 > theirs.r2_refit
    assert theirs.active == pytest.approx(2, abs=1e-6)
    assert ours.active == pytest.approx(2, rel=0.3)
    assert ours.spread == pytest.approx(1, abs=1e-4)
    assert len(done.unexplained) == len(done.active) == 600


def test_principal_axes_are_orthogonal_and_no_atoms(learned):
    world, product, _, _, held_out = learned
    axes = atoms.principal_axes(product, held_out, 3)
    unit = product.unit(axes.atoms)
    plain = axes.atoms[:32].double() @ axes.atoms[:32].double().T
    assert (plain - plain.diagonal().diag()).abs().max() < 1e-4
    torch.testing.assert_close(unit[:32] @ unit[:32].T, torch.eye(32).double(), rtol=0, atol=1e-6)
    quality = atoms.evaluate(axes, [held_out])
    assert quality.active == pytest.approx(3, abs=1e-6)
    assert quality.q_star > 0.98
    assert atoms.recovery(unit, product.unit(world.atoms))[1] < 0.2


def test_errors_under_the_product_see_every_direction(learned):
    """One direction with most of the variance hides the atoms from plain errors."""
    world, _, recipe, _, _ = learned
    generator = torch.Generator().manual_seed(3)
    change = torch.eye(32, dtype=torch.float64)
    change[0] *= 300
    x = world.draw(20_000, generator)[0] @ change
    held_out = (world.draw(2000, generator)[0] @ change).float()
    moments = atoms.Moments(32)
    moments.add(x)
    product = atoms.atomic_product(moments.matrix())
    found = {
        norm: atoms.learn(x.float(), product, dataclasses.replace(recipe, norm=norm)).dictionary
        for norm in ("plain", "atomic")
    }
    true = product.unit(world.atoms @ change)
    share = {n: atoms.recovery(product.unit(d.atoms), true)[1] for n, d in found.items()}
    assert share["atomic"] > 0.6 > 0.2 > share["plain"]
    assert atoms.evaluate(found["atomic"], [held_out]).r2_atomic > 0.7


def test_learning_repeats(learned):
    _, product, recipe, _, held_out = learned
    short = dataclasses.replace(recipe, steps=5)
    a, b = (atoms.learn(held_out, product, short).dictionary for _ in range(2))
    assert torch.equal(a.atoms, b.atoms)
    other = atoms.learn(held_out, product, dataclasses.replace(short, seed=1)).dictionary
    assert not torch.equal(a.atoms, other.atoms)


def test_metrics_of_a_dictionary_of_axes():
    found = atoms.Dictionary.of(torch.eye(4), plain(4), 0.5)
    x = torch.tensor([[1.0, 0, 0, 0.25], [1, 1, 0, 0], [0, 0, 0, 0.25]])
    quality = atoms.evaluate(found, [x[:1], x[1:]])
    missing = 2 * 0.25**2
    spread = float((x - x.mean(0)).square().sum())
    assert quality.r2 == pytest.approx(1 - missing / spread)
    assert quality.r2_zero == pytest.approx(1 - missing / float(x.square().sum()))
    assert quality.r2_refit == pytest.approx(quality.r2)
    assert quality.r2_atomic == pytest.approx(quality.r2)  # the product is the plain one
    assert quality.counts.tolist() == [1, 1, 1]
    assert quality.active == 1
    assert quality.dead == 0.5
    assert quality.q_star == 1
    assert quality.unique == 3
    assert quality.certain == 1
    assert quality.record()["mu"] == 0
    assert math.isnan(atoms.evaluate(found, [x], refit=False).r2_refit)


def test_dictionaries_are_files(tmp_path):
    d = normal(6, 4)
    found = atoms.Dictionary.of(d.float(), atoms.product_of(d), torch.rand(6), normal(4).float())
    found.save(tmp_path / "layer", {"model": "m", "layer": 3, "site": "residual"})
    again, facts = atoms.load(tmp_path / "layer")
    assert facts == {"model": "m", "layer": 3, "site": "residual"}
    for name in ("atoms", "threshold", "bias"):
        assert torch.equal(getattr(again, name), getattr(found, name))
    assert torch.equal(again.product.factor, found.product.factor)
    assert again.product.condition == found.product.condition
    written = json.loads((tmp_path / "layer" / "atoms.json").read_text())
    assert written["condition"] == found.product.condition
    assert sorted(p.name for p in (tmp_path / "layer").iterdir()) == [
        "atoms.json",
        "atoms.safetensors",
    ]


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr("gemma_ext.extras.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'gemma_ext\[hf\]'"):
        atoms.Dictionary.of(torch.eye(3), plain(3), 0.1).save(tmp_path, {})


def test_bad_input_is_named():
    d, product = torch.eye(4), plain(4)
    with pytest.raises(ValueError, match=r"atoms: expected \[F, D\], got \[4\]"):
        atoms.Dictionary.of(d[0], product, 0.1)
    with pytest.raises(ValueError, match="product: expected one of width 4, got 3"):
        atoms.Dictionary.of(d, plain(3), 0.1)
    with pytest.raises(ValueError, match=r"threshold: expected a number or \[4\], got \[3\]"):
        atoms.Dictionary.of(d, product, torch.ones(3))
    with pytest.raises(ValueError, match=r"bias: expected \[4\], got \[2\]"):
        atoms.Dictionary.of(d, product, 0.1, torch.ones(2))
    with pytest.raises(ValueError, match=r"x: expected rows \[N, D\]"):
        atoms.learn(torch.ones(0, 4), product, atoms.Recipe(4, 1))
    with pytest.raises(ValueError, match="norm: expected one of plain, atomic, got 'white'"):
        atoms.learn(torch.ones(1, 4), product, atoms.Recipe(4, 1, norm="white"))
    with pytest.raises(ValueError, match="target: expected above 0"):
        atoms.learn(torch.ones(1, 4), product, atoms.Recipe(4, 0))
    with pytest.raises(
        ValueError, match="active: expected at most 5 positive codes a state, got 9"
    ):
        atoms.at_density(
            atoms.Dictionary.of(torch.eye(9)[:, :4], product, 0.1), torch.ones(2, 4), 9
        )
    with pytest.raises(ValueError, match="batches: expected at least one row"):
        atoms.evaluate(atoms.Dictionary.of(d, product, 0.1), [])
