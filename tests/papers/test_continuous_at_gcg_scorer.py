"""Losses of candidates with shared keys are those of a whole forward; gradients are the input's."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from gemma_ext.nn._deferred_logits import DeferredLogits, LossOptions, Product
from gemma_ext.papers.continuous_at.evaluation import scorer as scorer_module
from gemma_ext.papers.continuous_at.evaluation.scorer import TargetScorer
from gemma_ext.papers.continuous_at.evaluation.target_rows import losses_of, shortlist
from gemma_ext.papers.continuous_at.evaluation.template import Parts
from gemma_ext.pocket import build_model

PARTS = (61, 3, 7)  # longer before the string than the pocket's sliding window


def draw(count: int, seed: int, vocabulary: int = 400) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocabulary, (count,), generator=generator).tolist()


def parts_of(before: int, after: int, target: int) -> Parts:
    return Parts(draw(before, 1), draw(after, 2), draw(target, 3))


def changed(ids: Tensor, count: int, replaced: int = 1) -> Tensor:
    """Changes of a string, itself last."""
    generator = torch.Generator().manual_seed(4)
    rows = ids.repeat(count, 1)
    for row in rows[:-1]:
        at = torch.randperm(len(ids), generator=generator)[:replaced]
        row[at] = torch.randint(3, 400, (replaced,), generator=generator)
    return rows


def whole(model, parts: Parts, rows: list[list[int]], double: bool = False) -> Tensor:
    """Losses by the logits of one sequence after another."""
    found = []
    for row in rows:
        ids = torch.tensor([[*parts.before, *row, *parts.after, *parts.target]])
        logits = model(ids).logits[0, -len(parts.target) - 1 : -1]
        found.append(F.cross_entropy(logits.double(), torch.tensor(parts.target)))
    return torch.stack(found).float()


@pytest.fixture(scope="module")
def gemma():
    from dataclasses import replace

    from gemma_ext.pocket import SIZES

    size = replace(
        SIZES["nano"], vocab_size=400, hidden_size=32, layers=3, head_dim=8, intermediate_size=48,
        context=128, sliding_window=16,
    )  # fmt: skip
    model = build_model(size, seed=1).eval()
    # an initialised head is so flat that nothing could be told apart
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return model


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("batch_size", [None, 1, 5, 1000])
@pytest.mark.parametrize("replaced", [1, 3])
@torch.no_grad()
def test_losses_are_those_of_a_whole_forward(gemma, batch_size, replaced):
    parts = parts_of(*PARTS)
    scorer = TargetScorer(gemma, parts, batch_size=batch_size)
    assert scorer.shares
    ids = torch.tensor(draw(9, 5))
    rows = changed(ids, 40, replaced)
    expected = whole(gemma, parts, rows.tolist())
    assert expected.std() > 1e-2
    opened = scorer.open(ids)
    torch.testing.assert_close(scorer.score(rows, opened).losses, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(scorer.score(rows).losses, expected, rtol=0, atol=1e-4)
    assert opened.loss == pytest.approx(expected[-1].item(), abs=1e-4)


@pytest.mark.parametrize("shape", [(1, 0, 1), (1, 0, 5), (20, 0, 1), (5, 4, 1)])
@pytest.mark.parametrize("length", [1, 6])
@torch.no_grad()
def test_short_parts(gemma, shape, length):
    parts = parts_of(*shape)
    ids = torch.tensor(draw(length, 6))
    rows = changed(ids, 12)
    for share in (True, False):
        scorer = TargetScorer(gemma, parts, share=share, batch_size=5)
        found = scorer.score(rows, scorer.open(ids)).losses
        torch.testing.assert_close(found, whole(gemma, parts, rows.tolist()), rtol=0, atol=1e-4)


@torch.no_grad()
def test_other_models(llama):
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=400, n_embd=32, n_layer=2, n_head=4)).eval()
    for model in (llama, gpt2):
        parts = parts_of(7, 2, 4)
        scorer = TargetScorer(model, parts)
        ids = torch.tensor(draw(5, 7))
        rows = changed(ids, 10)
        found = scorer.score(rows, scorer.open(ids)).losses
        torch.testing.assert_close(found, whole(model, parts, rows.tolist()), rtol=0, atol=1e-4)


@torch.no_grad()
def test_lists_of_any_lengths(gemma):
    parts = parts_of(*PARTS)
    rows = [draw(length, 8 + length) for length in (3, 17, 1, 9, 9, 2, 30)]
    expected = whole(gemma, parts, rows)
    for batch_size in (None, 1, 3):
        for share in (True, False):
            scorer = TargetScorer(gemma, parts, batch_size=batch_size, share=share)
            found = scorer.score_lists(rows)
            torch.testing.assert_close(found.losses, expected, rtol=0, atol=1e-4)
    assert scorer.score_lists([]).losses.shape == (0,)


@torch.no_grad()
def test_match_is_that_every_target_is_the_likeliest(gemma):
    before, string = draw(6, 1), draw(4, 2)
    target = []
    for _ in range(3):
        logits = gemma(torch.tensor([[*before, *string, *target]])).logits
        target.append(int(logits[0, -1].argmax()))
    rows = torch.tensor([string, draw(4, 9), string])
    scores = TargetScorer(gemma, Parts(before, [], target)).score(rows)
    assert scores.matched.tolist() == [True, False, True]


@torch.no_grad()
def test_only_what_is_kept_is_scored(gemma):
    parts = parts_of(5, 2, 3)
    ids = torch.tensor(draw(6, 5))
    rows = changed(ids, 30)
    scorer = TargetScorer(gemma, parts, batch_size=7)
    full = scorer.score(rows, scorer.open(ids)).losses
    kept = scorer.score(rows, scorer.open(ids), lambda some: some.sum(1) % 2 == 0).losses
    even = rows.sum(1) % 2 == 0
    torch.testing.assert_close(kept[even], full[even], rtol=0, atol=1e-5)
    assert even.any()
    assert not even.all()
    assert kept[~even].isinf().all()
    assert (
        scorer.score(rows, None, lambda some: torch.zeros(len(some), dtype=bool))
        .losses.isinf()
        .all()
    )


@pytest.mark.parametrize("mellowmax", [None, 1.0])
@pytest.mark.parametrize("scale", [1.0, 6.0])
def test_the_best_is_the_best_of_all(gemma, mellowmax, scale, monkeypatch):
    """Under flat and peaked distributions: by fewer rows of the head the peakier they are."""
    model = copy.deepcopy(gemma)
    model.model.norm.weight.data += scale - 1
    parts = parts_of(9, 2, 4)
    ids = torch.tensor(draw(8, 5))
    rows = changed(ids, 300)
    scorer = TargetScorer(model, parts, mellowmax=mellowmax, batch_size=40)
    opened = scorer.open(ids)
    every = scorer.score(rows, opened)
    run = []

    def counting(logits, *rest):
        if logits.vocab == 400:
            run.append(logits.shape[0] // 4)
        return losses_of(logits, *rest)

    monkeypatch.setattr(scorer_module, "losses_of", counting)
    best = scorer.best(rows, opened)
    known = ~best.losses.isinf()
    torch.testing.assert_close(best.losses[known], every.losses[known], rtol=0, atol=1e-5)
    assert best.losses.argmin() == every.losses.argmin()
    assert (every.losses[~known] > best.losses.min()).all()
    assert known.sum() == sum(run)
    assert 16 <= sum(run) < (40 if mellowmax or scale > 1 else 290)
    kept = scorer.best(rows, opened, lambda some: some.sum(1) % 2 == 0)
    even = rows.sum(1) % 2 == 0
    assert kept.losses[~even].isinf().all()
    torch.testing.assert_close(kept.losses.min(), every.losses[even].min(), rtol=0, atol=1e-5)
    assert scorer.best(rows, opened, lambda some: some[:, 0] < 0).losses.isinf().all()


@torch.no_grad()
def test_the_best_knows_every_match(gemma):
    before, string = draw(6, 1), draw(4, 2)
    target = []
    for _ in range(2):
        logits = gemma(torch.tensor([[*before, *string, *target]])).logits
        target.append(int(logits[0, -1].argmax()))
    scorer = TargetScorer(gemma, Parts(before, [], target))
    rows = changed(torch.tensor(string), 200)
    opened = scorer.open(rows[0])
    matched = scorer.score(rows, opened).matched
    assert matched[-1]
    assert torch.equal(scorer.best(rows, opened).matched, matched)


@torch.no_grad()
def test_a_shortlist_bounds_losses_from_below(gemma):
    """Of a head with a bias and a cap; a list of everything is the head."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*shape, generator=generator) for shape in ((12, 16), (400, 16), (400,))
    )
    options = LossOptions("test", filter_eps=None)
    product = Product(hidden, weight, torch.float32)
    logits = DeferredLogits((product,), bias, torch.float32, options, lambda: None) * 2.0
    logits = torch.tanh(logits / 30.0) * 30.0
    target = torch.tensor(draw(4, 1))
    exact, matched = losses_of(logits, target, None)
    short = shortlist(logits[:4], target)
    assert short.weights[0].shape[0] < 40
    found, may_match = losses_of(short.of(logits), short.target, None)
    assert (found <= exact + 1e-6).all()
    assert (found > exact - 3).all()
    assert (may_match | ~matched).all()
    whole = shortlist(logits[:4], target, share=0.25)
    assert whole.weights[0].shape[0] == 400
    found, _ = losses_of(whole.of(logits), whole.target, None)
    torch.testing.assert_close(found, exact)


