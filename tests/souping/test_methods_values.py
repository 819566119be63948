"""Merge methods against their formulas in float64, written here once more and without the ops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from merge_oracle import SHAPES, Tensors, assert_near, family, run, stack

from gemma_ext.souping.methods import METHODS

WEIGHTS = [0.6, -0.2, 0.9]
LAMBDA = 1.3
TIED = torch.bfloat16
"""Deltas of bfloat16 weights share their magnitudes: ties are everywhere."""


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def models(request):
    tunes, base = family(3, seed=3, dtype=request.param)
    # exact zeros, one of them negative, and one tensor that nobody moved
    for tune in tunes[:2]:
        tune["model.layers.0.mlp.up_proj.weight"][:3] = base["model.layers.0.mlp.up_proj.weight"][
            :3
        ]
    return tunes, base


def check(name: str, models, expected, tolerance: float = 2e-6, **parameters) -> Tensors:
    """Runs a method into float32 and compares every tensor with expected(delta [M, ..], base)."""
    tunes, base = models
    got = run(METHODS[name], tunes, base, dtype=torch.float32, **parameters)
    true = {n: expected(stack(tunes, base, n).numpy(), base[n].double().numpy()) for n in base}
    assert_near(got, {n: torch.from_numpy(np.asarray(t)) for n, t in true.items()}, tolerance)
    return got


def keep_largest(delta: np.ndarray, count: int) -> np.ndarray:
    """Mask of the `count` largest magnitudes, lowest index first among equals."""
    order = sorted(range(delta.size), key=lambda i: (-abs(delta.flat[i]), i))
    mask = np.zeros(delta.size, bool)
    mask[order[:count]] = True
    return mask.reshape(delta.shape)


def column(values, like: np.ndarray) -> np.ndarray:
    return np.asarray(values, float).reshape(-1, *[1] * (like.ndim - 1))


def elect(terms, votes, zero=1.0, count=False):
    """Masks of the models that have the elected sign."""
    total = (np.sign(votes) if count else votes).sum(0)
    sign = np.where(np.sign(total) == 0, zero, np.sign(total))
    return (np.sign(votes) == sign) & (votes != 0)


def test_linear(models):
    tunes, base = models
    whole = {n: torch.stack([t[n].double() for t in tunes]) for n in base}
    for normalize in (True, False):
        got = run(
            METHODS["linear"], tunes, weight=WEIGHTS, normalize=normalize, dtype=torch.float32
        )
        scale = sum(WEIGHTS) if normalize else 1.0
        true = {
            n: sum(w * x for w, x in zip(WEIGHTS, t, strict=True)) / scale for n, t in whole.items()
        }
        assert_near(got, true)


@pytest.mark.parametrize("normalize", [False, True])
def test_task_arithmetic(models, normalize):
    scale = LAMBDA / (sum(WEIGHTS) if normalize else 1.0)
    check("task_arithmetic", models,
          lambda d, b: b + scale * (column(WEIGHTS, d) * d).sum(0),
          weight=WEIGHTS, normalize=normalize, lambda_=LAMBDA)  # fmt: skip


def test_weights_that_cancel_are_not_divided_by(models):
    check("task_arithmetic", models,
          lambda d, b: b + (column([0.5, 0.5, -1.0], d) * d).sum(0),
          weight=[0.5, 0.5, -1.0], normalize=True)  # fmt: skip


@pytest.mark.parametrize("scale", [None, 1.0, 0.3, -2.0])
def test_passthrough(scale):
    tunes, _ = family(1)
    got = run(METHODS["passthrough"], tunes, scale=scale)
    assert_near(
        got, {n: t.double() * (1.0 if scale is None else scale) for n, t in tunes[0].items()}
    )


@pytest.mark.parametrize(
    ("election", "election_weights", "zero", "merge_func", "normalize"),
    [
        ("sum", True, "positive", None, True),  # mergekit
        ("sum", True, "positive", None, False),
        ("count", True, "positive", None, True),
        ("sum", False, "positive", "mean", False),  # peft
        ("count", False, "positive", "mean", False),
        ("sum", False, "none", "sum", True),
        ("count", True, "none", "max", True),
        ("sum", True, "none", "max", False),
        ("count", False, "none", "weighted_mean", False),
    ],
)
def test_ties_per_tensor(models, election, election_weights, zero, merge_func, normalize):
    densities = [0.3, 0.55, 1.0]

    def expected(d, b):
        masks = np.stack(
            [keep_largest(x, int(k * x.size)) for x, k in zip(d, densities, strict=True)]
        )
        trimmed = np.where(masks, d, 0.0)
        terms = column(WEIGHTS, d) * trimmed
        votes = terms if election_weights else trimmed
        agree = elect(terms, votes, {"positive": 1.0, "none": 0.0}[zero], election == "count")
        return b + LAMBDA * combine(
            terms, agree, WEIGHTS, merge_func or ("weighted_mean" if normalize else "sum")
        )

    check("ties", models, expected, 1e-5, weight=WEIGHTS, density=densities, normalize=normalize,
          lambda_=LAMBDA, election=election, election_weights=election_weights, zero=zero,
          merge_func=merge_func)  # fmt: skip


def combine(terms, agree, weights, how):
    kept = np.where(agree, terms, 0.0)
    if how == "sum":
        return kept.sum(0)
    if how == "mean":
        return kept.sum(0) / np.maximum(agree.sum(0), 1)
    if how == "max":
        return np.take_along_axis(kept, np.abs(kept).argmax(0)[None], 0)[0]
    total = (column(weights, terms) * agree).sum(0)
    return kept.sum(0) / np.where(total == 0, 1.0, total)


@pytest.mark.parametrize("density", [0.2, 0.5])
def test_ties_keeps_exactly_the_count_it_says(density):
    """bfloat16 deltas with hundreds of equal magnitudes: no more, no fewer."""
    tunes, base = family(1, dtype=TIED, size=1e-3, shapes={"w": (64, 96)})
    got = run(METHODS["ties"], tunes, base, weight=1.0, density=density)["w"]
    delta = (tunes[0]["w"].float() - base["w"].float()).abs()
    kept = (got != base["w"]).sum()
    threshold = delta.flatten().sort(descending=True).values[int(density * delta.numel()) - 1]
    assert int((delta == threshold).sum()) > 20
    assert int(kept) == int(density * delta.numel()) if threshold > 0 else int((delta > 0).sum())


def test_ties_by_row(models):
    def expected(d, b):
        rows = d.reshape(len(d), -1, d.shape[-1])
        count = int(0.4 * rows.shape[-1])
        masks = np.stack([[keep_largest(row, count) for row in x] for x in rows])
        terms = column(WEIGHTS, rows) * np.where(masks, rows, 0.0)
        agree = elect(terms, terms)
        return b + combine(terms, agree, WEIGHTS, "weighted_mean").reshape(b.shape)

    check("ties_row", models, expected, 1e-5, weight=WEIGHTS, density=0.4)


def trimmed_model(models, threshold) -> dict[str, np.ndarray]:
    """Masks [M, ..] by tensor from threshold(magnitudes of the model [D]) -> predicate."""
    tunes, base = models
    deltas = {n: stack(tunes, base, n).numpy() for n in base}
    flat = np.concatenate([d.reshape(len(d), -1) for d in deltas.values()], 1)
    keeps = [threshold(np.sort(np.abs(row))) for row in flat]
    return {
        n: np.stack([keep(np.abs(x)) for keep, x in zip(keeps, d, strict=True)])
        for n, d in deltas.items()
    }


def ref(v, k):
    threshold = v[max(len(v) - int(len(v) * k), 1) - 1]
    return lambda x: x >= threshold


def mergelm(v, k):
    dropped = int((1 - k) * len(v))
    threshold = v[dropped - 1] if dropped else -1.0
    return lambda x: x > threshold


def localized(v, k, keep_equal=False):
    threshold = v[len(v) - int(len(v) * k)]
    return lambda x: x >= threshold if keep_equal else x > threshold


GLOBAL = {"ties_ref": ref, "ties_mergelm": mergelm, "ties_ls": localized}


@pytest.mark.parametrize("zero", ["majority", "minority", "positive", "none"])
@pytest.mark.parametrize("name", sorted(GLOBAL))
def test_ties_over_the_model(models, name, zero):
    tunes, base = models
    masks = trimmed_model(models, lambda v: GLOBAL[name](v, 0.35))
    trimmed = {n: np.where(masks[n], stack(tunes, base, n).numpy(), 0.0) for n in base}
    balance = sum(np.sign(t.sum(0)).sum() for t in trimmed.values())
    elected = {"majority": np.sign(balance), "minority": -np.sign(balance), "positive": 1.0,
               "none": 0.0}[zero]  # fmt: skip
    true = {}
    for n, t in trimmed.items():
        terms = column(WEIGHTS, t) * t
        agree = elect(terms, t, elected)
        true[n] = torch.from_numpy(
            base[n].double().numpy() + LAMBDA * combine(terms, agree, WEIGHTS, "mean")
        )
    got = run(METHODS[name], tunes, base, dtype=torch.float32, weight=WEIGHTS, density=0.35,
              lambda_=LAMBDA, zero=zero)  # fmt: skip
    assert_near(got, true, 1e-5)


def test_readings_of_the_same_share_differ_where_magnitudes_are_equal():
    tunes, base = family(1, dtype=TIED, size=2e-3, shapes={"w": (40, 50), "v": (333,)})
    kept = {}
    for name in ("ties", *GLOBAL):
        got = run(METHODS[name], tunes, base, weight=1.0, density=0.3)
        kept[name] = sum(int((got[n] != base[n]).sum()) for n in base)
    elements = 40 * 50 + 333
    assert kept["ties"] == int(0.3 * 2000) + int(0.3 * 333)
    assert kept["ties_mergelm"] < int(0.3 * elements) < kept["ties_ref"]
    assert kept["ties_ls"] <= kept["ties_mergelm"]
    kept_equal = run(METHODS["ties_ls"], tunes, base, density=0.3, keep_equal=True)
    assert kept["ties_ref"] == sum(int((kept_equal[n] != base[n]).sum()) for n in base)


@pytest.mark.parametrize("name", ["dare", "della"])
@pytest.mark.parametrize("norm", ["density", "l1", "l2", "linf"])
def test_rescaled_drops(models, name, norm):
    """The masks are read off the method itself with one model at a time and weight 1; the rest of
    the formula is written here."""
    tunes, base = models
    density, epsilon = 0.5, 0.2
    more = {"epsilon": epsilon} if "della" in name else {}
    shared = {"weight": [1.0, 0.0, 0.0], "density": density, "dtype": torch.float32, **more}
    method = METHODS[f"{name}_linear"]
    dropped = run(method, tunes, base, rescale=False, **shared)
    first = {n: (dropped[n] != base[n].float()).numpy() for n in base}
    got = run(method, tunes, base, rescale=True, rescale_norm=norm, **shared)
    true = {}
    for n in base:
        d = stack(tunes, base, n).numpy()[0]
        masked = np.where(first[n], d, 0.0)
        orders = {"l1": 1, "l2": 2, "linf": np.inf}
        if norm in orders:
            whole, kept = (np.linalg.norm(x.ravel(), orders[norm]) for x in (d, masked))
            factor = whole / kept if kept > 1e-7 else 1.0
        elif name == "della":
            factor = 1 / probabilities(d, density, epsilon)
        else:
            factor = 1 / density
        true[n] = torch.from_numpy(base[n].double().numpy() + factor * masked)
    assert_near(got, true, 1e-5)


def probabilities(delta: np.ndarray, density: float, epsilon: float) -> np.ndarray:
    """Of being kept, by the rank in each row; of equals the lowest column ranks highest."""
    rows = delta.reshape(-1, delta.shape[-1])
    p = np.full(rows.shape, density)
    for r, row in enumerate(rows):
        order = sorted(range(len(row)), key=lambda i: (abs(row[i]), -i))
        for place, i in enumerate(order):
            if len(row) > 1:
                p[r, i] = density - epsilon + 2 * epsilon * place / (len(row) - 1)
    return p.reshape(delta.shape)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("name", ["dare", "della"])
def test_random_drops_with_an_election(models, name, normalize):
    """Terms of each model alone, then elected and combined here."""
    tunes, base = models
    terms = []
    for model in range(3):
        weight = [w * (m == model) for m, w in enumerate(WEIGHTS)]
        alone = run(METHODS[f"{name}_linear"], tunes, base, weight=weight, density=0.5,
                    dtype=torch.float32, seed=7)  # fmt: skip
        terms.append({n: alone[n].double() - base[n].double() for n in base})
    got = run(METHODS["dare_ties" if name == "dare" else "della"], tunes, base, weight=WEIGHTS,
              density=0.5, normalize=normalize, dtype=torch.float32, seed=7)  # fmt: skip
    true = {}
    for n in base:
        x = np.stack([t[n].numpy() for t in terms])
        # what float32 leaves of base + 0
        x = np.where(np.abs(x) > 1e-6, x, 0.0)
        merged = combine(x, elect(x, x), WEIGHTS, "weighted_mean" if normalize else "sum")
        true[n] = torch.from_numpy(base[n].double().numpy() + merged)
    off = sum(int(((got[n].double() - true[n]).abs() > 1e-4).sum()) for n in base)
    assert off <= 1  # a sum of terms near 0 may turn with their last bit


@pytest.mark.parametrize("spread", ["rank", "value"])
def test_della_keeps_by_rank(spread):
    """How often an element of each place survives, over many rows, within four sigma."""
    rows, columns, density, epsilon = 4000, 9, 0.6, 0.3
    tunes, base = family(1, shapes={"w": (rows, columns)})
    got = run(METHODS["della_linear"], tunes, base, weight=1.0, density=density, epsilon=epsilon,
              rescale=False, spread=spread)["w"]  # fmt: skip
    delta = (tunes[0]["w"] - base["w"]).abs().numpy()
    kept = (got != base["w"]).numpy()
    if spread == "rank":
        p = probabilities(delta, density, epsilon)
    else:
        low, high = delta.min(1, keepdims=True), delta.max(1, keepdims=True)
        p = density - epsilon + 2 * epsilon * (delta - low) / (high - low)
    for place in range(columns):
        at = np.argsort(delta, 1)[:, place]
        mean, share = p[np.arange(rows), at].mean(), kept[np.arange(rows), at].mean()
        assert abs(share - mean) < 4 * math.sqrt(0.25 / rows)


def test_dare_keeps_the_expectation():
    """Mean and variance of delta mask / d over many elements, within four sigma."""
    n, density = 40_000, 0.2
    tunes, base = family(2, shapes={"w": (n,)})
    for tune in tunes:
        tune["w"] = base["w"] + 0.25
    got = run(METHODS["dare_linear"], tunes, base, weight=[1.0, 0.0], density=density)["w"]
    delta = (got - base["w"]).double()
    kept = int((got != base["w"]).sum())
    assert abs(kept - density * n) < 4 * math.sqrt(n * density * (1 - density))
    sigma = 0.25 * math.sqrt((1 - density) / density)
    assert abs(float(delta.mean()) - 0.25) < 4 * sigma / math.sqrt(n)
    other = run(METHODS["dare_linear"], tunes, base, weight=[0.0, 1.0], density=density)["w"]
    again = run(METHODS["dare_linear"], tunes, base, weight=[1.0, 0.0], density=density)["w"]
    seeded = run(METHODS["dare_linear"], tunes, base, weight=[1.0, 0.0], density=density, seed=1)[
        "w"
    ]
    assert torch.equal(got, again)
    both = int(((got != base["w"]) & (other != base["w"])).sum())
    assert abs(both - density**2 * n) < 4 * math.sqrt(n * density**2)
    assert not torch.equal(got, seeded)


@pytest.mark.parametrize(("density", "gamma"), [(0.5, 0.2), (0.8, 0.5), (0.3, 0.0), (0.9, 0.001)])
@pytest.mark.parametrize("name", ["breadcrumbs", "breadcrumbs_ties"])
def test_breadcrumbs(models, name, density, gamma):
    """gamma 0 and gammas below 1 / n take nothing from the top and zero nothing."""

    def expected(d, b):
        n = b.size
        stay, top = int(density * n), int(gamma * n)
        top = min(top, n - stay) if stay else 0
        masks = np.stack([keep_largest(x, stay + top) & ~keep_largest(x, top) for x in d])
        terms = column(WEIGHTS, d) * np.where(masks, d, 0.0)
        agree = elect(terms, terms) if name.endswith("ties") else np.ones(d.shape, bool)
        return b + combine(terms, agree, WEIGHTS, "sum")

    check(name, models, expected, weight=WEIGHTS, density=density, gamma=gamma)


def test_breadcrumbs_can_keep_a_norm(models):
    def expected(d, b):
        stay, top = int(0.5 * b.size), min(int(0.1 * b.size), b.size - int(0.5 * b.size))
        total = 0.0
        for w, x in zip(WEIGHTS, d, strict=True):
            kept = np.where(keep_largest(x, stay + top) & ~keep_largest(x, top), x, 0.0)
            whole, part = np.abs(x).sum(), np.abs(kept).sum()
            total = total + w * kept * (whole / part if part >= 1e-7 else 1.0)
        return b + total

    check("breadcrumbs", models, expected, 1e-5, weight=WEIGHTS, density=0.5, gamma=0.1,
          rescale=True)  # fmt: skip


@pytest.mark.parametrize("remove_first", [True, False])
def test_breadcrumbs_by_row(models, remove_first):
    def expected(d, b):
        rows = d.reshape(len(d), -1, d.shape[-1])
        keep, drop = int(0.5 * d.shape[-1]), int(0.2 * d.shape[-1])
        upto = keep + drop if remove_first else keep
        masks = np.stack(
            [[keep_largest(r, upto) & ~keep_largest(r, drop) for r in x] for x in rows]
        )
        return b + 0.2 * (column(1.0, rows) * np.where(masks, rows, 0.0)).sum(0).reshape(b.shape)

    check("breadcrumbs_row", models, expected, density=0.5, gamma=0.2, remove_first=remove_first)


@pytest.mark.parametrize("mask_deltas", [False, True])
@pytest.mark.parametrize("share", [1.0, 0.3, 0.0])
def test_sce(models, share, mask_deltas):
    def expected(d, b):
        variance = d.astype(np.float32).astype(float).var(0)
        keep = np.ones(b.shape, bool)
        if share < 1:
            keep = keep_largest(variance, int(share * (variance != 0).sum()))
        energy = np.array([(x[keep] ** 2).sum() for x in d])
        weights = energy / energy.sum() if energy.sum() > 0 else np.full(len(d), 1 / len(d))
        used = np.where(keep, d, 0.0) if mask_deltas else d
        agree = elect(used, used)
        return b + combine(column(weights, d) * used, agree, weights, "weighted_mean")

    check("sce", models, expected, 1e-5, select_topk=share, mask_deltas=mask_deltas)


def test_sce_weighs_ordinary_fine_tunes():
    """Energies of 9 to 1 give weights of 9 to 1, however small the deltas are."""
    base = {"w": torch.zeros(64)}
    sign = torch.ones(64)
    tunes = [{"w": 3e-4 * sign}, {"w": 1e-4 * sign}]
    got = run(METHODS["sce"], tunes, base)["w"]
    assert_near({"w": got / 1e-4}, {"w": (0.9 * 3 + 0.1 * 1) * sign.double()}, 1e-5)


def test_nearswap(models):
    tunes, base = models
    t = 0.02

    def expected(d, b):
        return b + np.clip(t / np.maximum(np.abs(d[0]), 1e-6), 0, 1) * d[0]

    check("nearswap", (tunes[:1], base), expected, t=t)


def test_arcee_fusion(models):
    tunes, base = models

    def softmax(x):
        e = np.exp(x - x.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    def expected(d, b):
        p, q = softmax(b + d[0]) + 1e-8, softmax(b) + 1e-8
        score = np.abs(d[0]) * (p * np.log(p / q)).sum(-1, keepdims=True)
        ordered = np.sort(score.ravel())
        low, middle, high = (ordered[int(s * (b.size - 1))] for s in (0.25, 0.5, 0.75))
        threshold = middle + 1.5 * (high - low)
        gap = np.abs(score - threshold).min() if b.size > 1 else 1.0
        assert gap > 1e-6 * max(threshold, 1e-30)
        return b + np.where(score >= threshold, d[0], 0.0)

    tunes, base = (
        [{n: t for n, t in tunes[2].items() if n != "model.layers.1.gate"}],
        {n: t for n, t in base.items() if n != "model.layers.1.gate"},
    )
    check("arcee_fusion", (tunes, base), expected)


@pytest.mark.parametrize("epsilon", [1e-5, 0.05])
def test_ram(models, epsilon):
    def expected(d, b):
        active = np.abs(d) > np.float32(epsilon)
        return b + np.where(active, d, 0.0).sum(0) / np.maximum(active.sum(0), 1)

    check("ram", models, expected, epsilon=epsilon)


def test_ram_plus(models):
    epsilon, r, alpha = 0.12, 0.4, 0.7

    def expected(d, b):
        active = np.abs(d) > np.float32(epsilon)
        count = active.sum(0)
        total = np.where(active & (count > 1), d, 0.0).sum(0) / np.maximum(count, 1)
        for x, own in zip(d, active, strict=True):
            shared, unique = (own & (count > 1)).sum(), (own & (count == 1)).sum()
            factor = 1 + r * min(max(shared / max(unique, 1), 0), alpha)
            total = total + np.where(own & (count == 1), factor * x, 0.0)
        return b + total

    check("ramplus_tl", models, expected, epsilon=epsilon, r=r, alpha=alpha)


def test_magmax(models):
    check("magmax", models,
          lambda d, b: b + LAMBDA * np.take_along_axis(d, np.abs(d).argmax(0)[None], 0)[0],
          lambda_=LAMBDA)  # fmt: skip


LAMBDAS = [0.3, 0.4, 0.6]


def tall(d):
    total = d.sum(0)
    return np.abs(d) > column(LAMBDAS, d) * np.abs(total - d), total


@pytest.mark.parametrize("votes", [0, 1, 2, 3])
def test_consensus(models, votes):
    def expected(d, b):
        uses, total = tall(d)
        return b + LAMBDA * np.where(uses.sum(0) >= votes, total, 0.0)

    check("consensus", models, expected, tall_lambda=LAMBDAS, votes=votes, lambda_=LAMBDA)


@pytest.mark.parametrize("task", [0, 2])
def test_tall_masks(models, task):
    def expected(d, b):
        uses, total = tall(d)
        return b + np.where(uses[task], total, 0.0)

    check("tall_masks", models, expected, tall_lambda=LAMBDAS, task=task)


def test_consensus_of_equal_models():
    """M equal models use an element iff lambda < 1 / (M - 1)."""
    tunes, base = family(1)
    below = run(METHODS["consensus"], tunes * 4, base, tall_lambda=0.33)
    assert_near(below, {n: base[n].double() + 4 * (tunes[0][n] - base[n]).double() for n in base})
    above = run(METHODS["consensus"], tunes * 4, base, tall_lambda=0.34)
    assert_near(above, base, 0.0)


@pytest.mark.parametrize("keep_equal", [False, True])
def test_localize_and_stitch(models, keep_equal):
    tunes, base = models

    masks = trimmed_model(models, lambda v: localized(v, 0.3, keep_equal))
    true = {}
    for n in base:
        d = stack(tunes, base, n).numpy()
        merged = np.where(masks[n], d, 0.0).sum(0) / np.maximum(masks[n].sum(0), 1)
        true[n] = torch.from_numpy(base[n].double().numpy() + merged)
    got = run(METHODS["localize_and_stitch"], tunes, base, dtype=torch.float32, density=0.3,
              keep_equal=keep_equal)  # fmt: skip
    assert_near(got, true)


def test_stitch_of_disjoint_supports_is_task_arithmetic():
    tunes, base = family(2)
    halves = {n: torch.arange(t.numel()).view(t.shape) % 2 == 0 for n, t in base.items()}
    for n, half in halves.items():
        tunes[0][n] = torch.where(half, tunes[0][n], base[n])
        tunes[1][n] = torch.where(half, base[n], tunes[1][n])
    sum_ = run(METHODS["task_arithmetic"], tunes, base, weight=1.0)
    masks = [
        {n: h.float() for n, h in halves.items()},
        {n: (~h).float() for n, h in halves.items()},
    ]
    assert_near(run(METHODS["stitch"](masks), tunes, base), sum_, 3e-7)
    # the largest half but one percent: every kept element lies in its own model's support
    found = run(METHODS["localize_and_stitch"], tunes, base, density=0.49)
    moved = {n: found[n] != base[n] for n in base}
    assert sum(int(m.sum()) for m in moved.values()) > 0.9 * sum(t.numel() for t in base.values())
    assert_near({n: found[n][moved[n]] for n in base}, {n: sum_[n][moved[n]] for n in base}, 3e-7)


def test_stitch_with_given_masks(models):
    tunes, base = models
    generator = torch.Generator().manual_seed(9)
    masks = [
        {
            n: (torch.rand(base[n].shape, generator=generator) < 0.4).float()
            for n in base
            if "norm" not in n
        }
        for _ in tunes
    ]
    got = run(METHODS["stitch"](masks), tunes, base, dtype=torch.float32)
    true = {}
    for n in base:
        if "norm" in n:
            true[n] = base[n]
            continue
        d, m = stack(tunes, base, n), torch.stack([mask[n] for mask in masks]).double()
        true[n] = base[n].double() + (m * d).sum(0) / m.sum(0).clamp(min=1)
    assert_near(got, true)


@pytest.mark.parametrize("name", ["tsv", "iso_c"])
def test_spectral(models, name):
    tunes, base = models
    got = run(METHODS[name], tunes, base, dtype=torch.float32, lambda_=LAMBDA)
    for n in SHAPES:
        d, b = stack(tunes, base, n).numpy(), base[n].double().numpy()
        if b.ndim < 2 or "embed" in n:
            merged = d.mean(0)
        elif name == "iso_c":
            u, s, vh = np.linalg.svd(d.sum(0), full_matrices=False)
            merged = s.mean() * u @ vh
        else:
            merged = whitened(d)
        assert_near({n: got[n]}, {n: torch.from_numpy(b + LAMBDA * merged)}, 1e-5)


def whitened(d: np.ndarray) -> np.ndarray:
    """TSV-Merge with the inverse square root of the Gram matrices of the bases."""
    share = min(d.shape[1:]) // len(d)
    parts = [np.linalg.svd(x, full_matrices=False) for x in d]
    u = np.concatenate([p[0][:, :share] for p in parts], 1)
    s = np.concatenate([p[1][:share] for p in parts])
    v = np.concatenate([p[2][:share] for p in parts])

    def root(gram):
        values, vectors = np.linalg.eigh(gram)
        return vectors @ np.diag(values**-0.5) @ vectors.T

    return u @ root(u.T @ u) @ np.diag(s) @ root(v @ v.T) @ v


def test_tsv_of_one_low_rank_update_is_the_update():
    tunes, base = family(1)
    name = "model.layers.0.mlp.up_proj.weight"
    generator = torch.Generator().manual_seed(4)
    low = torch.randn(11, 2, generator=generator) @ torch.randn(2, 8, generator=generator)
    tunes[0][name] = base[name] + low
    assert_near({name: run(METHODS["tsv"], tunes, base)[name]}, {name: tunes[0][name]}, 1e-5)


def test_iso_c_flattens_the_spectrum():
    tunes, base = family(2)
    name = "model.layers.0.mlp.up_proj.weight"
    got = run(METHODS["iso_c"], tunes, base)[name]
    s = torch.linalg.svdvals((got - base[name]).double())
    assert float(s.max() - s.min()) < 1e-5 * float(s.max())
