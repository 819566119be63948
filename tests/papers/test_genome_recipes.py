"""Recipes: algebra on coefficients equals arithmetic on weights, whatever they are written by."""

from __future__ import annotations

import json
import random

import pytest
import torch
from genome_toy import toy_pool

from gemma_ext.papers.genome.materialise import RULES, Materialiser
from gemma_ext.papers.genome.pool import Pool
from gemma_ext.papers.genome.recipe import (
    Genome,
    Noise,
    applied,
    expert,
    finished,
    from_table,
    mix,
    rebased,
    to_table,
    with_noise,
)
from gemma_ext.reference import random_numbers
from gemma_ext.reference import souping as formulas

pytestmark = pytest.mark.filterwarnings("error")


def noise_of(noise: Noise, shape, name="x") -> torch.Tensor:
    """float64, from the formula: m sigma e."""
    n = int(torch.Size(shape).numel())
    key = random_numbers.random_key(noise.seed, name)
    return formulas.mutate(
        torch.zeros(n, dtype=torch.float64), noise.rate, noise.sigma, key, 0, 0
    ).view(shape)


def value(genome: Genome, pool: Pool) -> torch.Tensor:
    """float64 weights of a linear genome over linear ones."""
    base = 0.0 if pool.base is None else pool.base["x"].double()
    total = torch.zeros(pool.shapes["x"], dtype=torch.float64)
    for source, w in genome.terms:
        x = pool.experts[source]["x"].double() if isinstance(source, int) else value(source, pool)
        total += w * (x - base)
    for noise in genome.noises:
        total += noise_of(noise, total.shape)
    return base + total


def test_equal_recipes_have_equal_keys():
    a = mix([(expert(0), 0.25), (expert(3), 0.75)])
    b = mix([(expert(3), 0.75), (expert(0), 0.25)])
    assert a == b
    assert len({a, b}) == 1
    assert a != mix([(expert(3), 0.75), (expert(0), 0.25 + 2**-50)])
    assert a != applied("ties", [(expert(0), 0.25), (expert(3), 0.75)])
    assert expert(1) != 1


def test_terms_stand_in_order_of_their_numbers():
    mixed = mix([(expert(i), 1.0 + i) for i in (10, 2, 9, 0)])
    assert [source for source, _ in mixed.terms] == [0, 2, 9, 10]


def test_what_cancels_is_gone():
    noisy = with_noise(expert(1), Noise(7, 0.5, 0.1))
    assert mix([(noisy, 1.0), (noisy, -1.0)]) == Genome(())
    assert mix([(expert(0), 0.0), (noisy, 1.0)]) is noisy


def test_noise_that_is_none_changes_nothing():
    assert with_noise(expert(0), Noise(1, 0.0, 0.5)) is not None
    assert with_noise(expert(0), Noise(1, 0.0, 0.5)) == expert(0)
    assert with_noise(expert(0), Noise(1, 0.5, 0.0)) == expert(0)


@pytest.mark.parametrize("with_base", [False, True])
def test_algebra_is_arithmetic(with_base):
    """A random genealogy of mixes and mutants, against the same steps on float64 tensors."""
    rng = random.Random(3)
    g = torch.Generator().manual_seed(1)
    tensors = [torch.randn(5, 7, generator=g) for _ in range(5)]
    pool = Pool([{"x": t} for t in tensors[:4]], {"x": tensors[4]} if with_base else None)
    base = tensors[4].double() if with_base else 0.0
    genomes = [expert(i) for i in range(4)]
    values = [t.double() - base for t in tensors[:4]]
    for step in range(20):
        i, j = rng.sample(range(len(genomes)), 2)
        a, b = rng.uniform(-1, 1), rng.uniform(-1, 1)
        child, weights = mix([(genomes[i], a), (genomes[j], b)], 2), a * values[i] + b * values[j]
        if step % 2:
            noise = Noise(step, 0.5, 0.1)
            child, weights = with_noise(child, noise, 2), weights + noise_of(noise, weights.shape)
        genomes.append(child)
        values.append(weights)
        assert child.length <= 2
    writer = Materialiser(pool)
    for genome, delta in zip(genomes, values, strict=True):
        torch.testing.assert_close(value(genome, pool), base + delta, rtol=1e-12, atol=1e-12)
        written = writer.tensors(genome)["x"].double()
        scale = float(delta.abs().max()) + 1.0
        assert (written - base - delta).abs().max() < 64 * 2.0**-24 * scale
    assert any(genome.parents for genome in genomes)


def test_rebased_keeps_the_values_bit_by_bit():
    pool = toy_pool()
    genome = with_noise(mix([(expert(0), 0.3), (expert(1), 0.7)]), Noise(5, 0.9, 0.1))
    writer = Materialiser(pool)
    assert torch.equal(writer.tensors(genome)["x"], writer.tensors(rebased(genome))["x"])
    assert rebased(expert(2)) == expert(2)
    assert finished(expert(2)) == 2
    assert finished(genome) is genome


