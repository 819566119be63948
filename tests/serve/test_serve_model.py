"""The thin path: a converted pocket, served, asked by the `openai` client."""

import asyncio
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys

import httpx
import openai
import pytest
import torch
from live_server import Live, running
from recursive_models import exit_states
from serve_tiny import Double

from gemma_ext.nn import recursive
from gemma_ext.papers.recursive import Recipe, convert
from gemma_ext.serve import launch as launching
from gemma_ext.serve.exits import ExitTest
from gemma_ext.serve.launch import Launch, ends_of_text, load_model, served_name
from gemma_ext.serve.policies import trained_policy
from gemma_ext.serve.protocol import Request, SamplingParams
from gemma_ext.serve.sequential import Sequential

EXITS = {"name": "max_prob", "threshold": 0.4}
PROMPTS = ["def f(x):\n", "import os", "The value of", "class A(", "    return self.", "for i in"]


@pytest.fixture(scope="module")
def folder(pocket_nano, tmp_path_factory):
    """The nano pocket with two loops and matrices of rank 16, and its tokenizer."""
    made = convert(pocket_nano.model, Recipe(loops=2, init="average", rank=16))
    path = recursive.save(made, tmp_path_factory.mktemp("models") / "pocket-r16")
    pocket_nano.tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def launch(folder):
    return Launch(
        folder,
        device="cpu",
        dtype="float64",
        engine={"width": 8, "max_model_len": 128, "verify": True},
        exits=EXITS,
    )


@pytest.fixture(scope="module")
def server(launch):
    app = launch.app()
    with running(app) as server:
        engine = app.state.service.engine
        yield Live(server, engine, [engine._engine])


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder, torch.device("cpu"), torch.float64)


def alone(model, tokenizer, text, **params):
    """The tokens of a request that nothing runs beside, by the model's own forward in float64."""
    ids = tokenizer(text)["input_ids"]
    stops = ends_of_text(model, tokenizer)
    params = SamplingParams(**{"stop_ids": stops, "max_tokens": 16, **params})
    with Double():
        return Sequential(model, ExitTest(**EXITS)).decode(Request(tuple(ids), params))


def ask(server, requests):
    """Completions of all requests at a time."""

    async def scenario():
        client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        async with client:
            return await asyncio.gather(
                *(client.completions.create(model="pocket-r16", **one) for one in requests)
            )

    return asyncio.run(scenario())


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_tokens_are_those_of_sequential_decoding(server, model, temperature):
    loops, tokenizer = model
    requests = [
        {
            "prompt": prompt,
            "seed": seed,
            "temperature": temperature,
            "max_tokens": 10 + seed,
            "logprobs": 1,
            "extra_body": {"return_exit_depths": True},
        }
        for prompt in PROMPTS
        for seed in range(1 if temperature == 0 else 3)
    ]
    seen = set()
    for one, answer in zip(requests, ask(server, requests), strict=True):
        options = {key: one[key] for key in ("seed", "temperature", "max_tokens", "logprobs")}
        expected = alone(loops, tokenizer, one["prompt"], **options)
        (choice,) = answer.choices
        told = [token.id for token in expected]
        assert choice.logprobs.token_logprobs == pytest.approx(
            [token.logprob for token in expected], rel=1e-6
        )
        ended = choice.finish_reason == "stop"
        assert choice.text == tokenizer.decode(told[:-1] if ended else told)
        assert choice.exit_depths == [token.exit_depth for token in expected]
        assert answer.usage.mean_exit_depth == sum(choice.exit_depths) / len(told)
        seen.update(choice.exit_depths)
    assert seen == {1, 2}
    server.wait_idle()


def test_company_changes_no_bit_in_float32(launch):
    requests = [
        {
            "prompt": prompt,
            "seed": seed,
            "max_tokens": 12,
            "logprobs": 2,
            "extra_body": {"return_exit_depths": True},
        }
        for prompt in PROMPTS
        for seed in range(2)
    ]
    told = []
    for width in (8, 1):
        engine = {**launch.engine, "width": width, "requests": 2 * width}
        app = dataclasses.replace(launch, dtype="float32", engine=engine).app()
        with running(app) as server:
            live = Live(server, app.state.service.engine, [])
            if width > 1:
                told.append(ask(live, requests))
            else:
                told.append([ask(live, [one])[0] for one in requests])
    for one, other in zip(*told, strict=True):
        assert one.choices[0].to_dict() == other.choices[0].to_dict()


def test_loops_are_bounded_by_the_request(server, model):
    loops, tokenizer = model
    for bounds in ({"max_loops": 1}, {"min_loops": 2}, {"exit_threshold": 0.05}):
        (answer,) = ask(
            server,
            [
                {
                    "prompt": "def ",
                    "temperature": 0,
                    "extra_body": {**bounds, "return_exit_depths": True},
                }
            ],
        )
        expected = alone(loops, tokenizer, "def ", temperature=0, **bounds)
        assert answer.choices[0].exit_depths == [token.exit_depth for token in expected]
        told = [token.id for token in expected]
        assert answer.choices[0].text == tokenizer.decode(told, skip_special_tokens=True)


