"""The search: what it draws, keeps and resumes; nanoGCG's candidates where it is installed."""

import copy
import json
import random

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from gemma_ext.papers.continuous_at.evaluation import gcg
from gemma_ext.papers.continuous_at.evaluation.candidates import RoundTrip, banned_ids, draw
from gemma_ext.papers.continuous_at.evaluation.scorer import TargetScorer
from gemma_ext.papers.continuous_at.evaluation.search import Search
from gemma_ext.papers.continuous_at.evaluation.template import (
    ask_and_target,
    split,
    with_slot,
)

ASK = "def read(path): {optim_str}\n"
TARGET = " return path.open"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[model] {% endif %}"
)
FAST = {
    "num_steps": 3, "search_width": 24, "topk": 16, "optim_str_init": "x x x x x x",
    "verbosity": "ERROR", "seed": 3,
}  # fmt: skip


@pytest.fixture
def tokenizer(pocket_nano, tmp_path):
    """One of its own, which may be changed."""
    pocket_nano.tokenizer.save_pretrained(tmp_path / "tokenizer")
    return AutoTokenizer.from_pretrained(tmp_path / "tokenizer")


@pytest.fixture(scope="module")
def llama(pocket_nano):
    """A model whose embedding scales nothing, so that nanoGCG's gradient is right."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_defaults_are_those_of_nanogcg():
    config = gcg.GCGConfig()
    assert (config.num_steps, config.search_width, config.topk, config.n_replace) == (
        250,
        512,
        256,
        1,
    )
    assert (config.buffer_size, config.use_mellowmax, config.mellowmax_alpha) == (0, False, 1.0)
    assert (config.early_stop, config.use_prefix_cache, config.allow_non_ascii) == (
        False,
        True,
        False,
    )
    assert (config.filter_ids, config.add_space_before_target, config.seed) == (True, False, None)
    assert config.optim_str_init == " ".join(["x"] * 20)
    with pytest.raises(ValueError, match="expected topk to be at least 1, got 0"):
        gcg.GCGConfig(topk=0)


@pytest.mark.parametrize(
    "more",
    [
        {}, {"buffer_size": 3}, {"use_mellowmax": True, "mellowmax_alpha": 2.0}, {"n_replace": 2},
        {"add_space_before_target": True, "allow_non_ascii": True}, {"filter_ids": False},
    ],
)  # fmt: skip
def test_candidates_and_losses_are_those_of_nanogcg(llama, tokenizer, more):
    nanogcg = pytest.importorskip("nanogcg")
    before = torch.are_deterministic_algorithms_enabled()
    try:
        # its prefix cache is that of an older transformers
        config = nanogcg.GCGConfig(**FAST, **more, use_prefix_cache=False)
        theirs = nanogcg.run(llama, tokenizer, ASK, TARGET, config)
    finally:
        torch.use_deterministic_algorithms(before)
    ours = gcg.run(llama, tokenizer, ASK, TARGET, gcg.GCGConfig(**FAST, **more))
    assert ours.strings == theirs.strings
    assert ours.best_string == theirs.best_string
    assert ours.losses == pytest.approx([float(loss) for loss in theirs.losses], abs=1e-5)


def test_a_search_lowers_the_loss(pocket_nano):
    model, tokenizer = pocket_nano.model, pocket_nano.tokenizer
    config = gcg.GCGConfig(**{**FAST, "num_steps": 8, "search_width": 96}, buffer_size=2)
    state = torch.get_rng_state()
    found = gcg.run(model, tokenizer, ASK, TARGET, config)
    assert torch.equal(state, torch.get_rng_state())
    assert tokenizer.chat_template is None
    assert len(found.losses) == len(found.strings) == 8
    assert found.best_loss == min(found.losses)
    start = gcg.run(model, tokenizer, ASK, TARGET, gcg.GCGConfig(**{**FAST, "num_steps": 0}))
    assert start.best_string == FAST["optim_str_init"]
    assert start.losses == []
    assert found.best_loss < start.best_loss - 0.3
    # the loss is that of the text
    parts = split(tokenizer, ASK, TARGET)
    ids = tokenizer(found.best_string, add_special_tokens=False)["input_ids"]
    whole = torch.tensor([[*parts.before, *ids, *parts.after, *parts.target]])
    with torch.no_grad():
        logits = model(whole).logits[0, -len(parts.target) - 1 : -1]
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(parts.target))
    assert found.best_loss == pytest.approx(loss.item(), abs=1e-4)
    assert found == gcg.run(model, tokenizer, ASK, TARGET, config)
    other = gcg.GCGConfig(**{**vars(config), "seed": 4})
    assert found.strings != gcg.run(model, tokenizer, ASK, TARGET, other).strings


def test_results_do_not_depend_on_batches_or_shared_keys(pocket_nano):
    found = [
        gcg.run(
            pocket_nano.model, pocket_nano.tokenizer, ASK, TARGET,
            gcg.GCGConfig(**FAST, batch_size=batch, use_prefix_cache=share),
        )
        for batch, share in ((None, True), (3, True), (1000, False))
    ]  # fmt: skip
    for other in found[1:]:
        assert other.strings == found[0].strings
        assert other.losses == pytest.approx(found[0].losses, abs=1e-4)


def test_without_a_seed_the_users_own_is_used(pocket_nano):
    config = gcg.GCGConfig(**{**FAST, "seed": None, "num_steps": 1})
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(gcg.run(pocket_nano.model, pocket_nano.tokenizer, ASK, TARGET, config))
    assert runs[0] == runs[1]
    assert runs[0].strings != runs[2].strings or runs[0].losses != runs[2].losses


def test_a_search_killed_anywhere_goes_on(pocket_nano, tmp_path, monkeypatch):
    arguments = (pocket_nano.model, pocket_nano.tokenizer, ASK, TARGET)
    config = gcg.GCGConfig(**{**FAST, "num_steps": 5}, buffer_size=2)
    whole = gcg.run(*arguments, config)
    path = tmp_path / "search" / "one.json"
    step, draw_ = Search.step, random.Random(0)

    def killed(search):
        if draw_.random() < 0.5:
            raise KeyboardInterrupt
        step(search)
        if draw_.random() < 0.3:
            raise KeyboardInterrupt  # before it was written

    monkeypatch.setattr(Search, "step", killed)
    kills = 0
    while True:
        try:
            found = gcg.run(*arguments, config, resume=path)
            break
        except KeyboardInterrupt:
            kills += 1
    assert kills >= 3
    assert found == whole
    monkeypatch.setattr(Search, "step", step)
    # finished: nothing is left to do, and more steps go on from it
    monkeypatch.setattr(Search, "_best", None)
    assert gcg.run(*arguments, config, resume=path) == whole
    monkeypatch.undo()
    longer = gcg.GCGConfig(**{**vars(config), "num_steps": 7})
    assert gcg.run(*arguments, longer, resume=path) == gcg.run(*arguments, longer)
    other = gcg.GCGConfig(**{**vars(config), "seed": 9})
    with pytest.raises(ValueError, match="to be of the same search, got one of another"):
        gcg.run(*arguments, other, resume=path)
    assert json.loads(path.read_text())["identity"]["target"] == TARGET
    changed = copy.deepcopy(pocket_nano.model)
    with torch.no_grad():
        changed.model.norm.weight += 0.1
    with pytest.raises(ValueError, match="to be of the same search"):
        gcg.run(changed, *arguments[1:], config, resume=path)


def test_early_stop(pocket_nano):
    model, tokenizer = pocket_nano.model, pocket_nano.tokenizer
    parts = split(tokenizer, ASK, "x")
    ids = tokenizer("x x x x x x", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([[*parts.before, *ids, *parts.after]])).logits
    target = tokenizer.decode([int(logits[0, -1].argmax())])
    config = gcg.GCGConfig(**FAST, early_stop=True)
    assert len(gcg.run(model, tokenizer, ASK, target, config).losses) == 1
    assert len(gcg.run(model, tokenizer, ASK, "Zebra", config).losses) == 3


def test_starts_of_a_buffer(pocket_nano):
    arguments = (pocket_nano.model, pocket_nano.tokenizer, ASK, TARGET)
    texts = ["a b c", "d e f"]
    config = gcg.GCGConfig(**{**FAST, "optim_str_init": texts}, buffer_size=2)
    assert len(gcg.run(*arguments, config).losses) == 3
    for start, size, message in (
        (["a b c", "d e"], 2, "texts of one length in tokens, at least one, got lengths"),
        ("", 0, "at least one, got lengths"),
        (texts, 3, "expected 3 texts of optim_str_init for a buffer of 3, got 2"),
    ):
        config = gcg.GCGConfig(**{**FAST, "optim_str_init": start}, buffer_size=size)
        with pytest.raises(ValueError, match=message):
            gcg.run(*arguments, config)


def test_more_places_than_there_are(pocket_nano):
    config = gcg.GCGConfig(**{**FAST, "optim_str_init": "x x"}, n_replace=9)
    with pytest.raises(ValueError, match=r"n_replace to be at most the \d tokens .*, got 9"):
        gcg.run(pocket_nano.model, pocket_nano.tokenizer, ASK, TARGET, config)


def test_nothing_left_and_too_wide(pocket_nano, monkeypatch):
    arguments = (pocket_nano.model, pocket_nano.tokenizer)
    with pytest.raises(ValueError, match=r"expected topk to be at most the \d+ tokens that may be"):
        gcg.GCG(*arguments, gcg.GCGConfig(topk=2048))
    monkeypatch.setattr(
        RoundTrip, "__call__", lambda self, rows: torch.zeros(len(rows), dtype=bool)
    )
    with pytest.raises(RuntimeError, match="got none of 24; set filter_ids=False"):
        gcg.run(*arguments, ASK, TARGET, gcg.GCGConfig(**FAST))


@pytest.mark.parametrize("share", [1.0, 0.2])
def test_probe_sampling_scores_few_by_the_model(pocket_nano, llama, share, monkeypatch):
    """With the model as its own draft, what the draft likes best is the best."""
    model, tokenizer = pocket_nano.model, pocket_nano.tokenizer
    draft = model if share == 1.0 else llama
    probing = gcg.ProbeSamplingConfig(draft, tokenizer, r=4, sampling_factor=8)
    config = {**FAST, "search_width": 64}
    whole = gcg.run(model, tokenizer, ASK, TARGET, gcg.GCGConfig(**{**config, "num_steps": 1}))
    scored = []
    score = TargetScorer.score

    def counting(self, candidates, *rest):
        if self.model is model:
            scored.append(len(candidates))
        return score(self, candidates, *rest)

    monkeypatch.setattr(TargetScorer, "score", counting)
    found = gcg.run(
        model, tokenizer, ASK, TARGET, gcg.GCGConfig(**config, probe_sampling_config=probing)
    )
    assert len(found.losses) == 3
    assert max(scored) < 30
    if share == 1.0:
        assert found.losses[0] == pytest.approx(whole.losses[0], abs=1e-4)
    else:
        assert found.losses[0] >= whole.losses[0] - 1e-4


def test_banned_tokens(pocket_nano):
    tokenizer = pocket_nano.tokenizer
    banned = set(banned_ids(tokenizer, 2050, False).tolist())
    assert {0, 1, 2, 2048, 2049} <= banned
    for token in range(3, 2048):
        text = tokenizer.decode([token])
        assert (token in banned) == (not (text.isascii() and text.isprintable())), text
    assert banned_ids(tokenizer, 2048, True).tolist() == [0, 1, 2]


def test_added_control_tokens_are_banned(tokenizer):
    tokenizer.add_special_tokens({"additional_special_tokens": ["<start_of_turn>"]})
    (control,) = tokenizer("<start_of_turn>", add_special_tokens=False)["input_ids"]
    assert control in banned_ids(tokenizer, len(tokenizer), True).tolist()


def test_draws_are_uniform_over_places_and_the_best_tokens():
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(4, 50, generator=generator)
    gradient[:, :10] = torch.inf
    ids = torch.arange(4)
    rows = draw(ids, gradient, 4000, 5, 1, generator)
    changed = rows != ids
    assert (changed.sum(1) == 1).all()
    best = [set(row.argsort()[:5].tolist()) for row in gradient]
    seen = [set(rows[changed[:, at], at].tolist()) for at in range(4)]
    assert seen == best
    assert (changed.float().mean(0) - 0.25).abs().max() < 0.05
    many = draw(ids, gradient, 50, 5, 3, generator)
    assert ((many != ids).sum(1) == 3).all()


def test_round_trips(tokenizer):
    keep = RoundTrip(tokenizer)
    good = tokenizer("return path", add_special_tokens=False)["input_ids"]
    letters = [tokenizer.convert_tokens_to_ids(letter) for letter in "re"]
    assert tokenizer("re", add_special_tokens=False)["input_ids"] != letters
    assert keep(torch.tensor([good[:2], letters, good[1:]])).tolist() == [True, False, True]


def test_round_trips_where_the_string_stands(tokenizer):
    """A string that grows together with what stands before it."""
    row = torch.tensor([tokenizer("urn", add_special_tokens=False)["input_ids"]])
    assert RoundTrip(tokenizer)(row).tolist() == [True]
    for before, kept in (("x ret", False), ("x (", True)):
        parts = split(tokenizer, before + "{optim_str}", "t")
        around = ((before, parts.before), ("", parts.after))
        assert RoundTrip(tokenizer, around)(row).tolist() == [kept]


def test_filter_prompt_keeps_what_the_whole_prompt_reads(pocket_nano):
    model, tokenizer = pocket_nano.model, pocket_nano.tokenizer
    config = gcg.GCGConfig(**FAST, filter_prompt=True)
    found = gcg.run(model, tokenizer, "def ret{optim_str}\n", TARGET, config)
    parts = split(tokenizer, "def ret{optim_str}\n", TARGET)
    for string in found.strings:
        ids = tokenizer(string, add_special_tokens=False)["input_ids"]
        text = tokenizer(f"def ret{string}\n")["input_ids"]
        assert text == [*parts.before, *ids, *parts.after]


def test_conversations_are_split_at_the_string(tokenizer):
    tokenizer.chat_template = TEMPLATE
    messages = [
        {"role": "system", "content": "be good"},
        {"role": "user", "content": "a{optim_str}b"},
    ]
    parts = split(tokenizer, messages, " ok")
    assert tokenizer.decode(parts.before) == "<bos>[system] be good\n[user] a"
    assert tokenizer.decode(parts.after) == "b\n[model] "
    assert tokenizer.decode(parts.target) == " ok"
    assert parts.before.count(tokenizer.bos_token_id) == 1
    assert "{optim_str}" in messages[1]["content"]
    plain = split(tokenizer, "hello", " ok")
    assert tokenizer.decode(plain.before) == "<bos>[user] hello"
    assert tokenizer.decode(plain.after) == "\n[model] "


def test_a_conversation_that_ends_with_its_target():
    conversation = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "Sure"}]
    assert ask_and_target(conversation) == ([{"role": "user", "content": "a"}], "Sure")
    with pytest.raises(ValueError, match="that ends with the assistant's answer, got"):
        ask_and_target(conversation[:1])


def test_conversations_that_do_not_fit(tokenizer):
    with pytest.raises(ValueError, match="once in the messages, got it 2 times"):
        with_slot("{optim_str} {optim_str}")
    with pytest.raises(TypeError, match="expected messages to be a string or messages, got"):
        with_slot([])
    with pytest.raises(ValueError, match="expected a target of at least one token, got ''"):
        split(tokenizer, "a", "")
