"""Each algorithm against its formula in float64, on a small Gemma 2 and five experts of it."""

import copy

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from gemma_ext.papers.mergebench import as_released
from gemma_ext.papers.mergebench import merging as table
from gemma_ext.papers.mergebench.protocol import Pool

DOMAINS = ("a", "b", "c", "d", "e")


def tiny(seed):
    torch.manual_seed(seed)
    config = Gemma2Config(
        vocab_size=53,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=8,
        attn_implementation="eager",
    )
    return Gemma2ForCausalLM(config).eval()


def moved(base, seed, scale=1e-2):
    expert = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in expert.parameters():
            p += scale * torch.randn(p.shape, generator=generator)
    return expert


@pytest.fixture(scope="module")
def pool():
    base = tiny(0)
    generator = torch.Generator().manual_seed(7)
    batches = {d: [torch.randint(0, 53, (3, 12), generator=generator)] for d in DOMAINS}
    experts = {d: moved(base, 1 + i) for i, d in enumerate(DOMAINS)}
    return Pool(base, experts, batches)


def deltas(pool):
    base = pool.weights(pool.base)
    return base, [
        {n: w.double() - base[n].double() for n, w in pool.weights(m).items()}
        for m in pool.experts.values()
    ]


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors.values()])


def run(algorithm, pool, config, seed=0):
    return algorithm.merge(pool, algorithm.prepare(pool, seed), config, seed)


def check(found, base, delta):
    for name, value in base.items():
        torch.testing.assert_close(
            found[name].double(), value.double() + delta[name], rtol=0, atol=2e-7
        )


@pytest.mark.parametrize("scaling", [0.2, 0.7])
def test_task_arithmetic(pool, scaling):
    base, found = deltas(pool)
    merged = run(table.TASK_ARITHMETIC, pool, {"scaling": scaling})
    check(merged, base, {n: scaling * sum(d[n] for d in found) for n in base})


def test_model_soup_of_equal_experts_is_the_expert(pool):
    same = Pool(pool.base, dict.fromkeys(DOMAINS, pool.experts["a"]), pool.calibration)
    merged = run(table.MODEL_SOUP, same, {})
    for name, value in pool.weights(pool.experts["a"]).items():
        torch.testing.assert_close(merged[name], value, rtol=1e-6, atol=1e-8)
    assert not any("embed" in name for name in merged)


def test_ties_has_one_threshold_for_the_model(pool):
    base, found = deltas(pool)
    vectors = torch.stack([flat(d) for d in found]).float()
    total = vectors.shape[1]
    cut = vectors.abs().kthvalue(total - int(0.3 * total), dim=1, keepdim=True).values
    trimmed = torch.where(vectors.abs() >= cut, vectors, 0.0).double()
    sign = trimmed.sum(0).sign()
    sign = torch.where(sign == 0, sign.sum().sign(), sign)
    merged = 0.4 * torch.where(trimmed.sign() == sign, trimmed, 0.0).sum(0)
    got = run(table.TIES, pool, {"density": 0.3, "scaling": 0.4})
    expected = flat(base).double() + merged
    torch.testing.assert_close(flat(got).double(), expected, rtol=0, atol=2e-7)


def test_dare_keeps_its_share_and_its_mean(pool):
    base, found = deltas(pool)
    seeds = 64
    drawn = torch.stack(
        [
            flat(run(table.DARE, pool, {"drop": 0.5, "scaling": 0.4}, seed)) - flat(base)
            for seed in range(seeds)
        ]
    ).double()
    mean = 0.4 * sum(flat(d) for d in found)
    spread = 0.4 * sum(flat(d) ** 2 for d in found).sqrt() / seeds**0.5  # p = .5: variance delta^2
    assert ((drawn.mean(0) - mean).abs() > 4 * spread + 1e-7).double().mean() < 1e-3
    assert not torch.equal(drawn[0], drawn[1])


@pytest.mark.parametrize("tall_lambda", [0.2, 0.6])
def test_consensus(pool, tall_lambda):
    base, found = deltas(pool)
    vectors = torch.stack([flat(d) for d in found])
    whole = vectors.sum(0)
    votes = (vectors.abs() > tall_lambda * (whole - vectors).abs()).sum(0)
    merged = run(table.CONSENSUS, pool, {"tall_lambda": tall_lambda, "scaling": 0.4})
    expected = flat(base).double() + 0.4 * torch.where(votes >= 2, whole, 0.0)
    wrong = (flat(merged).double() - expected).abs() > 2e-7
    assert wrong.double().mean() < 1e-4  # an element may sit on the edge of its mask


