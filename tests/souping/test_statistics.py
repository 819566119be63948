"""Fisher diagonals, Gram matrices and their files."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from tiny_lm import VOCAB, batch, gemma2, tuned
from torch import nn

from gemma_ext.souping.method import Values
from gemma_ext.souping.scoring import Scores, unpack
from gemma_ext.souping.statistics import (
    Statistics,
    StatisticsFile,
    collect_grams,
    fisher_diagonal,
    save_statistics,
    squared_scores,
)


def test_scores_are_those_of_the_logits():
    model, tokens = gemma2(), batch()
    ids, mask = unpack(tokens, torch.device("cpu"))
    labels = ids.masked_fill(mask == 0, -100)
    logprobs, entropy = Scores(model)(ids, mask, labels)
    full = model(**tokens).logits[:, :-1].float().log_softmax(-1)
    true = full.gather(-1, ids[:, 1:, None])[..., 0] * mask[:, 1:]
    assert torch.allclose(logprobs, true, atol=2e-5)
    assert torch.allclose(entropy, -(full.exp() * full).sum(-1) * mask[:, 1:], atol=2e-5)


def test_head_that_is_no_product_is_refused():
    class Odd(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1.0

    model = gemma2()
    model.lm_head = Odd(16, VOCAB)
    with pytest.raises(ValueError, match="expected the logits of Gemma2ForCausalLM to be its head"):
        Scores(model)


def test_ids_without_rows_are_refused():
    with pytest.raises(ValueError, match=r"expected input_ids to be \[B, T\], got \[4\]"):
        unpack(torch.arange(4), torch.device("cpu"))


def test_sampled_labels_follow_the_model():
    """Frequencies of draws after one prefix, within four sigma of its distribution."""
    model, draws = gemma2(), 4000
    scores = Scores(model)
    ids = torch.tensor([[1, 5, 9]]).expand(draws, -1)
    generator = torch.Generator().manual_seed(0)
    labels = scores.sample(ids, torch.ones_like(ids), generator)
    assert (labels[:, 0] == -100).all()
    p = model(input_ids=ids[:1]).logits[0].float().softmax(-1)
    for position in (1, 2):
        share = torch.bincount(labels[:, position], minlength=VOCAB) / draws
        sigma = (p[position - 1] * (1 - p[position - 1]) / draws).sqrt()
        assert ((share - p[position - 1]).abs() <= 4 * sigma + 2 / draws).all()
    mask = torch.ones_like(ids[:2])
    mask[1, 2] = 0
    assert scores.sample(ids[:2], mask, generator)[1, 2] == -100


def test_exact_fisher_of_a_softmax_regression():
    """F of weight [c, d] is the mean over x of p_c (1 - p_c) x_d^2."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(9, 4, generator=generator)
    weight = torch.randn(3, 4, generator=generator, requires_grad=True)

    def scores():
        for row in x:
            for label in range(3):
                logp = F.log_softmax(weight @ row, -1)[label]
                yield logp, float(logp.detach().exp()) / len(x)

    found = squared_scores({"w": weight}, scores())["w"]
    p = F.softmax(x @ weight.detach().T, -1).double()
    true = torch.einsum("nc,nd->cd", p * (1 - p), x.double() ** 2) / len(x)
    assert torch.allclose(found.double(), true, rtol=1e-5)


def test_fisher_of_the_data_is_per_sequence():
    model, tokens = gemma2(), batch()
    found = fisher_diagonal(model, [tokens], labels="data")
    true = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for ids, mask in zip(tokens["input_ids"], tokens["attention_mask"], strict=True):
        model.zero_grad()
        ids = ids[: int(mask.sum())][None]
        logits = model(input_ids=ids).logits.float()[:, :-1].flatten(0, 1)
        F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum").backward()
        for name, parameter in model.named_parameters():
            true[name] += parameter.grad.square() / 3
    assert found.keys() == true.keys()
    for name in true:
        assert torch.allclose(
            found[name], true[name], rtol=1e-3, atol=1e-5 * float(true[name].max())
        )


def test_fisher_of_the_model_has_the_right_mean():
    """Of the final norm, against the sum over the vocabulary, within five sigma of the draws."""
    model, repeats, rows = gemma2(), 12, 10
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == "model.norm.weight")
    ids = torch.tensor([[1, 7, 3, 20]])
    draws = torch.stack(
        [
            fisher_diagonal(model, [ids.expand(rows, -1)], seed=seed)["model.norm.weight"]
            for seed in range(repeats)
        ]
    )
    parameter = model.model.norm.weight
    true = torch.zeros_like(parameter)
    for position in range(3):
        logp = model(input_ids=ids).logits.float()[0, position].log_softmax(-1)
        for label in range(VOCAB):
            (gradient,) = torch.autograd.grad(logp[label], parameter, retain_graph=True)
            true += logp[label].exp().detach() * gradient.square()
    sigma = draws.std(0) / math.sqrt(repeats)
    assert ((draws.mean(0) - true).abs() < 5 * sigma).all()
    assert torch.equal(
        draws[0], fisher_diagonal(model, [ids.expand(rows, -1)], seed=0)["model.norm.weight"]
    )