def test_one_expert_is_written_bit_by_bit():
    pool = toy_pool()
    assert torch.equal(Materialiser(pool).tensors(expert(3))["x"], pool.experts[3]["x"])
    based = Pool(pool.experts[:3], pool.experts[3])
    assert torch.equal(Materialiser(based).tensors(expert(1))["x"], pool.experts[1]["x"])


def test_an_empty_sum_is_the_base():
    pool = toy_pool()
    assert not Materialiser(pool).tensors(Genome(()))["x"].any()
    based = Pool(pool.experts[:3], pool.experts[3])
    assert torch.equal(Materialiser(based).tensors(Genome(()))["x"], pool.experts[3]["x"])


def test_narrow_tensors_are_rounded_once():
    pool = toy_pool()
    genome = with_noise(mix([(expert(0), 0.3), (expert(1), 0.7)]), Noise(5, 0.9, 0.1))
    genome = with_noise(genome, Noise(6, 0.9, 0.1))
    out = {"x": torch.full((8, 3), torch.nan, dtype=torch.bfloat16)}
    writer = Materialiser(pool)
    writer.write(genome, out)
    assert torch.equal(out["x"], writer.tensors(genome)["x"].bfloat16())


def test_a_tensor_that_has_nowhere_to_go_is_named():
    with pytest.raises(ValueError, match="got none for 'x'"):
        Materialiser(toy_pool()).write(expert(0), {})
    with pytest.raises(ValueError, match=r"rule: expected one of linear.*got 'cubic'"):
        Materialiser(toy_pool()).tensors(applied("cubic", [(expert(0), 1.0)]))


