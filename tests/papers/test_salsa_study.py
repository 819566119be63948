"""Fine-tuning, the study and its page, the command and the example."""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import tiny_gemma
import torch
from salsa_toy import near
from typer.testing import CliRunner

from gemma_ext.papers import salsa
from gemma_ext.papers.salsa import page, study
from gemma_ext.papers.salsa.command import app
from gemma_ext.papers.salsa.opening import (
    choose_weights,
    open_parents,
    open_reference,
    open_start,
)
from gemma_ext.papers.salsa.sft import Pairs, read_pairs, tune
from gemma_ext.ppo.opening import load_causal
from gemma_ext.report import Kept

TEXTS = ["the quick brown fox jumps over the lazy dog. a cat sat on the mat, the end. " * 8] * 4
PAIRS = [("the quick", " brown fox jumps"), ("a cat", " sat on the mat"), ("on the", " mat.")] * 4
SCRIPT = Path(__file__).resolve().parents[2] / "python_examples" / "salsa.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_gemma.base(tmp_path_factory.mktemp("model"), TEXTS)


@pytest.fixture(scope="module")
def parents(folder, tmp_path_factory):
    """Two folders beside each other."""
    base, tokenizer = load_causal(str(folder), "float32", "cpu")
    places = []
    for seed in (1, 2):
        place = tmp_path_factory.mktemp(f"sft-{seed}")
        near(base, seed, by=0.003).save_pretrained(place)
        tokenizer.save_pretrained(place)
        places.append(str(place))
    return places


@pytest.fixture
def held(tmp_path):
    path = tmp_path / "held.jsonl"
    rows = [json.dumps({"prompt": p, "completion": c}) for p, c in PAIRS]
    path.write_text("\n".join([*rows, "", json.dumps({"text": "the lazy dog"})]) + "\n")
    return path