def test_consensus_of_equal_experts_keeps_all_or_nothing(pool):
    same = Pool(pool.base, dict.fromkeys(DOMAINS, pool.experts["a"]), pool.calibration)
    base, found = deltas(same)
    keeps = run(table.CONSENSUS, same, {"tall_lambda": 0.24, "scaling": 1.0})
    check(keeps, base, {n: 5 * found[0][n] for n in base})
    drops = run(table.CONSENSUS, same, {"tall_lambda": 0.26, "scaling": 1.0})
    assert all(torch.equal(drops[n], base[n]) for n in base)


def disjoint(pool):
    """Experts that changed other elements each, fewer than the tenth that is localised."""
    changed = {}
    for i, domain in enumerate(DOMAINS):
        expert = copy.deepcopy(pool.base)
        with torch.no_grad():
            for name, p in expert.named_parameters():
                if "embed" not in name:
                    p.flatten()[i::20] += 0.05
        changed[domain] = expert
    return Pool(pool.base, changed, pool.calibration)


def test_localize_and_stitch_of_disjoint_changes_is_their_sum(pool):
    apart = disjoint(pool)
    base, found = deltas(apart)
    merged = run(table.LOCALIZE_AND_STITCH, apart, {"density": 0.05})
    check(merged, base, {n: sum(d[n] for d in found) for n in base})


def test_localize_and_stitch_averages_where_masks_overlap(pool):
    base, found = deltas(pool)
    vectors = torch.stack([flat(d) for d in found])
    keep = int(0.1 * vectors.shape[1])
    cut = vectors.float().abs().topk(keep, dim=1).values.min(1, keepdim=True).values
    masks = vectors.float().abs() >= cut
    stitched = (masks * vectors).sum(0) / masks.sum(0).clamp(min=1)
    merged = run(table.LOCALIZE_AND_STITCH, pool, {"density": 0.1})
    expected = flat(base).double() + stitched
    torch.testing.assert_close(flat(merged).double(), expected, rtol=0, atol=2e-7)


def test_trained_masks_stitch_by_the_same_formula(pool):
    base, found = deltas(pool)
    found_masks = table.TRAINED_STITCH.prepare(pool, 0)
    merged = table.TRAINED_STITCH.merge(pool, found_masks, {"rate": 1e6}, 0)
    masks = found_masks[1e6]
    assert not torch.equal(flat(masks[0]), flat(found_masks[1e8][0]))
    assert all(m.keys() == base.keys() for m in masks)
    start = [torch.cat([x.flatten() for x in m.values()]).double().mean() for m in masks]
    assert all(0 < share < 1 for share in start)
    for name, value in base.items():
        worn = [m[name].double() for m in masks]
        delta = sum(m * d[name] for m, d in zip(worn, found, strict=True))
        expected = value.double() + delta / sum(worn).clamp(min=1)
        torch.testing.assert_close(merged[name].double(), expected, rtol=0, atol=2e-7)


def test_fisher_is_its_formula(pool):
    found = table.FISHER.prepare(pool, 0)
    merged = table.FISHER.merge(pool, found, {}, 0)
    experts = [pool.weights(m) for m in pool.experts.values()]
    for name, got in merged.items():
        weights = [f[name].double().clamp(min=1e-10) for f in found]
        top = sum(f * e[name].double() for f, e in zip(weights, experts, strict=True))
        torch.testing.assert_close(got.double(), top / sum(weights), rtol=1e-5, atol=1e-7)


def test_regmean_is_its_formula(pool):
    found = table.REGMEAN.prepare(pool, 0)
    merged = table.REGMEAN.merge(pool, found, {"reduction": 0.5}, 0)
    experts = [pool.weights(m) for m in pool.experts.values()]
    checked = 0
    for name, got in merged.items():
        layers = [e[name].double() for e in experts]
        if name in found[0]:
            grams = [f[name].double() for f in found]
            grams = [0.5 * g + 0.5 * torch.diag(g.diagonal()) for g in grams]
            target = sum(g @ w.T for g, w in zip(grams, layers, strict=True))
            expected = torch.linalg.solve(sum(grams), target).T
            checked += 1
        else:
            expected = sum(layers) / len(layers)
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-6)
    assert checked == 14


