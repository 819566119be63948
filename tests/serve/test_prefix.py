"""Models with trained keys and values in front of every prompt."""

import copy

import pytest
import torch
from policy_oracle import Oracle
from serve_tiny import VOCABULARY, Double, tiny

from gemma_ext.nn.recursive import add_prefixes
from gemma_ext.serve.config import PAGE, EngineConfig
from gemma_ext.serve.engine import Engine
from gemma_ext.serve.exits import ExitTest
from gemma_ext.serve.protocol import Request, SamplingParams
from gemma_ext.serve.sequential import Sequential

EXITS = ExitTest("max_prob", threshold=0.1)


def prefixed(name="Llama", count=3, loops=2, dtype=torch.float64, layers=4, order="cycle"):
    model = tiny(name, loops=loops, rank=3, layers=layers, dtype=dtype, order=order)
    add_prefixes(model, count)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.prefix.normal_(generator=torch.Generator().manual_seed(len(name)))
    return model


def requests(**options):
    random = torch.Generator().manual_seed(4)
    lengths = (1, 9, 20)
    return [
        Request(
            tuple(torch.randint(VOCABULARY, (n,), generator=random).tolist()),
            SamplingParams(max_tokens=30, temperature=float(n == 9), seed=n, logprobs=1, **options),
        )
        for n in lengths
    ]


def serve(model, asked, **options):
    given = {"width": 2, "requests": 3, "max_model_len": 64, "prefill_tokens": 16, "verify": True}
    engine = Engine.of_model(model, EngineConfig(**{**given, **options}), exits=EXITS)
    ids = [engine.submit(request) for request in asked]
    told = {id: [] for id in ids}
    while engine.has_work():
        for event in engine.step():
            told[event.request].append(event.token)
        engine.scheduler.check()
    assert engine.scheduler.free_pages == engine.config.pages
    return [told[id] for id in ids], engine


@pytest.mark.parametrize("routing", ["host", "device"])
@pytest.mark.parametrize(
    ("name", "count", "loops"),
    [("Llama", 3, 2), ("Qwen3", 16, 2), ("Gemma", 20, 1), ("Gemma2", 3, 2), ("Gemma3Text", 20, 2)],
)
def test_tokens_are_those_of_the_model_alone(name, count, loops, routing):
    model, asked = prefixed(name, count, loops), requests()
    bare = tiny(name, loops=loops, rank=3, layers=4)
    pages = -(-(count + 50) // PAGE)  # of the longest request alone
    pressure = {"kv_pressure": "recompute", "pages": pages, "margin": 0.0, "prefix_cache": True}
    found, engine = serve(model, asked, routing=routing, **pressure)
    assert engine.stats().preemptions > 0
    with Double():
        for request, tokens in zip(asked, found, strict=True):
            alone = Sequential(model, EXITS).decode(request)
            assert [token.id for token in tokens] == [token.id for token in alone]
            assert [t.exit_depth for t in tokens] == [t.exit_depth for t in alone]
            for token, own in zip(tokens, alone, strict=True):
                assert token.logprob == pytest.approx(own.logprob, rel=1e-8)
        plain = Sequential(bare, EXITS).decode(asked[0])
    assert [token.id for token in plain] != [token.id for token in found[0]]


@pytest.mark.parametrize("routing", ["host", "device"])
@pytest.mark.parametrize(
    ("name", "policy"),
    [
        *(("Llama", policy) for policy in ("exact_lazy", "copy", "propagate", "active_only")),
        ("Gemma2", "exact_eager"),
        ("Gemma2", "propagate"),
    ],
)
def test_no_schedule_changes_a_bit(name, policy, routing):
    model, asked = prefixed(name, count=5, loops=2, dtype=torch.float32), requests()
    first, _ = serve(model, asked, kv_policy=policy, routing="host", width=1, requests=1)
    assert {token.exit_depth for tokens in first for token in tokens} == {1, 2}
    again, _ = serve(model, asked, kv_policy=policy, routing=routing)
    assert again == first


@pytest.mark.parametrize("routing", ["host", "device"])
@pytest.mark.parametrize("policy", ["propagate", "copy"])
def test_what_tokens_leave_behind_has_the_angles_of_their_positions(policy, routing):
    bare = tiny("Gemma2", loops=3, rank=3, layers=6, seed=8, tie_word_embeddings=False)
    model = add_prefixes(copy.deepcopy(bare), 5)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.prefix.normal_(generator=torch.Generator().manual_seed(2))
    random = torch.Generator().manual_seed(4)
    prompt = tuple(torch.randint(VOCABULARY, (7,), generator=random).tolist())
    depths = [3, *torch.randint(1, 4, (14,), generator=random).tolist()]
    config = EngineConfig(
        width=2, max_model_len=64, prefill_tokens=16, kv_policy=policy, routing=routing
    )
    engine = Engine.of_model(model, config)
    engine.submit(Request(prompt, SamplingParams(max_tokens=15, temperature=0.0)), depths)
    tokens = []
    while engine.has_work():
        tokens += [event.token.id for event in engine.step()]
    with Double():
        assert tokens == Oracle(model, policy).decode(list(prompt), depths)
        assert tokens != Oracle(bare, policy).decode(list(prompt), depths)


def test_pages_of_the_prefix_are_shared_with_those_of_the_prompt():
    model, asked = prefixed(count=5, dtype=torch.float32), requests()[-1:]
    options = {"prefix_cache": True}
    given = {"width": 2, "max_model_len": 64, "prefill_tokens": 16, "verify": True}
    engine = Engine.of_model(model, EngineConfig(**given, **options), exits=EXITS)
    told = []
    for _ in range(2):
        engine.submit(asked[0])
        tokens = []
        while engine.has_work():
            tokens += [event.token for event in engine.step()]
        told.append(tokens)
    assert told[0] == told[1] == serve(model, asked)[0][0]
    assert engine.scheduler.counters()["cached_tokens"] == 16 - 5
    assert engine.scheduler.counters()["prompt_tokens"] == 2 * 20 - (16 - 5)


def test_layers_in_front_of_and_behind_the_loops_have_theirs():
    model, asked = prefixed(count=2, layers=6, order="middle-cycle"), requests()
    found, _ = serve(model, asked)
    with Double():
        for request, tokens in zip(asked, found, strict=True):
            alone = Sequential(model, EXITS).decode(request)
            assert [token.id for token in tokens] == [token.id for token in alone]


def test_scored_prompts_see_the_prefix():
    model = prefixed()
    request = Request((3, 4, 5, 6), SamplingParams(max_tokens=1), prompt_logprobs=1)
    config = EngineConfig(width=2, max_model_len=64)
    engine = Engine.of_model(model, config)
    engine.submit(request)
    events = []
    while engine.has_work():
        events += engine.step()
    scored = events[0].prompt
    assert [token.id for token in scored] == [3, 4, 5, 6]
    with torch.no_grad(), Double():
        own = model(torch.tensor([request.prompt])).logits[0].log_softmax(-1)
    for place, token in enumerate(scored[1:]):
        assert token.logprob == pytest.approx(own[place, token.id].item(), rel=1e-9)


def test_what_prefixes_do_not_go_with():
    model = prefixed()
    for policy in ("single", "first_then_shared", "modulo"):
        given = EngineConfig(max_model_len=64, kv_policy=policy)
        with pytest.raises(ValueError, match=f"^policy: expected a model without pr.* {policy}$"):
            Engine.of_model(model, given)
    with pytest.raises(ValueError, match=r"^pages: expected room for a token behind a prefix of 3"):
        Engine.of_model(prefixed(count=35), EngineConfig(max_model_len=64, pages=2))