def test_fisher_arguments():
    with pytest.raises(ValueError, match="expected labels to be one of model, data, got 'argmax'"):
        fisher_diagonal(gemma2(), [batch()], labels="argmax")
    with pytest.raises(ValueError, match="expected at least one sequence in batches, got none"):
        fisher_diagonal(gemma2(), [])


def test_fisher_leaves_the_model_alone():
    model = gemma2()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    fisher_diagonal(model, [batch()])
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None


def test_grams_are_of_what_layers_see():
    model, batches = gemma2(), [batch(0), batch(1, rows=2, length=5)]
    found = collect_grams(model, batches, dtype=torch.float64)
    linears = {
        n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"
    }
    assert set(found) == {f"{n}.weight" for n in linears}
    seen = {n: [] for n in linears}
    hooks = [
        m.register_forward_pre_hook(lambda _, x, n=n: seen[n].append(x[0].detach()))
        for n, m in linears.items()
    ]
    for tokens in batches:
        model(**tokens)
    for hook in hooks:
        hook.remove()
    for name, inputs in seen.items():
        rows = torch.cat(
            [x[t["attention_mask"].bool()] for x, t in zip(inputs, batches, strict=True)]
        ).double()
        assert torch.allclose(found[f"{name}.weight"], rows.T @ rows / len(rows), atol=1e-12)


def test_layers_with_one_input_share_their_gram():
    found = collect_grams(gemma2(), [batch()])
    layer = "model.layers.1."
    q, k, v = (found[f"{layer}self_attn.{x}_proj.weight"] for x in "qkv")
    assert q is k
    assert q is v
    assert found[f"{layer}mlp.gate_proj.weight"] is found[f"{layer}mlp.up_proj.weight"]
    assert q is not found[f"{layer}self_attn.o_proj.weight"]
    assert len({id(g) for g in found.values()}) == 3 * 4


def test_no_batch_is_refused():
    with pytest.raises(ValueError, match="expected at least one batch, got none"):
        collect_grams(gemma2(), [])


def test_input_that_stops_being_shared_is_refused():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
            self.shared = True

    from gemma_ext.souping.statistics.grams import Grams

    two, x = Two(), torch.randn(2, 3)
    grams = Grams({"a": two.a, "b": two.b}, torch.float32)
    with grams.watching(torch.ones(1, 2)):
        two.a(x), two.b(x)
    message = "expected b to share its input with a in every pass"
    with pytest.raises(RuntimeError, match=message), grams.watching(torch.ones(1, 2)):
        two.a(x), two.b(x.clone())


def test_files_give_back_what_was_saved(tmp_path):
    shared = torch.randn(3, 3)
    tensors = {"q": shared, "k": shared, "o": torch.randn(2, 2)}
    save_statistics(tensors, tmp_path / "grams.safetensors")
    assert (tmp_path / "grams.safetensors").stat().st_size < 4 * (9 + 4) + 400
    opened = StatisticsFile(tmp_path / "grams.safetensors")
    assert sorted(opened) == ["k", "o", "q"]
    assert len(opened) == 3
    for name, tensor in tensors.items():
        assert torch.equal(opened[name], tensor)
    assert opened.get("none") is None
    assert [p.name for p in tmp_path.iterdir()] == ["grams.safetensors"]


def values(*paths):
    return Values([{"grams": path} for path in paths])


def test_statistics_of_a_recipe_come_from_its_files(tmp_path):
    for index in range(2):
        save_statistics({"w": torch.full((2, 2), float(index))}, tmp_path / str(index))
    statistics = Statistics("grams")
    found = statistics.of("w", values(str(tmp_path / "0"), str(tmp_path / "1")), (2, 2))
    assert [float(f[0, 0]) for f in found] == [0.0, 1.0]
    assert (
        statistics.of("v", values(str(tmp_path / "0"), str(tmp_path / "1")), (2, 2)) == [None] * 2
    )


@pytest.mark.parametrize(
    ("given", "paths", "message"),
    [
        (None, (None, None), "expected grams of every model: a file each, got none"),
        ([{}], (None, None), "expected grams of 2 models, got 1"),
        (
            [{"w": torch.ones(2, 2)}, {"w": torch.ones(2, 3)}],
            (None, None),
            r"expected grams of w to be \[2, 2\], got \[2, 3\]",
        ),
        ([{"w": 1}, {}], (None, None), "expected grams of w for every model or for none, got none "
                                       "for model 1"),
    ],
)  # fmt: skip
def test_statistics_that_do_not_fit(given, paths, message):
    with pytest.raises(ValueError, match=message):
        Statistics("grams", given).of("w", values(*paths), (2, 2))


def test_progress_bars_count(capfd):
    fisher_diagonal(tuned(gemma2(), 1), [batch()], labels="data", show_progress=True)
    assert "fisher" in capfd.readouterr().err