def test_regmean_plus_plus_of_equal_experts_is_the_expert(pool):
    same = Pool(pool.base, dict.fromkeys(DOMAINS, pool.experts["a"]), pool.calibration)
    merged = run(table.RegMeanPlusPlus(), same, {"reduction": 0.1})
    for name, value in same.weights(pool.experts["a"]).items():
        torch.testing.assert_close(merged[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("algorithm", table.algorithms(released=True), ids=lambda a: a.name)
def test_the_pool_stays_as_it_was(pool, algorithm):
    models = (pool.base, *pool.experts.values())
    before = [p.detach().clone() for m in models for p in m.parameters()]
    merged = run(algorithm, pool, algorithm.grid[0])
    after = [p for m in models for p in m.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert merged.keys() == pool.weights(pool.base).keys()
    assert all(bool(torch.isfinite(t).all()) for t in merged.values())


ORDERLESS = [a for a in table.algorithms() if a.name != "DARE"]


@pytest.mark.parametrize("algorithm", ORDERLESS, ids=lambda a: a.name)
def test_the_order_of_experts_does_not_matter(pool, algorithm):
    backwards = Pool(pool.base, dict(reversed(pool.experts.items())), pool.calibration)
    if algorithm.name == "Fisher":  # its draws belong to a model's place
        found = algorithm.prepare(pool, 0)
        ways = [
            algorithm.merge(pool, found, {}, 0),
            algorithm.merge(backwards, found[::-1], {}, 0),
        ]
    else:
        ways = [run(algorithm, p, algorithm.grid[0]) for p in (pool, backwards)]
    for name, value in ways[0].items():
        torch.testing.assert_close(ways[1][name], value, rtol=1e-4, atol=1e-6)


def test_as_released_each_expert_is_localised_against_a_base_that_moved():
    base = {"w": torch.zeros(4)}
    one, two = {"w": torch.tensor([4.0, 1, 0, 0])}, {"w": torch.tensor([3.0, 0, 0, 2])}
    got = as_released.localize_and_stitch(base, [one, two], 0.25)
    # base moves to [4 0 0 0]; the second delta is [-1 0 0 2], of which the 2 is kept, so the base
    # is [4 0 0 2] when the masked deltas, now zero, are added
    torch.testing.assert_close(got["w"], torch.tensor([4.0, 0, 0, 2]))
    assert torch.equal(base["w"], torch.zeros(4))


def test_as_released_only_the_last_overlap_divides():
    base = {"w": torch.zeros(2)}
    experts = [{"w": torch.tensor([2.0, 0])}, {"w": torch.tensor([4.0, 0])}, {"w": torch.ones(2)}]
    got = as_released.localize_and_stitch(base, experts, 0.5)
    # base' = [2 0], [4 0], then the third delta [-3 1] keeps its first: base' = [1 0];
    # stitched 1/2 (2-1) + 1/2 (4-1) + 1/2 (1-1)
    torch.testing.assert_close(got["w"], torch.tensor([3.0, 0]))


def test_as_released_fisher_moves_a_copy(pool):
    model = pool.experts["a"]
    still = as_released.moving_fisher(model, pool.calibration["a"])
    twice = as_released.moving_fisher(model, pool.calibration["a"] * 2)
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.allclose(twice[name], 2 * still[name], rtol=1e-6, atol=0)
    # what a step of AdamW moves may flip with the sign of a gradient that is next to nothing
    assert (twice[name] - 2 * still[name]).norm() < 0.1 * twice[name].norm()


def test_as_released_regmean_rounds():
    torch.manual_seed(0)
    x = torch.randn(64, 8)
    weights = [torch.randn(5, 8), torch.randn(5, 8)]
    got = as_released.regmean_bfloat16(weights, [x.T @ x / 64] * 2, 0.5)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), sum(weights) / 2, rtol=0.1, atol=0.1)
    dead = [torch.zeros(8, 8)] * 2
    assert torch.equal(as_released.regmean_bfloat16(weights, dead, 0.5).float(), torch.zeros(5, 8))
