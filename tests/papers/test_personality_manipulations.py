"""Three ways of giving a trait: what a model is asked, and what of it stays behind."""

import personality_toy as toy
import pytest
import torch

from gemma_ext.lm import Sampling
from gemma_ext.papers import personality as p

EXAMPLES = {
    "extraversion": toy.pairs(),
    "openness": toy.pairs("openness", "closedness to experience"),
}
GREEDY = Sampling(8)


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return toy.chat_model(tmp_path_factory.mktemp("model"))


@torch.no_grad()
def logits(lm, question="Who is in?"):
    ids = torch.tensor(lm.text.encode([p.chat(question)]))
    return lm.model(input_ids=ids).logits


def test_prompts_hold_every_traits_examples_and_no_placeholder(lm):
    for trait in (None, *EXAMPLES):
        prompt = p.in_context(EXAMPLES, trait).ask("Is {this} it?")
        text = lm.text.render(prompt)
        for name, pairs in EXAMPLES.items():
            for pair in pairs[:2]:
                example = f"Question: {pair.question}\nAnswer ({name}): {pair.high_trait_response}"
                assert text.count(example) == 1
        wish = "Answer:" if trait is None else f"Answer ({trait}):"
        assert text.replace("{this}", "").count("{") == 0
        assert prompt[0]["content"].endswith(f"Question: Is {{this}} it?\n{wish}")
        (ids,) = lm.text.encode([prompt])
        assert ids.count(lm.text.tokenizer.bos_token_id) == 1


def test_examples_as_many_as_asked_for():
    asked = p.in_context(EXAMPLES, "openness", ask=str, shots=1).ask("Why?")
    assert asked.count("Question:") == 3
    with pytest.raises(ValueError, match="trait: expected one of extraversion, openness, got 'x'"):
        p.in_context(EXAMPLES, "x")
    with pytest.raises(ValueError, match="examples: expected 5 of extraversion, got 4"):
        p.in_context(EXAMPLES, None, shots=5)


def test_strength_0_is_the_model_bit_for_bit_and_nothing_stays(lm):
    v = torch.nn.functional.normalize(torch.randn(32), dim=0)
    plain = logits(lm)
    with p.steered(lm, 1, v, 50.0, None).on():
        assert torch.equal(logits(lm), plain)
    with p.steered(lm, 1, v, 0.0, "openness").on():
        assert torch.equal(logits(lm), plain)
    steered = p.steered(lm, 1, v, 50.0, "openness")
    with steered.on():
        assert not torch.equal(logits(lm), plain)
    with pytest.raises(KeyError), steered.on():
        raise KeyError
    assert torch.equal(logits(lm), plain)
    hooks = [h for m in lm.model.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)]
    assert not hooks


def test_opposite_strengths_move_the_read_out_oppositely(lm):
    """The logits of the last block's sum without its norm are linear in the direction."""
    v = torch.nn.functional.normalize(torch.randn(32), dim=0)
    found = []

    def keep(module, args):
        found.append(args[0])

    handle = lm.model.model.norm.register_forward_pre_hook(keep)
    for strength in (0.0, 3.0, -3.0):
        with p.steered(lm, 1, v, strength, "openness", site="resid_post").on():
            logits(lm)
    handle.remove()
    plain, up, down = found
    torch.testing.assert_close(up - plain, plain - down, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        (up - plain)[0, 1:], (3 * v).expand_as(plain[0, 1:]), atol=1e-3, rtol=0
    )
    assert torch.equal(up[0, 0], plain[0, 0])


@pytest.fixture(scope="module")
def adapter(lm, tmp_path_factory):
    before = {name: value.clone() for name, value in lm.model.state_dict().items()}
    wanted = [parameter.requires_grad for parameter in lm.model.parameters()]
    recipe = p.AdapterRecipe(rank=4, alpha=8, rate=5e-3, epochs=4, batch=2)
    folder = tmp_path_factory.mktemp("adapters") / "extraversion"
    assert p.train_adapter(lm, toy.pairs(), folder, recipe) == folder
    after = lm.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert [parameter.requires_grad for parameter in lm.model.parameters()] == wanted
    return folder


def answered(lm):
    pairs = toy.pairs()
    scores = lm.logprobs(
        [p.chat(x.question) for x in pairs], [x.high_trait_response for x in pairs]
    )
    return sum(score.logprob for score in scores)


def test_an_adapter_teaches_the_high_answers_and_leaves_no_trace(lm, adapter):
    plain, likely = logits(lm), answered(lm)
    manipulation = p.adapted(lm, adapter, "extraversion")
    with manipulation.on():
        assert answered(lm) > likely + 1
        taught = lm.generate([p.chat("Who is in?")], GREEDY)
    assert torch.equal(logits(lm), plain)
    with pytest.raises(KeyError), manipulation.on():
        raise KeyError
    assert torch.equal(logits(lm), plain)
    with manipulation.on():
        assert lm.generate([p.chat("Who is in?")], GREEDY) == taught
    with p.adapted(lm, None, None).on():
        assert torch.equal(logits(lm), plain)


def test_an_adapter_that_is_there_is_kept(lm, adapter):
    times = {path: path.stat().st_mtime_ns for path in adapter.iterdir()}
    p.train_adapter(lm, toy.pairs()[:1], adapter)
    assert times == {path: path.stat().st_mtime_ns for path in adapter.iterdir()}