@pytest.fixture
def rewards(tmp_path, monkeypatch):
    """A module with a reward function, from the working folder."""
    (tmp_path / "salsa_rewards.py").write_text(
        "def long(completions, **columns):\n    return [len(text) / 10 for text in completions]\n"
    )
    (tmp_path / "prompts.txt").write_text("the quick\na cat\non the\nlazy\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "salsa_rewards:long"


def ran(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_pairs_are_learned_from_their_answers_alone(folder):
    _, tokenizer = load_causal(str(folder), "float32", "cpu")
    pairs = Pairs(PAIRS[:2], tokenizer)
    batch = pairs.batch([0, 1])
    for row, (prompt, answer) in enumerate(PAIRS[:2]):
        before = tokenizer(prompt).input_ids
        after = [*tokenizer(answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        size = len(before) + len(after)
        assert batch["input_ids"][row, :size].tolist() == [*before, *after]
        assert batch["labels"][row].tolist()[: len(before)] == [-100] * len(before)
        assert batch["labels"][row, len(before) : size].tolist() == after
        assert batch["attention_mask"][row].sum() == size
        assert (batch["labels"][row, size:] == -100).all()
    cut = Pairs(PAIRS[:1], tokenizer, max_length=3).batch([0])
    assert cut["input_ids"].shape == (1, 3)
    assert [len(b["input_ids"]) for b in Pairs(PAIRS, tokenizer).batches(5)] == [5, 5, 2]
    with pytest.raises(ValueError, match="at least one prompt"):
        Pairs([], tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="an end of text"):
        Pairs(PAIRS, tokenizer)


def test_rows_of_files(held, tmp_path):
    assert read_pairs(held) == [*PAIRS, ("", "the lazy dog")]
    (tmp_path / "bad.jsonl").write_text('{"question": 1}\n')
    with pytest.raises(ValueError, match="row 1: expected prompt and completion, or text"):
        read_pairs(tmp_path / "bad.jsonl")
    with pytest.raises(ValueError, match=r"expected a \.jsonl file"):
        read_pairs(tmp_path / "none.jsonl")


def test_tuning_is_a_function_of_its_seed(folder):
    base, tokenizer = load_causal(str(folder), "float32", "cpu")
    pairs = Pairs(PAIRS, tokenizer)

    def tuned(seed):
        model = study.trainable(copy.deepcopy(base), embeddings=False)
        losses = tune(model, pairs, steps=12, batch=4, seed=seed, show_progress=False)
        return model, losses

    (one, losses), (again, _), (two, _) = tuned(1), tuned(1), tuned(2)
    assert salsa.digest(one) == salsa.digest(again) != salsa.digest(two)
    assert losses[-1] < losses[0]
    embeddings = base.get_input_embeddings().weight
    assert torch.equal(one.get_input_embeddings().weight, embeddings)
    assert all(p.grad is None for p in one.parameters())


def settings(**changes):
    given = {"steps": 2, "batch": 4, "length": 5, "betas": (0.1,), "every": 1}
    return study.Setting(**{**given, **changes})


def long(completions, **columns):
    return [len(text) / 10 for text in completions]


@pytest.fixture(scope="module")
def records(folder, parents, tmp_path_factory):
    """A study of all methods, twice: the second time everything is kept."""
    out = tmp_path_factory.mktemp("study")
    base, tokenizer = load_causal(str(folder), "float32", "cpu")
    two = [load_causal(place, "float32", "cpu")[0] for place in parents]

    def made():
        return study.study(
            settings(),
            seeds=(1, 2),
            parents=lambda seed: two,
            theta_0=base,
            kept=Kept(out / "results.json", "x"),
            folder=out / "runs",
            rewards=long,
            prompts=[p for p, _ in PAIRS[:3]],
            held_out=["the lazy", "the mat", "brown"],
            tokenizer=tokenizer,
            show_progress=False,
        )

    found = made()
    written = (out / "results.json").stat().st_mtime_ns
    assert made() == found
    assert (out / "results.json").stat().st_mtime_ns == written
    return found


def test_a_study_measures_every_method_along_the_way(records):
    assert len(records) == len(study.METHODS) * 2
    for record in records:
        assert [point["step"] for point in record["points"]] == [0, 1, 2]
        first = record["points"][0]
        if record["method"] == "soup start":
            assert abs(first["kl_soup"]) < 1e-5
            assert first["kl_sft_1"] > 1e-4
        else:
            assert abs(first["kl_sft_1"]) < 1e-5
            assert first["kl_soup"] > 1e-4
        assert first["kl_theta_0"] > 1e-4
    zero = {r["method"]: r["zero"]["kl_reference"] for r in records}
    assert abs(zero["ppo"]) < 1e-5
    assert abs(zero["soup start"]) < 1e-5
    assert abs(zero["ema"]) < 1e-5
    assert zero["salsa"] > 1e-4
    assert zero["multi-kl"] > zero["salsa"]


def test_adapters_are_trained_in_place_of_weights(folder, parents, tmp_path):
    pytest.importorskip("peft")
    base, tokenizer = load_causal(str(folder), "bfloat16", "cpu")
    two = [load_causal(place, "bfloat16", "cpu")[0] for place in parents]
    before = [salsa.digest(model) for model in two]
    found = study.study(
        settings(lora=2, rate=1e-2),
        seeds=(1,),
        methods=("ppo", "salsa", "soup start"),
        parents=lambda seed: two,
        theta_0=base,
        kept=Kept(tmp_path / "results.json", "x"),
        folder=tmp_path / "runs",
        rewards=long,
        prompts=[p for p, _ in PAIRS[:3]],
        held_out=["the lazy", "the mat"],
        tokenizer=tokenizer,
        show_progress=False,
    )
    assert [salsa.digest(model) for model in two] == before
    zero = {record["method"]: record["zero"]["kl_reference"] for record in found}
    assert max(abs(zero["ppo"]), abs(zero["soup start"])) < 1e-5
    assert zero["salsa"] > 1e-4
    for record in found:
        home = "kl_soup" if record["method"] == "soup start" else "kl_sft_1"
        assert abs(record["points"][0][home]) < 1e-5
        assert record["points"][-1][home] > 1e-4
    with pytest.raises(ValueError, match="lora: expected 0 for ema, which averages weights, got 2"):
        study.parts_of("ema", two, lora=2)


def test_parents_are_tuned_by_adapters(folder):
    pytest.importorskip("peft")
    base, tokenizer = load_causal(str(folder), "bfloat16", "cpu")

    def tuned(seed):
        model = study.trainable(copy.deepcopy(base), lora=4)
        trained = {n.split(".")[-3] for n, p in model.named_parameters() if p.requires_grad}
        assert trained == {"lora_A", "lora_B"}
        losses = tune(
            model, Pairs(PAIRS, tokenizer), steps=12, batch=4, rate=1e-2, seed=seed,
            show_progress=False,
        )  # fmt: skip
        return model.merge_and_unload(), losses

    (one, losses), (again, _), (two, _) = tuned(1), tuned(1), tuned(2)
    assert losses[-1] < losses[0]
    assert salsa.digest(one) == salsa.digest(again) != salsa.digest(two)
    salsa.check_parents([base, one, two])


def test_differences_are_at_equal_divergence(records):
    found = study.comparison(records, "theta_0", places=3)
    assert set(found) == set(study.METHODS) - {"ppo"}
    curves = study.frontiers(records, "theta_0")
    for method, several in found.items():
        for difference in several:
            pairs = [
                curves[method][seed].at(difference.kl) - curves["ppo"][seed].at(difference.kl)
                for seed in (1, 2)
            ]
            assert difference.mean == pytest.approx(sum(pairs) / 2)
    rows = study.ends(records, ("reward",))
    assert len(rows) == len(study.METHODS)
    assert all(row["seeds"] == 2 for row in rows)


def test_the_page_says_what_was_measured(records, tmp_path):
    checks = [
        {
            "seed": 1,
            "start": 5.0,
            "parents": [4.0, 4.1],
            "soup": 3.9,
            "alphas": [0.0, 0.5, 1.0],
            "losses": [4.1, 3.9, 4.0],
        }
    ]
    collapsing = [{**records[0], "name": "ppo", "stopped": "x"}]
    page.write(tmp_path / "page.html", records, checks, collapsing, facts={"seeds": "2"})
    html = (tmp_path / "page.html").read_text()
    for text in ("soup start", "1 of 1", "-0.100", "<svg", "the first parent"):
        assert text in html
    text = page.markdown(records, checks, collapsing)
    assert "| 1 | 5.000 | 4.000 | 4.100 | 3.900 | 0.5 |" in text
    bare = page.markdown([{**r, "points": [_without(p) for p in r["points"]]} for r in records])
    assert "pretrained" not in bare
    assert "the first parent" in bare


def _without(point):
    return {name: value for name, value in point.items() if "theta_0" not in name}


def test_an_unknown_method_is_refused(parents):
    two = [load_causal(place, "float32", "cpu")[0] for place in parents]
    with pytest.raises(ValueError, match="method: expected one of ppo, salsa"):
        study.parts_of("dpo", two)


def test_the_command_makes_a_checked_soup(parents, held, tmp_path):
    out = tmp_path / "soup"
    done = ran("soup", *parents, "--out", out, "--held-out", held, "--tolerance", 1)
    assert done.exit_code == 0, done.output
    assert "held-out loss" in done.output
    entry = salsa.read_record(out)
    assert entry["alpha"] == 0.5
    assert len(entry["checks"]["parents"]) == 2
    loaded, tokenizer = load_causal(str(out), "auto", "cpu")
    salsa.verify(entry, loaded)
    assert tokenizer("the quick").input_ids
    best = ran("soup", *parents, "--out", tmp_path / "b", "--held-out", held, "--choose", "best",
               "--tolerance", 1, "--dtype", "bfloat16")  # fmt: skip
    assert best.exit_code == 0, best.output
    assert salsa.read_record(tmp_path / "b")["dtype"] == "bfloat16"


def test_the_command_refuses_in_one_sentence(parents, held, tmp_path):
    def sentence(*arguments):
        done = ran("soup", *arguments, "--out", tmp_path / "x")
        assert done.exit_code == 1
        return str(done.output) + str(done.exception)

    assert "parents: expected at least two, got 1" in sentence(parents[0])
    assert "weights: expected numbers" in sentence(*parents, "--weights", "a,b")
    assert "to add up to 1, got 2" in sentence(*parents, "--weights", "1,1")
    assert "choose: expected one of even" in sentence(*parents, "--choose", "worst")
    assert "held-out: expected data to choose by" in sentence(*parents, "--choose", "best")
    assert "dtype: expected auto" in sentence(*parents, "--dtype", "int8")
    refused = sentence(*parents, "--held-out", held, "--tolerance", -9)
    assert "expected a soup with a held-out loss of at most" in refused
    assert not (tmp_path / "x").exists()


def test_the_command_trains_and_compares(parents, folder, held, rewards, tmp_path):
    common = ["--prompts", "prompts.txt", "--reward", rewards, "--measure-prompts", "prompts.txt",
              "--every", 1, "--total-episodes", 8, "--per-device-train-batch-size", 4,
              "--response-length", 5, "--learning-rate", 1e-3, "--quiet", "--base", folder,
              "--parents", ",".join(parents)]  # fmt: skip
    runs = []
    for reference in ("frozen", "soup", "multi"):
        out = tmp_path / reference
        more = ["--held-out", held, "--tolerance", 1] if reference == "soup" else []
        done = ran("train", *common, *more, "--reference", reference, "--out", out)
        assert done.exit_code == 0, f"{done.output} {done.exception}"
        assert (out / "report.html").exists()
        entry = json.loads((out / "salsa.json").read_text())
        assert [point["step"] for point in entry["points"]] == [0, 1, 2]
        assert entry["method"] == f"{reference} from sft1"
        assert {"kl_theta_0", "kl_sft_1", "kl_soup"} <= set(entry["points"][0])
        runs.append(out)
    done = ran("compare", *runs, "--out", tmp_path / "page.html")
    assert done.exit_code == 0, f"{done.output} {done.exception}"
    assert "soup from sft1" in done.output
    assert (tmp_path / "page.html").exists()
    assert "baseline: expected one of frozen from sft1" in str(
        ran("compare", *runs, "--baseline", "x").exception
    )
    assert "expected salsa.json in" in str(ran("compare", tmp_path).exception)
    refused = ran("train", *common, "--out", tmp_path / "y", "--kl-warmup", "soon")
    assert "kl_warmup: expected int, got 'soon'" in str(refused.exception)


def test_parts_by_their_names(parents, folder, held):
    opened = open_parents(parents)
    two = opened.all
    batches = Pairs(PAIRS, opened.tokenizer).batches(4)
    assert choose_weights("even", two, []) == [0.5, 0.5]
    layers = choose_weights("layers", two, batches, steps=2)
    assert set(layers) == {"layer 0", "layer 1", "outside"}
    kinds = {
        kind: type(open_reference(kind, two, [0.5, 0.5])).__name__
        for kind in ("frozen", "soup", "multi", "ema", "sync")
    }
    assert kinds["multi"] == "MultiReference"
    assert kinds["ema"] == kinds["sync"] == "MovingReference"
    with pytest.raises(ValueError, match="reference: expected one of frozen"):
        open_reference("warm", two, [0.5, 0.5])
    with pytest.raises(ValueError, match="choose: expected even or best for multi"):
        open_reference("multi", two, layers)
    load = {"dtype": "float32", "device": "cpu"}
    starts = [open_start(init, two, [0.5, 0.5], **load) for init in ("sft1", "soup", str(folder))]
    expected = [two[0], salsa.soup(two), load_causal(str(folder), "float32", "cpu")[0]]
    for made, known in zip(starts, expected, strict=True):
        assert salsa.digest(made) == salsa.digest(known)
        assert all(p.requires_grad for p in made.parameters())


def test_adapters_as_parents(folder, held, tmp_path):
    from peft import LoraConfig, get_peft_model

    base, _ = load_causal(str(folder), "float32", "cpu")
    places = []
    for seed in (1, 2):
        made = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=["q_proj"]))
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                generator = torch.Generator().manual_seed(seed)
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.01)
        made.save_pretrained(tmp_path / f"{seed}")
        places.append(str(tmp_path / f"{seed}"))
    done = ran("soup", *places, "--base", folder, "--out", tmp_path / "soup")
    assert done.exit_code == 0, f"{done.output} {done.exception}"
    assert salsa.read_record(tmp_path / "soup")["parents"][0]["name"] == places[0]
    assert "base: expected the model of the adapters" in str(
        ran("soup", *places, "--out", tmp_path / "x").exception
    )


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("salsa_example", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_reward_counts_articles_and_distinct_words(example):
    found = example.articles(["the cat", "the the the the the", "", "a b c d"])
    assert found == pytest.approx([0.5 + 1.0, 2.0 + 0.2, 0.0, 0.5 + 1.0])


def test_the_texts_are_sentences_of_two_sides(example):
    train, held = example.texts("train"), example.texts("heldout")
    assert len(train) > 1000
    assert len(held) > 200
    assert not set(train) & set(held)
    prompt, answer = example.cut(held[0])
    assert prompt + answer == held[0]
    assert len(prompt.split()) == example.PROMPT


@pytest.mark.slow
def test_the_example_runs_and_goes_on(example, folder, tmp_path, capsys):
    options = {
        "model": str(folder),
        "device": "cpu",
        "dtype": "float32",
        "out": tmp_path / "out",
        "seeds": 1,
        "methods": "ppo,salsa",
        "betas": "0.1",
        "sft_steps": 4,
        "sft_rate": 1e-3,
        "steps": 2,
        "batch": 2,
        "length": 4,
        "rate": 1e-3,
        "every": 1,
        "prompts": 3,
        "held_out": 6,
        "lora": 0,
        "collapse_beta": 1.0,
    }
    example.main(**options)
    shown = capsys.readouterr().out
    assert "salsa, beyond step 0" in shown
    assert (tmp_path / "out" / "report.html").exists()
    salsa.read_record(tmp_path / "out" / "soup-1")
    before = (tmp_path / "out" / "results.json").stat().st_mtime_ns
    example.main(**options)
    assert (tmp_path / "out" / "results.json").stat().st_mtime_ns == before
    assert capsys.readouterr().out == shown