@pytest.mark.parametrize("most", [1, 2])
def test_prompts_are_scored_as_by_the_model(server, model, most):
    loops, tokenizer = model
    texts = PROMPTS[:3]
    options = {"echo": True, "logprobs": 2, "max_tokens": 0, "extra_body": {"max_loops": most}}
    answers = ask(server, [{"prompt": text, **options} for text in texts])
    for text, answer in zip(texts, answers, strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.inference_mode(), Double():
            state = exit_states(loops, ids)[most - 1][0]
            logits = loops.get_output_embeddings()(state).double()
        cap = loops.config.final_logit_softcapping
        logprobs = (cap * torch.tanh(logits / cap)).log_softmax(-1)
        expected = logprobs[:-1].gather(1, ids[0, 1:, None]).squeeze(1)
        told = answer.choices[0].logprobs
        assert told.token_logprobs[0] is None
        assert told.token_logprobs[1:] == pytest.approx(expected.tolist(), rel=1e-6)
        best = logprobs[:-1].max(-1).values
        assert [max(top.values()) for top in told.top_logprobs[1:]] == pytest.approx(best.tolist())


def test_rude_clients_leave_nothing_behind(server):
    async def scenario():
        async with httpx.AsyncClient(base_url=server.url) as client:
            body = {"model": "pocket-r16", "prompt": "a", "max_tokens": 100, "stream": True}
            for _ in range(6):
                async with client.stream("POST", "/v1/completions", json=body) as answer:
                    await anext(answer.aiter_lines())

    asyncio.run(scenario())
    server.wait_idle()


def test_the_model_says_what_it_is(server):
    (told,) = server.client().models.list().data
    facts = (told.id, told.loops, told.max_model_len, told.kv_policy, told.exit_test)
    assert facts == ("pocket-r16", 2, 128, "exact_lazy", "max_prob")
    assert told.exit_threshold == 0.4


@pytest.mark.slow
def test_two_ranks_draw_the_tokens_of_one(server, launch):
    requests = [
        {"prompt": prompt, "seed": 3, "extra_body": {"return_exit_depths": True}, "logprobs": 0}
        for prompt in PROMPTS
    ]
    expected = ask(server, requests)
    app = dataclasses.replace(launch, ranks=2).app()
    processes = app.state.service.engine._finish.__self__._processes
    with running(app) as two:
        told = ask(Live(two, app.state.service.engine, []), requests)
        assert all(process.is_alive() for process in processes)
    assert [process.exitcode for process in processes] == [0]
    for mine, other in zip(told, expected, strict=True):
        assert mine.choices[0].text == other.choices[0].text
        assert mine.choices[0].exit_depths == other.choices[0].exit_depths
        assert mine.choices[0].logprobs.token_logprobs == pytest.approx(
            other.choices[0].logprobs.token_logprobs, rel=1e-9
        )


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_engine_and_not_the_server(launch):
    app = dataclasses.replace(launch, ranks=2).app()
    (process,) = app.state.service.engine._finish.__self__._processes
    with running(app) as two:
        live = Live(two, app.state.service.engine, [])
        process.kill()
        process.join()
        with pytest.raises(openai.InternalServerError, match="the engine failed"):
            ask(live, [{"prompt": "a"}])
        assert httpx.get(f"{live.url}/health").status_code == 503


def test_a_vanilla_model_is_one_loop(pocket_nano):
    app = Launch("pocket:nano", dtype="float64", engine={"max_model_len": 64}).app()
    with running(app) as server:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none")
        answer = client.completions.create(model="pocket:nano", prompt="def f", temperature=0)
    ids = torch.tensor([pocket_nano.tokenizer("def f")["input_ids"]])
    expected = pocket_nano.model.generate(ids, max_new_tokens=16, do_sample=False)
    told = pocket_nano.tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)
    assert answer.choices[0].text == told
    assert answer.usage.mean_exit_depth == 1


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"dtype": "int8"},
            "dtype: expected auto, float64, float32, bfloat16, float16, got 'int8'",
        ),
        ({"engine": {"max_model_len": 513}}, "max_model_len: expected at most the 512 positions"),
        ({"engine": {"width": 0}}, "width: expected at least 1, got 0"),
        ({"kv_memory": 1.5}, r"kv_memory: expected a share in \(0, 1\), got 1.5"),
        ({"kv_memory": 1e-12}, "kv_memory: expected room for a page of"),
        ({"exits": {"name": "guess"}}, "name: expected one of none, max_prob"),
        (
            {"exits": {"name": "margin"}},
            "exit_threshold: expected a number with exit test margin, got None",
        ),
        ({"ranks": 3}, "ranks: expected a divisor of the 4 heads, got 3"),
        (
            {"ranks": 2, "engine": {"kv_pressure": "offload"}},
            "kv_pressure: expected another with more than one rank, got offload",
        ),
        ({"ranks": 2, "shortlist": True}, "shortlist: expected one rank with it, got 2"),
        ({"exits": {"decay": 1.0}}, "decay: expected exit test max_prob, margin, cosine, gate"),
    ],
)
def test_options_that_do_not_fit(pocket_nano, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        dataclasses.replace(Launch("pocket:nano", device="cpu"), **options).app()


def test_exit_weights_are_read(pocket_nano, tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "gate.safetensors"
    save_file({"weight": torch.zeros(128), "other": torch.zeros(1)}, path)
    launch = Launch("pocket:nano", exits={"name": "gate"}, exit_weights=str(path))
    with pytest.raises(ValueError, match="exit_weights: expected weight and bias in"):
        launch.app()
    save_file({"weight": torch.ones(128), "bias": torch.zeros(())}, path)
    assert launching._learned(str(path))["weight"].shape == (128,)


def test_a_trace_and_a_shortlist(launch, server, tmp_path):
    path = tmp_path / "steps.jsonl"
    asked = [{"prompt": "def f", "temperature": 0}]
    app = dataclasses.replace(launch, trace=str(path), shortlist=True).app()
    with running(app) as other:
        engine = app.state.service.engine._engine
        (mine,) = ask(Live(other, app.state.service.engine, [engine]), asked)
        assert engine.runner.readout.head.shortlist is not None
        lines = [json.loads(line) for line in path.read_text().splitlines()]  # while it serves
    (expected,) = ask(server, asked)
    assert mine.choices[0].text == expected.choices[0].text
    codas = [line for line in lines if line["stage"] == "coda"]
    assert len(codas) == mine.usage.completion_tokens
    with pytest.raises(ValueError, match=r"^trace: expected a file that can be written, .*nowhere"):
        dataclasses.replace(launch, trace=str(tmp_path / "nowhere" / "f")).app()


def test_names(tmp_path):
    assert served_name(str(tmp_path)) == tmp_path.name
    assert served_name("pocket:nano") == "pocket:nano"
    assert served_name("google/gemma-2-2b") == "google/gemma-2-2b"


def serve(*arguments, **environment):
    command = [sys.executable, "-m", "gemma_ext.cli", "serve", *arguments]
    return subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
    )


def test_the_command(folder):
    options = ["--port", "0", "--dtype", "float64", "--max-model-len", "64", "--name", "loops"]
    options += ["--exit", "max_prob", "--exit-threshold", "0.4", "--kv-memory", "0.01"]
    process = serve(folder, *options, GEMMA_EXT_API_KEY="secret")
    try:
        for line in process.stderr:
            if found := re.search(r"running on (http://\S+)", line):
                break
        client = openai.OpenAI(base_url=f"{found[1]}/v1", api_key="secret", max_retries=0)
        answer = client.completions.create(model="loops", prompt="def f", temperature=0)
        assert answer.usage.completion_tokens > 0
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{found[1]}/v1", api_key="x").models.list()
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) in (0, -signal.SIGTERM)
    finally:
        process.kill()
        process.wait()