def test_mellowmax_of_the_target_logits(gemma):
    parts = parts_of(5, 2, 4)
    rows = changed(torch.tensor(draw(6, 5)), 8)
    found = TargetScorer(gemma, parts, mellowmax=1.5).score(rows).losses
    for row, loss in zip(rows.tolist(), found, strict=True):
        ids = torch.tensor([[*parts.before, *row, *parts.after, *parts.target]])
        with torch.no_grad():
            logits = gemma(ids).logits[0, -5:-1].double()
        chosen = logits[torch.arange(4), torch.tensor(parts.target)]
        expected = (-1.5 * chosen).exp().mean().log() / 1.5
        assert loss.item() == pytest.approx(expected.item(), abs=1e-4)


@pytest.mark.parametrize("mellowmax", [None, 1.0])
@pytest.mark.parametrize("share", [True, False])
def test_token_gradient_is_the_finite_difference_of_the_relaxed_input(gemma, share, mellowmax):
    """Of a model whose embedding multiplies its rows by sqrt(D)."""
    parts = parts_of(20, 2, 4)
    ids = torch.tensor(draw(5, 5))
    scorer = TargetScorer(gemma, parts, share=share, mellowmax=mellowmax)
    gradient = scorer.token_gradient(scorer.open(ids))
    assert gradient.shape == (5, 400)
    assert gradient.dtype == torch.float32
    double = copy.deepcopy(gemma).double()
    embed = double.get_input_embeddings()
    whole_ids = torch.tensor([*parts.before, *ids.tolist(), *parts.after, *parts.target])
    targets = torch.tensor(parts.target)

    @torch.no_grad()
    def loss(at: int, token: int, size: float) -> Tensor:
        """Of the one-hot row of place `at` with `size` of another token added."""
        embedded = embed(whole_ids).clone()
        embedded[20 + at] += size * embed(torch.tensor(token))
        logits = double(inputs_embeds=embedded.unsqueeze(0)).logits[0, -5:-1]
        if mellowmax is None:
            return F.cross_entropy(logits, targets)
        return (-logits[torch.arange(4), targets]).exp().mean().log()

    for at, token in ((0, 17), (2, 399), (4, 3)):
        # the norms of the model compute in float32 whatever its dtype
        slope = (loss(at, token, 3e-3) - loss(at, token, -3e-3)) / 6e-3
        assert abs(slope) > 1e-4
        assert gradient[at, token].item() == pytest.approx(slope.item(), rel=1e-2, abs=2e-4)


