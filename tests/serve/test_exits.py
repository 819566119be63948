"""Exit tests on a runner against those of sequential decoding, and their rules one by one."""

import dataclasses
import itertools
import math

import pytest
import torch
from serve_driver import Driver
from serve_tiny import VOCABULARY, Double, tiny

from gemma_ext.serve.exit_state import Exits
from gemma_ext.serve.exits import TESTS, ExitTest
from gemma_ext.serve.protocol import Request, SamplingParams
from gemma_ext.serve.readout import Head, Readout
from gemma_ext.serve.runner import ModelRunner, Sizes
from gemma_ext.serve.sequential import Sequential
from gemma_ext.serve.weights import read_weights

SIZES = Sizes(requests=4, slots=64, pages=24, max_length=64)
WIDTH = 32


def learned(name: str, loops: int) -> dict:
    random = torch.Generator().manual_seed(3)
    if name == "preloop":
        weight = torch.randn(loops, WIDTH, generator=random, dtype=torch.float64)
        return {"weight": weight, "bias": torch.linspace(0.5, 0, loops, dtype=torch.float64)}
    if name in ("gate", "hazard"):
        weight = torch.randn(WIDTH, generator=random, dtype=torch.float64)
        return {"weight": 0.2 * weight, "bias": -0.1}
    return {}


# thresholds in the middle of the scores that the tiny models give, so that both ways are taken
BOTH_WAYS = [
    ("max_prob", 2, 0.3),
    ("max_prob", 3, 0.3),
    ("margin", 2, 0.15),
    ("margin", 3, 0.15),
    ("entropy", 2, 2.0),
    ("entropy", 3, 2.0),
    ("kl", 2, 0.2),
    ("kl", 3, 0.3),
    ("argmax", 3, 1),
    ("cosine", 2, 0.8),
    ("cosine", 3, 0.7),
    ("latent_diff", 2, 0.5),
    ("latent_diff", 3, 0.6),
    ("gate", 2, 0.5),
    ("gate", 3, 0.5),
    ("hazard", 3, 0.7),
    ("preloop", 3, 0.6),
]


def requests(**params) -> list[Request]:
    random = torch.Generator().manual_seed(11)
    return [
        Request(
            tuple(torch.randint(VOCABULARY, (length,), generator=random).tolist()),
            SamplingParams(**{"max_tokens": 12, "seed": length, **params}),
        )
        for length in (1, 4, 9)
    ]


@pytest.mark.parametrize(("name", "loops", "threshold"), BOTH_WAYS)
def test_every_test_leaves_where_sequential_decoding_does(name, loops, threshold):
    model = tiny("Gemma2", loops=loops, rank=3, layers=6, seed=5)
    exits = ExitTest(name, threshold=threshold, **learned(name, loops))
    asked = requests()
    with Double():
        wanted = [Sequential(model, exits).decode(request) for request in asked]
    runner = ModelRunner(read_weights(model), SIZES, exits=exits)
    jobs = Driver(runner, seed=2).run(asked)
    depths = [[token.exit_depth for token in tokens] for tokens in wanted]
    assert [job.depths for job in jobs] == depths
    for job, tokens in zip(jobs, wanted, strict=True):
        assert job.tokens[len(job.request.prompt) :] == [token.id for token in tokens]
    assert len(set(itertools.chain(*(each[1:] for each in depths)))) > 1


def test_requests_of_different_settings_share_steps():
    model = tiny("Gemma2", loops=3, rank=3, layers=6, seed=5)
    exits = ExitTest("max_prob", threshold=0.3)
    asked = [
        dataclasses.replace(request, params=dataclasses.replace(request.params, **own))
        for request, own in zip(
            requests(),
            ({"exit_threshold": 0.0}, {"min_loops": 2}, {"exit_threshold": 2.0, "max_loops": 2}),
            strict=True,
        )
    ]
    with Double():
        wanted = [Sequential(model, exits).decode(request) for request in asked]
    jobs = Driver(ModelRunner(read_weights(model), SIZES, exits=exits), seed=4).run(asked)
    assert [job.depths for job in jobs] == [[t.exit_depth for t in tokens] for tokens in wanted]
    assert jobs[0].depths == [3] + [1] * 11  # the prompt gives the first one
    assert 1 not in jobs[1].depths
    assert set(jobs[2].depths) == {2}


def test_exit_head_reads_early_tokens_only():
    from gemma_ext.nn.recursive import ExitHead

    model = tiny("Gemma2", loops=2, rank=3)
    model.exit_head = ExitHead(model.lm_head.weight, rank=4)
    with torch.no_grad():
        model.exit_head.lora_B.normal_(std=2.0, generator=torch.Generator().manual_seed(0))
    exits = ExitTest("max_prob", threshold=0.9)
    asked = requests()
    with Double():
        wanted = [Sequential(model, exits).decode(request) for request in asked]
    jobs = Driver(ModelRunner(read_weights(model), SIZES, exits=exits), seed=4).run(asked)
    assert [job.depths for job in jobs] == [[t.exit_depth for t in tokens] for tokens in wanted]
    assert {depth for job in jobs for depth in job.depths} == {1, 2}
    for job, tokens in zip(jobs, wanted, strict=True):
        assert job.tokens[len(job.request.prompt) :] == [token.id for token in tokens]


