"""The oracles of the conversion: full rank, Eckart-Young, means, indices, counts."""

import copy

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from recursive_models import KINDS, equal_norms, logits, tiny, tokens

from gemma_ext.nn.recursive import (
    DepthLinear,
    Plan,
    add_prefixes,
    decoder_layers,
    make_recursive,
    merged,
)
from gemma_ext.papers.recursive import INITS, Recipe, convert, stepwise_indices
from gemma_ext.papers.recursive.factors import gaussian, of_depths, refined, truncated_svd
from gemma_ext.papers.recursive.initialise import source_indices

INDICES = {
    (6, 3): [1, 3, 6],
    (18, 9): [1, 3, 5, 7, 9, 12, 14, 16, 18],
    (18, 6): [1, 4, 8, 11, 15, 18],
    (16, 8): [1, 3, 5, 7, 10, 12, 14, 16],
    (22, 11): [1, 3, 5, 7, 9, 11, 14, 16, 18, 20, 22],
    (26, 13): [1, 3, 5, 7, 9, 11, 13, 16, 18, 20, 22, 24, 26],
    (24, 12): [1, 3, 5, 7, 9, 11, 14, 16, 18, 20, 22, 24],
    (24, 8): [1, 4, 8, 11, 14, 17, 21, 24],
    (4, 1): [1],
}


def weights(model):
    return [layer.state_dict() for layer in decoder_layers(model)[1]]


def linears(model):
    _, layers = decoder_layers(model)
    return [name for name, m in layers[0].named_modules() if isinstance(m, torch.nn.Linear)]


@pytest.mark.parametrize("shape", INDICES)
def test_stepwise_indices(shape):
    assert [index + 1 for index in stepwise_indices(*shape)] == INDICES[shape]


@pytest.mark.parametrize("count", [0, 7])
def test_stepwise_of_no_or_too_many_layers(count):
    with pytest.raises(ValueError, match=rf"count: expected a number in 1..6, got {count}"):
        stepwise_indices(6, count)


def test_sources_by_name():
    def sources(init, order="cycle", loops=2, layers=6, seed=0):
        plan = Plan.of(layers, loops, order, init=init)
        return [list(g) for g in source_indices(plan, seed).source_indices]

    assert sources("stepwise") == [[0], [2], [5]]
    assert sources("average") == [[0, 3], [1, 4], [2, 5]]
    assert sources("average", "sequence") == [[0, 1], [2, 3], [4, 5]]
    assert sources("lower") == [[0], [1], [2]]
    assert sources("upper") == [[3], [4], [5]]
    assert sources("lower", "middle-cycle") == [[0], [1], [2], [5]]
    assert sources("stepwise", "middle-cycle", layers=8) == [[0], [1], [3], [6], [7]]
    assert sources("average", "middle-cycle") == [[0], [1, 3], [2, 4], [5]]
    drawn = {tuple(map(tuple, sources("random", seed=seed))) for seed in range(20)}
    assert len(drawn) > 5
    for one in drawn:
        assert len(set(one)) == 3
        assert list(one) == sorted(one)
    with pytest.raises(ValueError, match="init: expected one of stepwise, average"):
        sources("best")


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("kind", KINDS)
def test_full_rank_is_the_vanilla_model(kind, init):
    model = equal_norms(tiny(kind))
    made = convert(model, Recipe(2, init, rank=1000))
    for layer, vanilla in zip(
        decoder_layers(merged(made))[1], decoder_layers(model)[1], strict=True
    ):
        for key, value in layer.state_dict().items():
            truth = vanilla.state_dict()[key]
            torch.testing.assert_close(value, truth, rtol=0, atol=1e-12 * float(truth.abs().max()))
    ids = tokens()
    # the eager attention of transformers takes its softmax in float32
    torch.testing.assert_close(logits(made, ids), logits(model, ids), rtol=0, atol=3e-6)