def test_a_model_is_left_as_it_was(gemma):
    model = copy.deepcopy(gemma).train()
    model.model.layers[0].eval()
    model.config.attention_dropout = 0.5
    modes = [module.training for module in model.modules()]
    scorer = TargetScorer(model, parts_of(5, 2, 4))
    ids = torch.tensor(draw(6, 5))
    opened = scorer.open(ids)
    rows = changed(ids, 5)
    first = scorer.score(rows, opened).losses
    assert torch.equal(first, scorer.score(rows, opened).losses)
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_batch_that_does_not_fit_is_halved(gemma, monkeypatch):
    parts = parts_of(5, 2, 4)
    ids = torch.tensor(draw(6, 5))
    rows = changed(ids, 9)
    expected = TargetScorer(gemma, parts).score(rows).losses
    scorer = TargetScorer(gemma, parts)
    run, sizes = scorer._forward, []

    def short(cache, **inputs):
        sizes.append(len(next(iter(inputs.values()))))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("no memory")
        return run(cache, **inputs)

    monkeypatch.setattr(scorer, "_forward", short)
    torch.testing.assert_close(scorer.score(rows).losses, expected, rtol=0, atol=1e-5)
    assert max(sizes) == 9
    assert sizes.count(1) + sizes.count(2) > 4

    def full(cache, **inputs):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(scorer, "_forward", full)
    with pytest.raises(torch.OutOfMemoryError):
        scorer.score(rows)


def test_a_model_with_other_caches_shares_nothing(gemma, monkeypatch):
    class Other(DynamicCache):
        def __init__(self, config=None):
            super().__init__(config=config)
            self.layers = [object()]

    monkeypatch.setattr("transformers.cache_utils.DynamicCache", Other)
    parts = parts_of(5, 2, 4)
    scorer = TargetScorer(gemma, parts)
    assert not scorer.shares
    rows = changed(torch.tensor(draw(6, 5)), 5)
    opened = scorer.open(rows[-1])
    assert opened.keys is None
    with torch.no_grad():
        expected = whole(gemma, parts, rows.tolist())
    torch.testing.assert_close(scorer.score(rows, opened).losses, expected, rtol=0, atol=1e-4)


def test_refusals(gemma):
    with pytest.raises(ValueError, match="expected a target of at least one token, got none"):
        TargetScorer(gemma, Parts([1], [], []))
    with pytest.raises(ValueError, match="expected batch_size to be at least 1, got 0"):
        TargetScorer(gemma, parts_of(1, 1, 1), batch_size=0)
    with pytest.raises(TypeError, match="output embeddings"):
        TargetScorer(gemma.model, parts_of(1, 1, 1))


def test_bfloat16(gemma):
    model = copy.deepcopy(gemma).bfloat16()
    parts = parts_of(*PARTS)
    ids = torch.tensor(draw(9, 5))
    rows = changed(ids, 20)
    scorer = TargetScorer(model, parts)
    opened = scorer.open(ids)
    assert opened.gradient.dtype == torch.float32
    with torch.no_grad():
        expected = whole(model, parts, rows.tolist())
    torch.testing.assert_close(scorer.score(rows, opened).losses, expected, rtol=0.05, atol=0.1)
