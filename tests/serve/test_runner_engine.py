"""The engine on real weights: every schedule, policy of pressure and mode, against sequential
decoding through the model's own modules."""

import dataclasses

import pytest
import torch
from serve_tiny import VOCABULARY, Double, tiny

from gemma_ext.serve.config import EngineConfig
from gemma_ext.serve.engine import Engine
from gemma_ext.serve.exits import ExitTest
from gemma_ext.serve.protocol import Request, SamplingParams, Token
from gemma_ext.serve.sequential import Sequential

EXITS = ExitTest("max_prob", threshold=0.12)
CONFIG = EngineConfig(width=3, max_model_len=64, prefill_tokens=16, verify=True)
WAYS = (
    {"temperature": 0.0},
    {"temperature": 1.0, "frequency_penalty": 1.0, "logprobs": 2},
    {"temperature": 1.0, "top_k": 5, "repetition_penalty": 1.3},
    {"temperature": 2.0, "top_p": 0.8, "logprobs": 0},
)


def requests(count: int = 8, seed: int = 1) -> list[Request]:
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 30, (count,), generator=random).tolist()
    return [
        Request(
            tuple(torch.randint(VOCABULARY, (length,), generator=random).tolist()),
            SamplingParams(max_tokens=13 + 2 * i, seed=i, **WAYS[i % len(WAYS)]),
        )
        for i, length in enumerate(lengths)
    ]


def served(engine: Engine, asked: list[Request]) -> list[list[Token]]:
    """Half of them come while the others run."""
    half = len(asked) // 2
    ids = [engine.submit(request) for request in asked[:half]]
    found: dict[int, list[Token]] = {}
    steps = 0
    while engine.has_work() or len(ids) < len(asked):
        steps += 1
        if steps % 5 == 0 and len(ids) < len(asked):
            ids.append(engine.submit(asked[len(ids)]))
        for event in engine.step():
            assert event.finish_reason != "error"
            if event.token is not None:
                found.setdefault(event.request, []).append(event.token)
    return [found[id] for id in ids]


def assert_tokens(found: list[Token], wanted: list[Token]) -> None:
    assert [token.id for token in found] == [token.id for token in wanted]
    assert [token.exit_depth for token in found] == [token.exit_depth for token in wanted]
    for mine, own in zip(found, wanted, strict=True):
        assert (mine.logprob is None) == (own.logprob is None)
        if own.logprob is not None:
            assert mine.logprob == pytest.approx(own.logprob, rel=1e-9)
            assert [id for id, _ in mine.top] == [id for id, _ in own.top]


@pytest.mark.parametrize(
    "own",
    [
        {},
        {"kv_policy": "exact_eager", "min_coda_batch": 2},
        {"order": "deepest", "mixed": False},
        {"kv_pressure": "recompute", "pages": 5, "margin": 0.0},
        {"kv_pressure": "offload", "pages": 5, "margin": 0.0},
        {"prefix_cache": True, "fill_on_finish": True, "backlog": 3},
        {"mode": "lockstep"},
    ],
)
def test_engine_draws_what_sequential_decoding_draws(own):
    model = tiny("Gemma2", loops=2, rank=3, tie_word_embeddings=False)
    asked = requests()
    with Double():
        wanted = [Sequential(model, EXITS).decode(request) for request in asked]
    assert {token.exit_depth for tokens in wanted for token in tokens[1:]} == {1, 2}
    engine = Engine.of_model(model, dataclasses.replace(CONFIG, **own), exits=EXITS)
    for found, tokens in zip(served(engine, asked), wanted, strict=True):
        assert_tokens(found, tokens)
    if "pages" in own:
        assert engine.stats().preemptions > 0
    engine.scheduler.check()


@pytest.mark.parametrize("name", ["Gemma", "Gemma3Text", "Llama", "Mistral", "Qwen2", "Qwen3"])
def test_vanilla_models_are_engines_of_one_loop(name):
    model = tiny(name)
    asked = requests(5, seed=3)
    with Double():
        wanted = [Sequential(model).decode(request) for request in asked]
    engine = Engine.of_model(model, CONFIG)
    for found, tokens in zip(served(engine, asked), wanted, strict=True):
        assert_tokens(found, tokens)


def test_greedy_tokens_are_those_of_generate():
    model = tiny("Gemma2", loops=2, rank=3, tie_word_embeddings=False)
    asked = [
        dataclasses.replace(request, params=SamplingParams(max_tokens=12, temperature=0.0))
        for request in requests(4)
    ]
    engine = Engine.of_model(model, CONFIG)
    with Double():
        for request, found in zip(asked, served(engine, asked), strict=True):
            ids = torch.tensor([request.prompt])
            own = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=-1)
            assert [token.id for token in found] == own[0, ids.shape[1] :].tolist()


def test_prompt_is_scored_as_the_model_scores_it():
    model = tiny("Gemma2", loops=2, rank=3)
    prompt = requests(1)[0].prompt
    engine = Engine.of_model(model, CONFIG)
    engine.submit(Request(prompt, SamplingParams(max_tokens=2), prompt_logprobs=3))
    events = []
    while engine.has_work():
        events += engine.step()
    scored = events[0].prompt
    with torch.no_grad(), Double():
        own = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
    assert [token.id for token in scored] == list(prompt)
    assert scored[0].logprob is None
    for place, token in enumerate(scored[1:]):
        assert token.logprob == pytest.approx(own[place, token.id].item(), rel=1e-9)
        best = own[place].sort(descending=True, stable=True)
        assert [id for id, _ in token.top] == best.indices[:3].tolist()