def test_the_command_says_what_is_wrong(tmp_path):
    process = serve("pocket:nano", "--width", "4", "--kv-policy", "guess")
    _, told = process.communicate(timeout=60)
    assert process.returncode == 1
    assert (
        told.strip()
        .splitlines()[-1]
        .startswith("gemma-ext serve: --kv-policy: expected one of exact_lazy")
    )


def test_the_policy_that_a_model_was_trained_with_is_the_default(folder, launch, tmp_path):
    model, tokenizer = load_model(folder, torch.device("cpu"), None)
    model.config.recursive |= {"kv_policy": "first_then_shared", "keep": 2}
    recursive.save(model, tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for given, (policy, keep) in (
        ({}, ("first_then_shared", 2)),
        ({"kv_policy": "copy", "keep": 1}, ("copy", 1)),
    ):
        engine = {"max_model_len": 64, **given}
        app = dataclasses.replace(launch, model=str(tmp_path), engine=engine).app()
        service = app.state.service
        assert service.served.facts["kv_policy"] == policy
        assert service.served.facts["trained_kv_policy"] == "first_then_shared"
        config = service.engine._make().config
        assert (config.kv_policy, config.keep) == (policy, keep)
    told = launch.app().state.service.served.facts
    assert (told["kv_policy"], told["trained_kv_policy"]) == ("exact_lazy", "exact_lazy")
    model.config.recursive["kv_policy"] = "magic"
    with pytest.raises(ValueError, match=r"^kv_policy: expected one of .* in the config of the"):
        trained_policy(model)


def test_a_device_that_routes_serves_several_ranks_no_model(launch):
    with pytest.raises(ValueError, match=r"^routing: expected host with 2 ranks, got 'device'"):
        dataclasses.replace(launch, ranks=2, engine={"routing": "device"}).app()
