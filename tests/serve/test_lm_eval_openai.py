"""Clients that score: lm-eval's `local-completions` and this package's own, against one server."""

from importlib.util import find_spec

import pytest
from live_server import LIMITS, NAME, live, nano_tokenizer  # noqa: F401

from gemma_ext.lm import EndpointModel, Sampling
from gemma_ext.serve.protocol import Request, SamplingParams
from gemma_ext.serve.scripted import ScriptedEngine, random_bigrams

api = pytest.mark.skipif(find_spec("tenacity") is None, reason="needs lm_eval[api]")
BIGRAMS = random_bigrams(LIMITS.vocabulary, seed=4)
PAIRS = [("def f(x):", " return x"), ("import ", "os"), ("", "class A"), ("héllo", " wörld 🤗")]


@pytest.fixture(scope="module")
def server(nano_tokenizer):  # noqa: F811
    with live(nano_tokenizer, lambda: ScriptedEngine(LIMITS, BIGRAMS)) as running:
        yield running
        running.wait_idle()


def logprob(context, continuation):
    """Of the continuation, and whether it is the likeliest at each place."""
    engine = ScriptedEngine(LIMITS, BIGRAMS)
    request = Request((*context, *continuation), SamplingParams(max_tokens=0), prompt_logprobs=1)
    engine.submit(request)
    scored = engine.step()[0].prompt[len(context) :]
    return sum(token.logprob for token in scored), all(
        token.logprob == token.top[0][1] for token in scored
    )


@api
@pytest.mark.parametrize("concurrent", [1, 4])
def test_lm_eval_scores_and_writes(server, nano_tokenizer, tmp_path, concurrent):  # noqa: F811
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    nano_tokenizer.save_pretrained(tmp_path)
    model = LocalCompletionsAPI(
        base_url=f"{server.url}/v1/completions",
        model=NAME,
        tokenizer_backend="huggingface",
        tokenizer=str(tmp_path),
        num_concurrent=concurrent,
        max_length=LIMITS.max_model_len,
        batch_size=2,
    )
    instances = [Instance("loglikelihood", {}, pair, 0) for pair in PAIRS]
    for pair, (value, greedy) in zip(PAIRS, model.loglikelihood(instances), strict=True):
        context, continuation = (
            model._encode_pair(*pair)
            if pair[0]
            else (
                [model.prefix_token_id],
                model.tok_encode(pair[1]),
            )
        )
        expected, is_greedy = logprob(context, continuation)
        assert value == pytest.approx(expected, rel=1e-12)
        assert greedy == is_greedy
    greedy = {"until": ["\n\n"], "max_gen_toks": 8, "temperature": 0}
    asked = [Instance("generate_until", {}, (pair[0] + "x", dict(greedy)), 0) for pair in PAIRS]
    written = model.generate_until(asked)
    client = server.client()
    for instance, text in zip(asked, written, strict=True):
        ids = nano_tokenizer(instance.args[0], add_special_tokens=False)["input_ids"]
        answer = client.completions.create(
            model=NAME, prompt=ids, max_tokens=8, temperature=0, stop="\n\n"
        )
        assert text == answer.choices[0].text


@api
def test_lm_eval_finds_the_tokenizer_of_the_server(server):
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    model = LocalCompletionsAPI(base_url=f"{server.url}/v1/completions", model=NAME)
    assert model.tokenizer_backend == "remote"
    ((value, _),) = model.loglikelihood([Instance("loglikelihood", {}, ("import ", "os"), 0)])
    expected, _ = logprob(*model._encode_pair("import ", "os"))
    assert value == pytest.approx(expected, rel=1e-12)


@api
def test_a_greedy_continuation_is_seen(server, nano_tokenizer, tmp_path):  # noqa: F811
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    ids = [5]
    for _ in range(3):
        ids.append(int(BIGRAMS(ids).argmax()))
    nano_tokenizer.save_pretrained(tmp_path)
    model = LocalCompletionsAPI(
        base_url=f"{server.url}/v1/completions", model=NAME, tokenizer=str(tmp_path),
        tokenizer_backend="huggingface",
    )  # fmt: skip
    requests = [(("a", "b"), ids[:1], ids[1:]), (("c", "d"), ids[:2], [7, 8])]
    (value, greedy), (_, other) = model._loglikelihood_tokens(requests)
    assert value == pytest.approx(logprob(ids[:1], ids[1:])[0], rel=1e-12)
    assert (greedy, other) == (True, False)


def test_the_endpoint_model_of_this_package(server, nano_tokenizer):  # noqa: F811
    model = EndpointModel(
        f"{server.url}/v1", NAME, api="completions", key="none", retries=0, show_progress=False
    )
    pairs = [pair for pair in PAIRS if pair[0]]
    scores = model.logprobs([a for a, _ in pairs], [b for _, b in pairs])
    for (context, continuation), score in zip(pairs, scores, strict=True):
        whole = nano_tokenizer(context + continuation)["input_ids"]
        start = len(whole) - len(score.token_logprobs)
        assert nano_tokenizer.decode(whole[start:]).endswith(continuation)
        expected, greedy = logprob(whole[:start], whole[start:])
        assert score.logprob == pytest.approx(expected, rel=1e-12)
        assert score.greedy == greedy
    (written,) = model.generate(["def "], Sampling(max_tokens=5, temperature=1.0, seed=3))
    (again,) = model.generate(["def "], Sampling(max_tokens=5, temperature=1.0, seed=3))
    assert written == again
    chat = EndpointModel(f"{server.url}/v1", NAME, key="none", retries=0, show_progress=False)
    assert chat.generate(["Hi"], Sampling(max_tokens=3))[0].tokens == 3
