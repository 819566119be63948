"""LoRA merging: against formulas in float64, and against peft where it is right."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from tiny_lm import batch, gemma2

from gemma_ext.souping.lora import (
    COMBINATIONS,
    Adapter,
    Factors,
    load_adapter,
    merge_adapters,
    merge_factors,
    save_adapter,
)

WEIGHTS = [0.7, -0.4, 1.2]
DENSE = ("ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")
APART = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")


def updates(seed=0, ranks=(3, 3, 3), shape=(11, 9), scaling=(2.0, 0.5, 1.0)):
    generator = torch.Generator().manual_seed(seed)
    return [
        Factors(
            torch.randn(r, shape[1], generator=generator),
            torch.randn(shape[0], r, generator=generator),
            s,
        )
        for r, s in zip(ranks, scaling, strict=True)
    ]


def dense_sum(factors, weights=WEIGHTS):
    return sum(w * f.dense(torch.float64) for w, f in zip(weights, factors, strict=True))


def nearest(matrix, rank):
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


@pytest.mark.parametrize("combination", ["exact", "cat"])
def test_exact_forms_are_the_sum(combination):
    factors = updates(ranks=(2, 3, 1))
    merged = merge_factors(factors, WEIGHTS, combination)
    assert merged.rank == 6
    assert merged.scaling == 1.0
    assert torch.allclose(merged.dense(torch.float64), dense_sum(factors), atol=1e-5)


@pytest.mark.parametrize("rank", [None, 1, 2, 5])
def test_svd_is_the_nearest_of_its_rank(rank):
    factors = updates(ranks=(2, 3, 1))
    for combination, default in (("svd", 3), ("exact", 6)):
        merged = merge_factors(factors, WEIGHTS, combination, rank=rank)
        kept = rank or default
        assert merged.rank == kept
        true = nearest(dense_sum(factors), kept)
        assert torch.allclose(merged.dense(torch.float64), true, atol=1e-5)


def test_rank_beyond_the_matrix_is_padded():
    factors = updates(ranks=(4, 4, 4), shape=(5, 7))
    merged = merge_factors(factors, WEIGHTS, "exact")
    assert merged.a.shape == (12, 7)
    assert merged.b.shape == (5, 12)
    assert torch.allclose(merged.dense(torch.float64), dense_sum(factors), atol=1e-5)


def apart(factors, weights, merge):
    """(A, B) of the roots of the weights, merged one by one."""
    gains = [w * f.scaling for w, f in zip(weights, factors, strict=True)]
    roots = [math.sqrt(abs(g)) for g in gains]
    signed = [math.copysign(r, g) for r, g in zip(roots, gains, strict=True)]
    a = merge([f.a.double() for f in factors], signed)
    return a, merge([f.b.double() for f in factors], roots)


def pruned(x, density):
    order = x.abs().flatten().argsort(descending=True, stable=True)
    mask = torch.zeros(x.numel(), dtype=torch.bool)
    mask[order[: int(density * x.numel())]] = True
    return x * mask.view(x.shape)


def ties(xs, weights, count):
    total = torch.stack([x.sign() if count else x for x in xs]).sum(0)
    sign = torch.where(total >= 0, 1.0, -1.0)
    agree = [x.sign() == sign for x in xs]
    number = torch.stack(agree).sum(0).clamp(min=1)
    return sum(w * x * a for w, x, a in zip(weights, xs, agree, strict=True)) / number


@pytest.mark.parametrize("signs", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.3, 1.0])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("rule", ["ties", "magnitude_prune"])
def test_pruning_forms(rule, dense, density, signs):
    factors = updates()

    def merge(xs, weights):
        xs = [pruned(x, density) for x in xs]
        if rule == "ties":
            return ties(xs, weights, signs == "frequency")
        return sum(w * x for w, x in zip(weights, xs, strict=True))

    options = {"density": density, "majority_sign_method": signs}
    if dense:
        merged = merge_factors(factors, WEIGHTS, f"{rule}_svd", rank=9, **options)
        true = merge([f.dense().double() for f in factors], WEIGHTS)
        assert torch.allclose(merged.dense(torch.float64), true, atol=1e-5)
        low = merge_factors(factors, WEIGHTS, f"{rule}_svd", **options)
        assert torch.allclose(low.dense(torch.float64), nearest(true, 3), atol=1e-4)
    else:
        merged = merge_factors(factors, WEIGHTS, rule, **options)
        a, b = apart(factors, WEIGHTS, merge)
        assert torch.allclose(merged.a.double(), a, atol=1e-5)
        assert torch.allclose(merged.b.double(), b, atol=1e-5)


def test_linear_has_the_cross_terms_in_it():
    factors = updates()
    merged = merge_factors(factors, WEIGHTS, "linear")
    a, b = apart(factors, WEIGHTS, lambda xs, ws: sum(w * x for w, x in zip(ws, xs, strict=True)))
    assert torch.allclose(merged.dense(torch.float64), b @ a, atol=1e-5)
    assert float((merged.dense(torch.float64) - dense_sum(factors)).abs().max()) > 0.1


@pytest.mark.parametrize("rule", ["dare_linear", "dare_ties"])
def test_dare_forms_at_density_one_drop_nothing(rule):
    factors = updates()
    plain = {"dare_linear": "linear", "dare_ties": "ties"}[rule]
    one = merge_factors(factors, WEIGHTS, rule, density=1.0)
    two = merge_factors(factors, WEIGHTS, plain, density=1.0)
    assert torch.allclose(one.a, two.a, atol=1e-6)
    assert torch.allclose(one.b, two.b, atol=1e-6)
    full = merge_factors(factors, WEIGHTS, f"{rule}_svd", density=1.0, rank=9)
    true = (
        dense_sum(factors)
        if rule == "dare_linear"
        else ties([f.dense().double() for f in factors], WEIGHTS, False)
    )
    assert torch.allclose(full.dense(torch.float64), true, atol=1e-4)


def test_dare_rescales_and_is_reproducible():
    """The mean over seeds of A is that of the linear form, within five sigma."""
    factors, density, repeats = updates(), 0.4, 400
    draws = torch.stack([
        merge_factors(factors, WEIGHTS, "dare_linear", density=density, seed=s, name="w").a
        for s in range(repeats)
    ]).double()  # fmt: skip
    true = merge_factors(factors, WEIGHTS, "linear").a.double()
    sigma = draws.std(0) / math.sqrt(repeats)
    assert ((draws.mean(0) - true).abs() < 5 * sigma).all()
    again = merge_factors(factors, WEIGHTS, "dare_linear", density=density, seed=0, name="w").a
    other = merge_factors(factors, WEIGHTS, "dare_linear", density=density, seed=0, name="v").a
    assert torch.equal(again.double(), draws[0])
    assert not torch.equal(again, other)


@pytest.mark.parametrize("combination", ["svd", "ties_svd", "exact"])
def test_clamp_cuts_the_tails(combination):
    factors = updates()
    plain = merge_factors(factors, WEIGHTS, combination, density=0.5)
    clamped = merge_factors(factors, WEIGHTS, combination, density=0.5, clamp=0.9)
    if combination == "exact":
        assert torch.equal(clamped.a, plain.a)
        return
    elements = torch.cat([plain.b.flatten(), plain.a.flatten()]).double()
    bound = float(torch.cat([elements, -elements]).quantile(0.9))
    assert float(clamped.b.abs().max()) < float(plain.b.abs().max())
    assert torch.allclose(clamped.b, plain.b.clamp(-bound, bound), atol=1e-5)
    assert torch.allclose(clamped.a, plain.a.clamp(-bound, bound), atol=1e-5)


def test_dtype_is_that_of_the_first():
    factors = [Factors(f.a.bfloat16(), f.b.bfloat16(), f.scaling) for f in updates()]
    for combination in COMBINATIONS:
        merged = merge_factors(factors, WEIGHTS, combination, density=0.5)
        assert merged.a.dtype == merged.b.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"combination_type": "mean"}, "expected combination_type to be one of exact, cat"),
        ({"factors": [], "weights": []}, "expected at least one update to merge, got none"),
        ({"weights": [1.0]}, "expected 3 weights, got 1"),
        ({"combination_type": "ties"}, r"expected density in \[0, 1\] with ties, got None"),
        (
            {"combination_type": "dare_linear_svd", "density": 1.5},
            r"expected density in \[0, 1\] with dare_linear_svd, got 1.5",
        ),
        (
            {"factors": updates(ranks=(1, 2, 3)), "combination_type": "linear"},
            r"expected equal ranks with linear, got \[1, 2, 3\]",
        ),
        (
            {"factors": [*updates()[:2], updates(shape=(4, 9))[0]]},
            r"expected updates of one weight, got shapes \[\(4, 9\), \(11, 9\)\]",
        ),
        (
            {"majority_sign_method": "vote"},
            "expected majority_sign_method to be total or frequency, got 'vote'",
        ),
    ],
)
def test_arguments(change, message):
    arguments = {"factors": updates(), "weights": WEIGHTS, **change}
    with pytest.raises(ValueError, match=message):
        merge_factors(**arguments)


# peft


TARGETS = ["q_proj", "down_proj"]


@pytest.fixture(scope="module")
def peft_model():
    from peft import LoraConfig, get_peft_model

    model = None
    for index, name in enumerate(("one", "two")):
        config = LoraConfig(r=4, lora_alpha=4 * (index + 1), target_modules=TARGETS)
        if model is None:
            model = get_peft_model(gemma2(), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def folders(model, path):
    model.save_pretrained(path, selected_adapters=["one", "two"])
    return [load_adapter(path / name) for name in ("one", "two")]


PEFT = [
    ("linear", {}),
    ("cat", {}),
    ("svd", {}),
    ("svd", {"svd_rank": 2}),
    ("ties", {"density": 0.5}),
    ("ties", {"density": 0.5, "majority_sign_method": "frequency"}),
    ("ties_svd", {"density": 0.5}),
    ("magnitude_prune", {"density": 0.4}),
    ("magnitude_prune_svd", {"density": 0.4}),
    ("dare_linear", {"density": 1.0}),
    ("dare_ties", {"density": 1.0}),
    ("dare_linear_svd", {"density": 1.0}),
    ("dare_ties_svd", {"density": 1.0}),
]
OURS = {"svd_rank": "rank"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("combination", "options"), PEFT)
def test_as_peft_does(peft_model, tmp_path, combination, options):
    adapters = folders(peft_model, tmp_path)
    weights = [0.8, -0.3]
    model = copy.deepcopy(peft_model)
    model.add_weighted_adapter(["one", "two"], weights, "merged", combination, **options)
    merged = merge_adapters(
        adapters, weights, combination, **{OURS.get(k, k): v for k, v in options.items()}
    )
    assert len(merged.factors) == 6
    for module, factors in merged.factors.items():
        layer = model.base_model.model.get_submodule(module)
        true = layer.get_delta_weight("merged").detach()
        assert torch.allclose(factors.dense(), true, atol=2e-4), module


@pytest.mark.filterwarnings("ignore")
def test_folders_are_loaded_by_peft(peft_model, tmp_path):
    from peft import PeftModel

    adapters = folders(peft_model, tmp_path)
    merged = merge_adapters(adapters, [0.5, 0.5], "exact")
    save_adapter(merged, tmp_path / "merged")
    assert {p.name for p in (tmp_path / "merged").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors"}  # fmt: skip
    loaded = PeftModel.from_pretrained(gemma2(), tmp_path / "merged").eval()
    dense = gemma2()
    with torch.no_grad():
        for adapter in adapters:
            for module, factors in adapter.factors.items():
                dense.get_submodule(module).weight += 0.5 * factors.dense()
    tokens = batch()
    assert torch.allclose(loaded(**tokens).logits, dense(**tokens).logits, atol=1e-3)
    again = load_adapter(tmp_path / "merged")
    for module, factors in merged.factors.items():
        assert torch.equal(again.factors[module].a, factors.a)
        assert again.factors[module].scaling == 1.0


@pytest.mark.filterwarnings("ignore")
def test_scalings_as_peft_has_them(tmp_path):
    """rsLoRA, patterns of ranks and alphas, and an embedding."""
    from peft import LoraConfig, PeftModel, get_peft_model

    config = LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=True,
        target_modules=[*TARGETS, "embed_tokens"],
        rank_pattern={"down_proj": 2},
        alpha_pattern={r"layers\.1\.self_attn\.q_proj": 12},
        init_lora_weights=False,
    )
    model = get_peft_model(gemma2(), config)
    model.save_pretrained(tmp_path)
    adapter = load_adapter(tmp_path)
    assert adapter.embeddings == {"model.embed_tokens"}
    ranks = set()
    for module, factors in adapter.factors.items():
        layer = model.base_model.model.get_submodule(module)
        true = layer.get_delta_weight("default").detach()
        ours = factors.dense()
        assert torch.allclose(ours.T if module in adapter.embeddings else ours, true, atol=1e-5)
        ranks.add(factors.rank)
    assert ranks == {2, 4}
    merged = merge_adapters([adapter, adapter], [0.5, 0.5], "exact")
    save_adapter(merged, tmp_path / "out")
    loaded = PeftModel.from_pretrained(gemma2(), tmp_path / "out")
    for module in adapter.factors:
        theirs = loaded.base_model.model.get_submodule(module).get_delta_weight("default")
        mine = model.base_model.model.get_submodule(module).get_delta_weight("default")
        assert torch.allclose(theirs, mine, atol=1e-4), module


def adapter(**factors):
    return Adapter(factors, {"r": 3, "lora_alpha": 3, "peft_type": "LORA"})


def test_modules_of_some_adapters_alone():
    one, two, _ = updates()
    merged = merge_adapters([adapter(x=one, y=one), adapter(y=two)], [0.5, 2.0], "exact")
    assert torch.allclose(merged.factors["x"].dense(), 0.5 * one.dense(), atol=1e-5)
    assert merged.factors["x"].rank == 3
    assert merged.config["r"] == 6
    assert merged.config["rank_pattern"] == {"x": 3}
    assert merged.config["target_modules"] == ["x", "y"]
    with pytest.raises(ValueError, match="expected at least one adapter, got none"):
        merge_adapters([], [])
    with pytest.raises(ValueError, match="expected 1 weights, got 2"):
        merge_adapters([adapter(x=one)], [1.0, 1.0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "adapter_config.json: expected a LoRA adapter, got IA3"),
        ({"use_dora": True}, r"adapter_config.json: use_dora: expected W \+ s B A alone"),
        ({"bias": "all"}, r"adapter_config.json: bias: expected W \+ s B A alone"),
    ],
)
def test_adapters_that_are_more_than_lora(tmp_path, change, message):
    save_adapter(adapter(x=updates()[0]), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=message):
        load_adapter(tmp_path)


def test_files_that_hold_something_else(tmp_path):
    from safetensors.torch import save_file

    save_adapter(adapter(x=updates()[0]), tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    save_file({"base_model.model.x.lora_A.weight": torch.ones(2, 3)}, weights)
    with pytest.raises(ValueError, match="expected two matrices A and B of x, got others"):
        load_adapter(tmp_path)
    save_file({"x.weight": torch.ones(2, 3)}, weights)
    with pytest.raises(ValueError, match="expected LoRA factors alone, got all of x"):
        load_adapter(tmp_path)
