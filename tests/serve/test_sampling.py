"""Draws from candidates and from all logits against plain softmax sampling in float64."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from serve_tiny import tiny

from gemma_ext.serve.protocol import Request, SamplingParams
from gemma_ext.serve.readout import Head, Readout
from gemma_ext.serve.sampling import CANDIDATES, Sampler, kept
from gemma_ext.serve.sequential import distribution, draw
from gemma_ext.serve.weights import read_weights

WIDTH, VOCABULARY = 32, 203  # above the candidates
MODEL = tiny("Gemma2", vocab_size=VOCABULARY)


def sampler(rows: int, seed: int = 0, same: bool = False) -> Sampler:
    """Over `rows` random hidden states, or one that all rows have."""
    random = torch.Generator().manual_seed(seed)
    bank = torch.randn(1 if same else rows, WIDTH, generator=random, dtype=torch.float64)
    bank = bank.expand(rows, -1).contiguous()
    readout = Readout(Head(read_weights(MODEL), "reference"), bank, rows, CANDIDATES)
    return Sampler(readout, rows, 64, "reference")


def logits_of(sampler: Sampler) -> torch.Tensor:
    every = torch.arange(len(sampler.readout.bank))
    return sampler.readout.logits(every, torch.zeros(len(every), dtype=torch.bool))


def draw_all(sampler: Sampler, requests: list[Request], drawn=(), positions=None):
    every = torch.arange(len(requests))
    for row, request in enumerate(requests):
        sampler.open(row, request, drawn)
    if positions is None:
        positions = torch.tensor([len(request.prompt) + len(drawn) - 1 for request in requests])
    return sampler.draw(every, every, positions, torch.zeros(len(every), dtype=torch.bool))


def _prompt(row: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(row).integers(0, 20, 9).tolist())


PARAMS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 2.5]),
        "top_k": st.sampled_from([0, 1, 5, 63, 64, 65, 500]),
        "top_p": st.sampled_from([0.01, 0.5, 0.9, 0.999, 1.0]),
        "min_p": st.sampled_from([0.0, 0.001, 0.2, 1.0]),
        "repetition_penalty": st.sampled_from([1.0, 0.5, 1.7]),
        "presence_penalty": st.sampled_from([0.0, 0.6]),
        "frequency_penalty": st.sampled_from([0.0, -0.8]),
        "logit_bias": st.sampled_from([(), ((3, 5.0), (11, -100.0))]),
        "seed": st.integers(-(2**63), 2**63 - 1),
        "min_tokens": st.sampled_from([0, 4]),
        "stop_ids": st.sampled_from([(), (0, 7)]),
        "logprobs": st.sampled_from([None, 0, 3, 20]),
        "tempered": st.booleans(),
    }
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(PARAMS, st.integers(0, 5)), min_size=1, max_size=6), st.integers(0, 99))
def test_draws_and_logprobs_are_those_of_plain_softmax_sampling(asked, seed):
    drawn = (3, 3)  # by an earlier stay
    requests = [
        Request(_prompt(row), SamplingParams(**own), choice)
        for row, (own, choice) in enumerate(asked)
    ]
    s = sampler(len(requests), seed=seed)
    logits = logits_of(s)
    found = draw_all(s, requests, drawn)
    for row, request in enumerate(requests):
        assert int(found.ids[row]) == draw(
            logits[row], (*request.prompt, *drawn), len(drawn), request
        )
        asked = request.params.logprobs
        if asked is None:
            continue
        own = (logits[row] / request.params.divisor).log_softmax(-1)
        torch.testing.assert_close(found.logprobs[row], own[found.ids[row].long()])
        order = own.sort(descending=True, stable=True)
        assert found.top_ids[row, :asked].tolist() == order.indices[:asked].tolist()
        torch.testing.assert_close(found.top_logprobs[row, :asked], order.values[:asked])


@pytest.mark.parametrize(
    "own",
    [
        {},
        {"temperature": 1.5},
        {"top_k": 7},
        {"top_p": 0.8},
        {"top_p": 0.995},  # beyond the candidates
        {"min_p": 0.05},
        {"repetition_penalty": 1.5, "presence_penalty": 1.0, "top_p": 0.9},
    ],
)
def test_many_draws_have_the_distribution(own):
    own = {"temperature": 4.0, **own}  # of a model that is very sure
    count, prompt = 6000, (5, 6, 7)
    s = sampler(count, same=True)
    p = distribution(logits_of(s)[0], prompt, 0, SamplingParams(**own)).numpy()
    found = draw_all(s, [Request(prompt, SamplingParams(seed=row, **own)) for row in range(count)])
    counts = np.bincount(found.ids.numpy(), minlength=VOCABULARY)
    assert counts[p == 0].sum() == 0
    large = p * count >= 5
    observed, expected = counts[large], p[large] * count
    if not large[p > 0].all():
        observed, expected = (
            np.append(x, rest)
            for x, rest in ((observed, counts[~large].sum()), (expected, p[~large].sum() * count))
        )
    assert chisquare(observed, expected).pvalue > 1e-4


def test_greedy_takes_the_lowest_id_of_equal_ones():
    s = sampler(2)
    s.readout.bank[0] = 0.0  # every logit is the same
    greedy = SamplingParams(temperature=0, logprobs=2)
    found = draw_all(s, [Request((1,), greedy), Request((1,), greedy)])
    assert found.ids.tolist() == [0, int(logits_of(s)[1].argmax())]
    assert found.top_ids[0].tolist() == [0, 1]


def test_a_draw_does_not_know_its_neighbours():
    own = [
        {},
        {"top_p": 0.9},
        {"top_k": 3, "logprobs": 4},
        {"presence_penalty": 1.0},
        {"top_p": 0.9999},
    ]
    requests = [Request((1, 2), SamplingParams(temperature=4, seed=9, **each)) for each in own]
    s = sampler(5)
    together = draw_all(s, requests)
    for row in (4, 2, 0, 1, 3):
        at = torch.tensor([row])
        s.readout.changed(np.array([row]))
        alone = s.draw(at, at, torch.tensor([1]), torch.tensor([False]))
        assert alone.ids[0] == together.ids[row]
    assert alone.logprobs is None  # row 3 asks for none


def test_choices_seeds_and_positions_draw_apart_and_again_alike():
    requests = [
        Request((1, 2), SamplingParams(temperature=9, seed=i // 8), i % 8) for i in range(64)
    ]
    s = sampler(64, same=True)
    first = draw_all(s, requests).ids
    assert len(set(first.tolist())) > 16
    s.readout.changed(np.arange(64))
    assert torch.equal(draw_all(s, requests).ids, first)
    s.readout.changed(np.arange(64))
    later = draw_all(s, requests, positions=torch.full((64,), 9)).ids
    assert not torch.equal(later, first)


def test_candidates_that_do_not_reach_the_edge_send_a_row_to_its_logits(monkeypatch):
    s = sampler(3)
    asked = []
    logits = s.readout.logits

    def spied(slots, early):
        asked.append(slots.tolist())
        return logits(slots, early)

    monkeypatch.setattr(s.readout, "logits", spied)
    draw_all(s, [Request((1,), SamplingParams(temperature=6, top_p=p)) for p in (0.1, 0.99, 0.2)])
    assert asked == [[1]]


@pytest.mark.parametrize("whole", [False, True])
def test_kept_tells_what_it_cannot_know(whole):
    p = torch.tensor([[0.4, 0.3, 0.2]], dtype=torch.float64)  # a tenth lies behind

    def found(k: int, top_p: float, min_p: float) -> tuple[list[bool], bool]:
        keep, covered = kept(
            p.log(), torch.zeros(1), torch.tensor([k]), torch.tensor([top_p]),
            torch.tensor([min_p]), whole=whole,
        )  # fmt: skip
        return keep[0].tolist(), bool(covered)

    assert found(0, 0.5, 0.0) == ([True, True, False], True)
    assert found(2, 1.0, 0.0) == ([True, True, False], True)
    assert found(2, 0.5, 0.0) == ([True, False, False], True)  # 0.4 of 0.7 is enough
    assert found(0, 1.0, 0.6) == ([True, True, False], True)
    assert found(0, 0.95, 0.0) == ([True, True, True], whole)
    assert found(4, 0.1, 0.0) == ([True, False, False], whole)
    assert found(0, 1.0, 0.1) == ([True, True, True], whole)


def test_stop_ids_wait_for_the_least_number_of_tokens():
    s = sampler(1)
    best = int(logits_of(s)[0].argmax())
    params = SamplingParams(temperature=0, min_tokens=2, stop_ids=(best,))
    request, at = Request((1, 2, 3), params), torch.tensor([0])
    s.open(0, request)
    ids = []
    for position in (2, 3, 4):
        ids.append(int(s.draw(at, at, torch.tensor([position]), torch.tensor([False])).ids))
    assert best not in ids[:2]
    assert ids[2] == best


def test_scores_of_given_tokens():
    s = sampler(6, seed=3)
    every = torch.arange(6)
    requests = [Request((1, 2), dataclasses.replace(SamplingParams(), seed=i)) for i in range(6)]
    drawn = draw_all(s, requests)
    late = torch.zeros(6, dtype=torch.bool)
    given = torch.tensor([5, 100, 202, 0, 17, 3], dtype=torch.int32)
    found = s.score(every, every, every + 1, given, late, 4)
    own = logits_of(s).log_softmax(-1)
    torch.testing.assert_close(found.logprobs, own[every, given.long()])
    torch.testing.assert_close(found.top_logprobs, own.sort(-1, descending=True).values[:, :4])
    assert torch.equal(draw_all(s, requests).ids, drawn.ids)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_shortlist_finds_the_same_tokens(dtype):
    weights = read_weights(MODEL, dtype=dtype)
    impl = "reference" if dtype == torch.float64 else "auto"
    wide = torch.promote_types(dtype, torch.float32)
    bank = torch.randn(40, WIDTH, generator=torch.Generator().manual_seed(1)).to(wide)
    greedy = [Request((1,), SamplingParams(temperature=0)) for _ in range(40)]
    found = []
    for shortlist in (False, True):
        head = Head(weights, impl, shortlist=shortlist)
        s = Sampler(Readout(head, bank, 40, CANDIDATES), 40, 64, impl)
        found.append(draw_all(s, greedy).ids)
    assert torch.equal(*found)
    assert not s.readout.fresh.any()  # the head itself was not asked


def test_shortlist_leaves_requests_alone_that_want_more():
    s = sampler(2)
    s.readout.head = Head(s.readout.head.weights, "reference", shortlist=True)
    asked = [Request((1,), SamplingParams(temperature=0, logprobs=n)) for n in (None, 2)]
    found = draw_all(s, asked)
    assert found.ids.tolist() == logits_of(s).argmax(-1).tolist()
    assert found.top_ids[1, 0] == found.ids[1]