def test_full_rank_in_float32():
    model = equal_norms(tiny("llama", dtype=torch.float32))
    for loops in (2, 3):
        made = convert(model, Recipe(loops, "average", rank=1000))
        for one, two in zip(weights(merged(made)), weights(model), strict=True):
            for key, truth in two.items():
                error = (one[key] - truth).abs().max() / truth.abs().max()
                assert error < 1e-5, key


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_eckart_young(rows, columns, rank, seed):
    residual = torch.randn(
        rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    a, b = truncated_svd(residual, rank)
    rank = min(rank, rows, columns)
    assert a.shape == (rank, columns)
    assert b.shape == (rows, rank)
    singular = torch.linalg.svdvals(residual)
    left = residual - b @ a
    torch.testing.assert_close(left.square().sum(), singular[rank:].square().sum())
    largest = singular[rank] if rank < len(singular) else singular.new_zeros(())
    torch.testing.assert_close(torch.linalg.matrix_norm(left, 2), largest)
    torch.testing.assert_close(a @ a.mT, torch.eye(rank, dtype=torch.float64))
    torch.testing.assert_close(b.norm(dim=0), singular[:rank])


def test_randomised_decomposition_is_near_the_exact_one():
    generator = torch.Generator().manual_seed(0)
    residual = torch.randn(90, 70, generator=generator) * torch.logspace(0, -2, 70)
    state = torch.get_rng_state()
    a, b = truncated_svd(residual, 8, "randomised", seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    exact = residual - torch.mm(*truncated_svd(residual, 8)[::-1])
    assert (residual - b @ a).norm() <= 1.01 * exact.norm()
    assert (residual - b @ a).norm() >= exact.norm() * (1 - 1e-5)
    again = truncated_svd(residual, 8, "randomised", seed=3)
    assert torch.equal(a, again[0])
    # no room to oversample: exact
    assert torch.equal(truncated_svd(residual, 60, "randomised")[0], truncated_svd(residual, 60)[0])
    assert torch.equal(truncated_svd(residual, 8, "auto")[0], truncated_svd(residual, 8)[0])


@pytest.mark.parametrize("init", ["average", "lower", "stepwise"])
def test_error_falls_with_the_rank(init):
    model = tiny("gemma2")
    truth = weights(model)
    errors = []
    for rank in (0, 2, 4, 8, 24):
        made = weights(merged(convert(model, Recipe(2, init, rank=rank))))
        errors.append(
            sum(
                float((one[f"{n}.weight"] - two[f"{n}.weight"]).square().sum())
                for one, two in zip(made, truth, strict=True)
                for n in linears(model)
            )
        )
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-20 < errors[-2]


def test_zero_matrices_and_rank_zero_are_the_tied_model_to_the_bit():
    model = tiny("gemma2")
    ids = tokens()
    plain = logits(convert(model, Recipe(2, "stepwise")), ids)
    zero = convert(model, Recipe(2, "stepwise", rank=5, lora_init="zero"))
    assert torch.equal(logits(zero, ids), plain)
    assert any(isinstance(m, DepthLinear) for m in zero.modules())
    for name, parameter in zero.named_parameters():
        if name.endswith("lora_A"):
            assert parameter.std() > 0
        assert not (name.endswith("lora_B") and parameter.any())


def test_zero_residuals_begin_as_lora_does():
    model = tiny("gemma2")
    for init, zero in (("stepwise", {0, 5}), ("lower", {0, 1, 2}), ("average", set())):
        made = convert(model, Recipe(2, init, rank=4))
        found = {
            depth
            for depth, layer in enumerate(made.model.layers)
            if not layer.mlp.up_proj.lora_B.any()
        }
        assert found == zero
        for depth in zero:
            a = made.model.layers[depth].mlp.up_proj.lora_A
            assert 0.1 < a.std() * 4 < 3
            if depth:
                assert not torch.equal(a, made.model.layers[0].mlp.up_proj.lora_A)


@pytest.mark.parametrize("loops", [2, 3])
def test_average_is_the_nearest_weight(loops):
    model = tiny("llama")
    truth = weights(model)
    made = weights(convert(model, Recipe(loops, "average")))
    count = 6 // loops
    for name in truth[0]:
        for stored in range(count):
            group = [truth[stored + j * count][name] for j in range(loops)]
            mean = made[stored][name]
            assert sum(w - mean for w in group).abs().max() < 1e-14
            error = sum((w - mean).square().sum() for w in group)
            step = torch.randn_like(mean) * 0.01
            assert sum((w - mean - step).square().sum() for w in group) > error


def test_two_loops_averaged_have_opposite_matrices():
    made = convert(tiny("gemma2"), Recipe(2, "average", rank=4))
    for depth in range(3):
        one, two = (made.model.layers[d].self_attn.q_proj for d in (depth, depth + 3))
        assert torch.equal(one.lora_A, two.lora_A)
        assert torch.equal(one.lora_B, -two.lora_B)
    three = convert(tiny("gemma2"), Recipe(3, "average", rank=4)).model.layers
    assert not torch.equal(three[0].mlp.up_proj.lora_A, three[2].mlp.up_proj.lora_A)


def test_of_equal_or_periodic_layers_nothing_is_lost():
    ids = tokens()
    model = tiny("qwen2")
    for layer in model.model.layers[1:]:
        layer.load_state_dict(model.model.layers[0].state_dict())
    for init in INITS:
        assert torch.equal(logits(convert(model, Recipe(2, init)), ids), logits(model, ids))
    model = tiny("qwen2")
    for depth in range(3, 6):
        model.model.layers[depth].load_state_dict(model.model.layers[depth - 3].state_dict())
    for init in ("average", "lower", "upper"):
        assert torch.equal(logits(convert(model, Recipe(2, init)), ids), logits(model, ids))


def bare(kind, recipe, **sizes):
    """A model of transformers without an embedding to speak of, and the shapes of its matrices."""
    config = getattr(transformers, f"{kind}Config")(head_dim=256, vocab_size=8, **sizes)
    with torch.device("meta"):
        model = getattr(transformers, f"{kind}ForCausalLM")(config)
        layer = model.model.layers[0]
        shapes = {name: tuple(layer.get_submodule(name).weight.shape) for name in linears(model)}
        return make_recursive(model, recipe.plan(config.num_hidden_layers, shapes)), shapes


def gemma_2b(recipe):
    """Parameters of the paper's model outside the embedding, and of its matrices."""
    made, _ = bare(
        "Gemma", recipe, hidden_size=2048, intermediate_size=16384, num_hidden_layers=18,
        num_attention_heads=8, num_key_value_heads=1,
    )  # fmt: skip
    named = {n: p.numel() for n, p in made.named_parameters() if "embed" not in n}
    low = sum(count for name, count in named.items() if ".lora_" in name)
    return sum(named.values()), low


@pytest.mark.parametrize(
    ("rank", "low", "two", "three"),
    [
        (0, 0, 0.99, 0.66),
        (64, 0.078, 1.07, 0.74),
        (128, 0.157, 1.15, 0.82),
        (256, 0.314, 1.30, 0.97),
        (512, 0.606, 1.60, 1.27),
    ],
)
def test_parameters_of_the_papers_models(rank, low, two, three):
    for loops, expected in ((2, two), (3, three)):
        total, matrices = gemma_2b(Recipe(loops, rank=rank))
        assert round(total / 1e9, 2) == expected
        assert round(matrices / 1e9, 3) == low
        if rank <= 256:
            assert matrices == 18 * rank * 68_096


@pytest.mark.parametrize(
    ("rank", "expected"), [(64, 1.095), (128, 1.178), (256, 1.344), (512, 1.677)]
)
def test_parameters_of_gemma2_2b(rank, expected):
    """26 layers in two loops, by the closed form; norms are 0.0001 of it."""
    made, sizes = bare(
        "Gemma2", Recipe(2, rank=rank), hidden_size=2304, intermediate_size=9216,
        num_hidden_layers=26, num_attention_heads=8, num_key_value_heads=4,
    )  # fmt: skip
    linear = sum(rows * columns for rows, columns in sizes.values())
    low = sum(min(rank, *size) * sum(size) for size in sizes.values())
    found = sum(
        p.numel() for n, p in made.named_parameters() if "embed" not in n and "norm" not in n
    )
    assert found == 13 * linear + 26 * low
    assert found / 1e9 == pytest.approx(expected, abs=6e-4)


def test_parameters_of_prefixes():
    """L P D, of the paper's model 9.4 million at P = 256."""
    config = transformers.GemmaConfig(
        hidden_size=2048, intermediate_size=16384, num_hidden_layers=18, num_attention_heads=8,
        num_key_value_heads=1, head_dim=256, vocab_size=8,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.GemmaForCausalLM(config)
        before = sum(p.numel() for p in model.parameters())
        after = sum(p.numel() for p in add_prefixes(model, 256).parameters())
    assert after - before == 18 * 256 * 2048 == 9_437_184


def test_ranks_by_linear():
    model = tiny("gemma2")
    recipe = Recipe(2, rank=4, ranks={"q_proj": 0, "mlp.up_proj": 7, "k_proj": 100})
    made = convert(model, recipe)
    layer = made.model.layers[4]
    assert type(layer.self_attn.q_proj) is torch.nn.Linear
    assert layer.mlp.up_proj.rank == 7
    assert layer.self_attn.k_proj.rank == 20  # [20, 24]
    assert layer.self_attn.o_proj.rank == 4
    assert "self_attn.q_proj" not in made.config.recursive["ranks"]
    later = convert(model, Recipe(2, rank=4, lora_from_loop=1))
    assert type(later.model.layers[2].mlp.up_proj) is torch.nn.Linear
    assert later.model.layers[3].mlp.up_proj.rank == 4


def test_refinement_lowers_the_joint_error_of_three_loops():
    model = tiny("llama")
    truth = weights(model)

    def error(refine, loops):
        made = weights(merged(convert(model, Recipe(loops, rank=4, refine=refine))))
        return sum(
            float((one[f"{n}.weight"] - two[f"{n}.weight"]).square().sum())
            for one, two in zip(made, truth, strict=True)
            for n in linears(model)
        )

    three = [error(refine, 3) for refine in (0, 1, 4)]
    assert three == sorted(three, reverse=True)
    assert three[2] < 0.99 * three[0]
    assert abs(error(3, 2) - error(0, 2)) < 1e-9


def test_refined_is_the_mean_of_what_the_matrices_leave():
    group = [torch.randn(5, 4, dtype=torch.float64) for _ in range(3)]
    stored = sum(group) / 3
    factors = of_depths(group, stored, 2)
    best = refined(group, stored, factors)
    left = [w - b @ a - best for w, (a, b) in zip(group, factors, strict=True)]
    assert sum(left).abs().max() < 1e-14


def test_norms_of_the_first_layer_or_their_mean():
    model = tiny("gemma2")
    truth = weights(model)
    name = "post_attention_layernorm.weight"
    first = weights(convert(model, Recipe(2, norms="first")))
    mean = weights(convert(model, Recipe(2)))
    assert torch.equal(first[4][name], truth[1][name])
    torch.testing.assert_close(mean[4][name], (truth[1][name] + truth[4][name]) / 2)
    assert torch.equal(first[4]["mlp.up_proj.weight"], mean[4]["mlp.up_proj.weight"])


def test_low_precision_is_averaged_in_float32_and_repaired_as_rounded():
    model = equal_norms(tiny("llama", dtype=torch.bfloat16))
    made = convert(model, Recipe(2, rank=1000))
    one = model.model.layers[1].mlp.up_proj.weight.float()
    two = model.model.layers[4].mlp.up_proj.weight.float()
    linear = made.model.layers[4].mlp.up_proj
    assert torch.equal(linear.weight, ((one + two) / 2).bfloat16())
    left = two - linear.weight.float()
    low = linear.lora_B.float() @ linear.lora_A.float()
    assert (left - low).norm() < 2**-7 * left.norm()


def test_the_source_stays_as_it_is():
    model = tiny("gemma2")
    before = copy.deepcopy(model.state_dict())
    made = convert(model, Recipe(2, "lower", rank=3))
    torch.nn.init.zeros_(made.model.layers[0].mlp.up_proj.weight)
    torch.nn.init.zeros_(made.model.embed_tokens.weight)
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    assert not hasattr(model.config, "recursive")


def test_gaussian_is_cut_to_the_linear_and_seeded():
    a, b = gaussian(5, 200, 64, torch.float32, 1)
    assert a.shape == (5, 200)
    assert not b.any()
    assert abs(float(a.std()) * 5 - 1) < 0.1
    assert torch.equal(a, gaussian(5, 200, 64, torch.float32, 1)[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": "best"}, "init: expected one of stepwise"),
        ({"order": "odd"}, "order: expected one of cycle"),
        ({"lora_init": "odd"}, "lora_init: expected one of svd, zero"),
        ({"svd": "odd"}, "svd: expected one of auto, exact, randomised"),
        ({"norms": "odd"}, "norms: expected one of average, first"),
        ({"rank": -1}, "rank: expected a number >= 0, got -1"),
        ({"prefix": -1}, "prefix: expected a number >= 0, got -1"),
        ({"refine": -1}, "refine: expected a number >= 0, got -1"),
        ({"lora_from_loop": -1}, "lora_from_loop: expected a number >= 0, got -1"),
        ({"refine": 1, "lora_init": "zero"}, "refine: expected lora_init 'svd', got 'zero'"),
    ],
)
def test_what_is_no_recipe(options, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**options)


def test_recipes_that_do_not_fit_the_model():
    model = tiny("gemma2")
    with pytest.raises(ValueError, match="loops: expected a divisor of the 6"):
        convert(model, Recipe(4))
    with pytest.raises(ValueError, match=r"ranks: expected linears among .*, got 'w_q'"):
        convert(model, Recipe(2, ranks={"w_q": 3}))
    with pytest.raises(ValueError, match="ranks: expected numbers >= 0, got -3 for 'q_proj'"):
        convert(model, Recipe(2, ranks={"q_proj": -3}))
    with pytest.raises(ValueError, match=r"lora_from_loop: .* loops 0..1, got 2"):
        convert(model, Recipe(2, rank=3, lora_from_loop=2))
    with pytest.raises(ValueError, match="not recursive yet, got one that is"):
        convert(convert(model, Recipe(2)), Recipe(2))


@pytest.mark.parametrize("init", ["average", "lower"])
@pytest.mark.parametrize("loops", [2, 3])
def test_refinement_counts_depths_without_matrices(loops, init):
    model = tiny("llama")
    truth = weights(model)

    def error(refine):
        recipe = Recipe(loops, init, rank=4, lora_from_loop=1, refine=refine)
        made = weights(merged(convert(model, recipe)))
        return sum(
            float((one[f"{n}.weight"] - two[f"{n}.weight"]).square().sum())
            for one, two in zip(made, truth, strict=True)
            for n in linears(model)
        )

    found = [error(refine) for refine in (0, 1, 4)]
    assert found == sorted(found, reverse=True)
    assert found[2] < 0.99 * found[0]


def test_how_a_model_generates_stays():
    model = tiny("gemma2")
    model.generation_config.eos_token_id = [1, 5]
    made = convert(model, Recipe(2))
    assert made.generation_config.eos_token_id == [1, 5]
    assert made.generation_config is not model.generation_config


def test_dtypes_of_a_source_stay():
    model = tiny("llama", dtype=torch.bfloat16)
    for name, part in model.named_modules():
        if "norm" in name:
            part.float()
    made = convert(model, Recipe(2, rank=2))
    kinds = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert len(set(kinds.values())) == 2
    assert all(kinds[n] == p.dtype for n, p in made.named_parameters() if n in kinds)