def test_ties_agrees_with_the_formula():
    pool, density, weights = toy_pool(), 0.5, [0.75, 0.25]
    made = Materialiser(pool).tensors(
        applied("ties", [(expert(0), 0.75), (expert(1), 0.25)], density=density)
    )["x"]
    x = torch.stack([pool.experts[i]["x"].double().flatten() for i in range(2)])
    keep = int(density * x.shape[1])
    kept = torch.zeros_like(x).scatter(1, x.abs().topk(keep).indices, 1.0) * x
    sign = torch.where(kept.sum(0) >= 0, 1.0, -1.0)
    agree = kept.sign() == sign
    mean = (torch.tensor(weights).unsqueeze(1) * kept * agree).sum(0) / agree.sum(0).clamp(min=1)
    torch.testing.assert_close(made.flatten().double(), mean, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("rule", ["dare_linear", "dare_ties"])
def test_dare_divides_by_its_density_unless_told_not_to(rule):
    g = torch.Generator().manual_seed(0)
    pool = Pool([{"x": torch.randn(300, 100, generator=g).abs() + 1} for _ in range(2)])
    parts = [(expert(0), 0.5), (expert(1), 0.5)]
    made, plain = (
        Materialiser(pool).tensors(applied(rule, parts, density=0.7, rescale=r, seed=3))["x"]
        for r in (True, False)
    )
    torch.testing.assert_close(made, plain / 0.7)
    if rule == "dare_linear":
        assert abs(float(made.mean() / sum(0.5 * e["x"].mean() for e in pool.experts)) - 1) < 0.02
    else:  # mean over those that are left: one alone counts half
        assert set((made == 0).flatten().tolist()) == {True, False}


def test_blxalpha_is_linear_for_convex_weights():
    pool = toy_pool()
    parts = [(expert(0), 0.3), (expert(4), 0.7)]
    made = Materialiser(pool).tensors(applied("blxalpha", parts))["x"]
    torch.testing.assert_close(made, Materialiser(pool).tensors(mix(parts))["x"])


def test_random_takes_each_element_from_one_parent_by_its_magnitude():
    pool = Pool([{"x": torch.full((100, 100), 2.0)}, {"x": torch.full((100, 100), -1.0)}])
    made = Materialiser(pool).tensors(applied("random", [(expert(0), 0.5), (expert(1), 0.5)]))["x"]
    assert set(made.unique().tolist()) == {2.0, -1.0}
    share = float((made == 2.0).double().mean())
    chance = 1 / (1 + 2.718281828459045 ** (1 - 2))
    assert abs(share - chance) < 4 * (chance * (1 - chance) / 1e4) ** 0.5


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_of_one_expert_twice_is_that_expert_without_trimming(rule):
    pool = toy_pool(1) if rule != "product" else lora_pool(1)
    parts = [(expert(0), 1.0)]
    made = Materialiser(pool).tensors(applied(rule, parts, density=1.0))
    if rule == "product":
        (a, b), x = pool.factors[0], pool.experts[0]
        torch.testing.assert_close(made[b] @ made[a], x[b] @ x[a], rtol=1e-4, atol=1e-5)
    else:
        assert torch.equal(made["x"], pool.experts[0]["x"])


def lora_pool(experts: int, rank: int = 2) -> Pool:
    g = torch.Generator().manual_seed(2)
    return Pool(
        [
            {
                "m.lora_A.weight": torch.randn(rank, 11, generator=g),
                "m.lora_B.weight": torch.randn(7, rank, generator=g),
            }
            for _ in range(experts)
        ]
    )


def test_product_is_the_nearest_of_its_rank():
    pool, weights = lora_pool(3), [0.5, 0.3, -0.4]
    made = Materialiser(pool).tensors(
        applied("product", [(expert(i), w) for i, w in enumerate(weights)])
    )
    a, b = "m.lora_A.weight", "m.lora_B.weight"
    want = sum(
        w * x[b].double() @ x[a].double() for w, x in zip(weights, pool.experts, strict=True)
    )
    u, s, vh = torch.linalg.svd(want)
    best = u[:, :2] * s[:2] @ vh[:2]
    torch.testing.assert_close((made[b] @ made[a]).double(), best, rtol=1e-5, atol=1e-5)
    # what averaging the factors gives is another matrix
    linear = Materialiser(pool).tensors(mix([(expert(i), w) for i, w in enumerate(weights)]))
    assert ((linear[b] @ linear[a]).double() - want).norm() > 2 * (best - want).norm()


def test_product_has_its_rank_where_the_weight_has_less():
    """d_out < r: fewer singular values than rows of A; factors of an embedding have other names."""
    g = torch.Generator().manual_seed(0)
    a, b = "e.lora_embedding_A", "e.lora_embedding_B"
    pool = Pool(
        [{a: torch.randn(4, 9, generator=g), b: torch.randn(3, 4, generator=g)} for _ in range(2)]
    )
    assert pool.factors == [(a, b)]
    made = Materialiser(pool).tensors(applied("product", [(expert(i), 0.5) for i in range(2)]))
    want = sum(0.5 * x[b] @ x[a] for x in pool.experts)
    torch.testing.assert_close(made[b] @ made[a], want, rtol=1e-5, atol=1e-5)


def test_product_needs_pairs():
    with pytest.raises(ValueError, match="expected pairs of LoRA factors only, got 'x'"):
        Materialiser(toy_pool()).tensors(applied("product", [(expert(0), 1.0)]))


def test_finished_genomes_are_kept_in_files_and_made_again_when_lost(tmp_path):
    pool = toy_pool()
    inner = applied("ties", [(expert(0), 0.5), (expert(1), 0.5)], density=0.5)
    outer = mix([(inner, 0.5), (expert(2), 0.5)])
    want = Materialiser(pool).tensors(outer)["x"]
    assert torch.equal(Materialiser(pool, tmp_path).tensors(outer)["x"], want)
    (path,) = tmp_path.iterdir()
    assert path.name == f"{inner.key}.safetensors"
    written = path.stat().st_mtime_ns
    assert torch.equal(Materialiser(pool, tmp_path).tensors(outer)["x"], want)
    assert path.stat().st_mtime_ns == written
    path.unlink()
    assert torch.equal(Materialiser(pool, tmp_path).tensors(outer)["x"], want)


def test_tables_hold_all_that_is_needed():
    inner = applied("ties", [(expert(0), 0.5), (expert(1), 0.5)], density=0.5, seed=9)
    outer = with_noise(mix([(inner, 0.5), (expert(2), 0.5)]), Noise(1, 0.1, 0.2))
    table = json.loads(json.dumps(to_table([outer])))
    assert set(table) == {inner.key, outer.key}
    assert from_table(table)[outer.key] == outer
    table[inner.key]["density"] = 0.6
    with pytest.raises(ValueError, match=f"genome {inner.key}: expected content with this key"):
        from_table(table)
    del table[inner.key]
    with pytest.raises(ValueError, match=f"genome {inner.key}: expected its record"):
        from_table(table)


def test_pools_that_do_not_match_are_refused():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="experts: expected at least one, got none"):
        Pool([])
    with pytest.raises(ValueError, match="same tensors in expert 0 and expert 1, got 'y' in one"):
        Pool([{"x": x}, {"x": x, "y": x}])
    with pytest.raises(ValueError, match=r"'x' of the base to be \[2, 3\], got \[3, 2\]"):
        Pool([{"x": x}], {"x": x.T})


def test_the_digest_of_a_pool_is_that_of_its_content():
    assert toy_pool().digest == toy_pool().digest
    assert toy_pool().digest != toy_pool(seed=1).digest
    half = Pool([{"x": e["x"].half()} for e in toy_pool().experts])
    assert half.digest != toy_pool().digest


def test_saved_individuals_never_overwrite(tmp_path):
    pool = toy_pool()
    pool.save(pool.experts[0], tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    with pytest.raises(FileExistsError, match="does not exist"):
        pool.save(pool.experts[0], tmp_path / "out")