@pytest.mark.parametrize("name", [name for name in TESTS if name != "none"])
def test_direction_and_equality(name):
    given = learned(name, 2)
    score, above = torch.tensor([0.4, 0.5, 0.6, math.nan]), name in (
        "max_prob", "margin", "argmax", "cosine", "gate", "hazard", "preloop",
    )  # fmt: skip
    stays = name in ("margin", "cosine", "latent_diff")
    for strict in (None, True, False):
        passed = ExitTest(name, 0.5, strict, **given).passes(score, torch.tensor(0.5))
        equal = not (stays if strict is None else strict)
        assert passed.tolist() == [not above, equal, above, False]


def test_falling_threshold_is_calms():
    model = tiny("Gemma2", loops=2, rank=0)
    head = Head(read_weights(model))
    readout = Readout(head, torch.zeros(4, WIDTH, dtype=torch.float64), 2, 0)
    exits = Exits(ExitTest("max_prob", threshold=0.8, decay=3.0), readout, 2, 2)
    exits.open(1, SamplingParams(max_tokens=10), 5)
    outputs = torch.tensor([0, 3, 9])
    found = exits._threshold(torch.tensor([1, 1, 1]), outputs + 4)
    expected = 0.9 * 0.8 + 0.1 * 0.8 * torch.exp(-3.0 * outputs.double() / 10)
    torch.testing.assert_close(found, expected)
    exits.open(0, SamplingParams(max_tokens=10, exit_threshold=7.0), 5)
    assert exits._threshold(torch.tensor([0]), torch.tensor([4])).tolist() == [1.0]  # cut


def test_hazard_is_the_share_that_a_brute_force_product_gives():
    model = tiny("Gemma2", loops=3, rank=0, layers=6)
    bank = torch.randn(5, WIDTH, dtype=torch.float64)
    readout = Readout(Head(read_weights(model)), bank, 1, 0)
    given = learned("hazard", 3)
    exits = Exits(ExitTest("hazard", threshold=0.5, **given), readout, 3, 1, "reference")
    slots = torch.arange(5)
    exits.enter(slots)
    left = torch.ones(5, dtype=torch.float64)
    for loop in range(2):
        bank.copy_(torch.randn(5, WIDTH, dtype=torch.float64))
        left *= 1 - torch.sigmoid(bank @ given["weight"] + given["bias"])
        score = exits._score(slots, slots * 0, slots, torch.full((5,), loop), None, None)
        torch.testing.assert_close(score, 1 - left)
    exits.enter(slots)
    assert exits.survival.tolist() == [1.0] * 5


def test_divergence_of_heads_has_the_bits_a_row_has_alone():
    model = tiny("Gemma2", loops=2, rank=0, vocab_size=1031, dtype=torch.float32)
    bank = torch.randn(9, WIDTH)
    before = torch.randn(9, WIDTH)
    head, slots = Head(read_weights(model)), torch.arange(9)
    together = head.divergence(bank, slots, before)
    alone = [head.divergence(bank, slots[i : i + 1], before[i : i + 1]) for i in range(9)]
    assert torch.equal(together, torch.cat(alone))
    p, q = (torch.log_softmax(head.logits(x, slots, True).double(), -1) for x in (bank, before))
    torch.testing.assert_close(together.double(), (p.exp() * (p - q)).sum(-1), rtol=1e-4, atol=1e-5)


def test_defaults_of_thresholds():
    assert ExitTest("argmax").own_threshold(SamplingParams()) == 2
    assert ExitTest("latent_diff").own_threshold(SamplingParams()) == 0.03
    assert ExitTest("max_prob", threshold=0.5).own_threshold(SamplingParams()) == 0.5
    own = SamplingParams(exit_threshold=0.25)
    assert ExitTest("max_prob", threshold=0.5).own_threshold(own) == 0.25


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"name": "gut feeling"}, "name: expected one of none, max_prob, .*, got 'gut feeling'"),
        ({"name": "kl"}, "exit_threshold: expected a number with exit test kl, got None"),
        ({"name": "gate"}, "weight: expected a weight with exit test gate, got none"),
        (
            {"name": "kl", "weight": torch.ones(2)},
            "weight: expected no weight with exit test kl, got one",
        ),
        ({"name": "entropy", "decay": 1.0}, "decay: expected exit test max_prob, .*, got entropy"),
        (
            {"name": "margin", "threshold": 0.5, "decay": -1.0},
            "decay: expected a number of at least 0, got -1.0",
        ),
    ],
)
def test_what_does_not_fit_is_refused(given, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}"):
        ExitTest(**given)


@pytest.mark.parametrize(
    ("test", "sentence"),
    [
        (
            ExitTest("gate", 0.5, weight=torch.ones(7)),
            r"weight: expected \[32\] with exit test gate, got \[7\]",
        ),
        (
            ExitTest("preloop", 0.5, weight=torch.ones(WIDTH)),
            r"weight: expected \[2, 32\] with exit test preloop, got \[32\]",
        ),
        (
            ExitTest("gate", 0.5, weight=torch.ones(WIDTH), bias=torch.ones(2)),
            "bias: expected one number a score, got 2",
        ),
    ],
)
def test_weights_of_another_model_are_refused(test, sentence):
    model = tiny("Gemma2", loops=2, rank=0)
    with pytest.raises(ValueError, match=f"^{sentence}"):
        ModelRunner(read_weights(model), SIZES, exits=test)
