"""`gemma-ext sae`, its pages and the example script, as a user runs them."""

import dataclasses
import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from gemma_ext.integrations.sae_files import load_dictionary
from gemma_ext.nn.sparse_autoencoder import (
    Gated,
    JumpReLU,
    ReLU,
    SparseAutoencoder,
    TopK,
)
from gemma_ext.pocket import SIZES
from gemma_ext.sae.command import app
from gemma_ext.sae.opening import load_model, open_model
from gemma_ext.sae.tokens import count
from gemma_ext.sae.variants import new_dictionary

SCRIPT = Path(__file__).resolve().parents[2] / "python_examples" / "train_sae.py"
SHORT = ("--tokens", "8k", "--batch", "256", "--buffer", "1k", "--context", "32")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A pocket that is trained in seconds, once for all tests here."""
    recipe = dataclasses.replace(
        SIZES["nano"],
        vocab_size=400,
        hidden_size=32,
        layers=2,
        head_dim=8,
        intermediate_size=48,
        context=32,
        sliding_window=16,
        corpus_bytes=60_000,
        steps=6,
        batch=4,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "least", recipe)
        patch.setenv("GEMMA_EXT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield "pocket:least"


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def train(model, out, *options):
    return run(
        "train", "--model", model, "--out", out, "--features", 64, "--k", 4, *SHORT, *options
    )


@pytest.mark.slow
def test_train_evaluate_inspect_convert(model, tmp_path):
    out = tmp_path / "run"
    done = train(model, out)
    assert done.exit_code == 0, done.output
    assert "training" in done.stderr
    folder, page = (Path(line) for line in done.stdout.split()[-2:])
    assert (folder, page) == (out / "sae", out / "report.html")
    config = json.loads((folder / "cfg.json").read_text())
    assert (config["architecture"], config["k"], config["d_sae"]) == ("topk", 4, 64)
    assert config["metadata"]["hook_name"] == "blocks.1.hook_resid_post"
    assert config["normalize_activations"] == "none"
    assert (folder / "sparsity.safetensors").exists()
    html = page.read_text()
    assert "variance explained" in html
    assert html.count("<svg") == 2
    numbers = json.loads((out / "evaluation.json").read_text())
    assert 0 < numbers["fvu"] < 1
    assert numbers["l0"] <= 4

    found = run("eval", folder, "--model", model, "--out", out / "eval.html", "--context", 32, "-q")
    assert found.exit_code == 0, found.output
    assert found.stderr == ""
    again = float(re.search(r"^fvu +([0-9.]+)$", found.stdout, re.MULTILINE)[1])
    assert again == pytest.approx(numbers["fvu"], abs=2e-4)
    assert (out / "eval.html").read_text().count("<svg") == 1

    options = ("--model", model, "--context", 32, "--rows", 20)
    look = run("inspect", folder, *options, "--out", out / "l.html", "--latents", "3,5")
    assert look.exit_code == 0, look.output
    page = (out / "l.html").read_text()
    assert [f"Latent {n}<" in page for n in (3, 5, 4)] == [True, True, False]
    look = run("inspect", folder, *options, "--out", out / "l.html", "--count", 3, "-q")
    assert (out / "l.html").read_text().count('<section id="latent-') == 3

    written = run("convert", folder, tmp_path / "theirs", "--to", "dictionary_learning")
    assert written.exit_code == 0, written.output
    x = torch.randn(5, config["d_in"])
    torch.testing.assert_close(load_dictionary(tmp_path / "theirs")(x), load_dictionary(folder)(x))


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["batchtopk", "relu"])
def test_crosscoder_of_two_models(model, activation, tmp_path):
    other = open_model(model).model
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight.mul_(1.5)
    other.save_pretrained(tmp_path / "other")
    pair = ("--against", tmp_path / "other", "--activation", activation)
    done = train(model, tmp_path / "run", *pair, "-q")
    assert done.exit_code == 0, done.output
    folder = tmp_path / "run" / "sae"
    made = load_dictionary(folder)
    assert (made.sources, made.features, made.score_norm) == (2, 64, "sum")
    base, chat = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert base["ce"] != chat["ce"]
    assert base["l0"] == chat["l0"]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    first, last = (json.loads(lines[place])["fvu"] for place in (0, -1))
    assert last < first
    options = ("--model", model, *pair[:2], "--site", 1, "--context", 32, "--rows", 20, "-q")
    found = run("eval", folder, *options, "--out", tmp_path / "eval.html")
    assert found.exit_code == 0, found.output
    line = re.search(r"^fvu +([0-9.]+) +([0-9.]+)$", found.stdout, re.MULTILINE)
    assert float(line[2]) == pytest.approx(chat["fvu"], rel=0.2)  # of other rows
    look = run("inspect", folder, *options, "--out", tmp_path / "l.html", "--count", 2)
    assert look.exit_code == 0, look.output


def test_crosscoders_that_cannot_be_are_refused(model, tmp_path):
    other = open_model(model).model
    other.save_pretrained(tmp_path / "same")
    other.resize_token_embeddings(390)
    other.save_pretrained(tmp_path / "smaller")
    done = train(model, tmp_path / "run", "--against", tmp_path / "smaller", "-q")
    assert "against: expected a vocabulary of 400, got 390" in done.stderr
    done = train(model, tmp_path / "run", "--against", tmp_path / "same", "-q")
    assert "activation: expected one of relu, batchtopk for 2 models, got 'topk'" in done.stderr


def test_the_same_command_goes_on(model, tmp_path):
    first = train(model, tmp_path, "-q")
    before = (tmp_path / "sae" / "sae_weights.safetensors").read_bytes()
    again = train(model, tmp_path, "-q")
    assert again.exit_code == 0, again.output
    assert again.stdout == first.stdout
    assert (tmp_path / "sae" / "sae_weights.safetensors").read_bytes() == before
    other = train(model, tmp_path, "--seed", 1)
    assert other.exit_code == 1
    assert "is of another run (seed differ)" in other.stderr


@pytest.mark.parametrize(
    ("activation", "kind"),
    [
        ("relu", ReLU),
        ("batchtopk", JumpReLU),
        ("jumprelu", JumpReLU),
        ("gated", Gated),
        ("groupmax", None),
    ],
)
def test_every_activation_is_trained_and_saved(activation, kind, model, tmp_path):
    options = ("--cache", tmp_path / "kept") if activation == "relu" else ()
    if activation == "batchtopk":
        options = ("--widths", "16,64", "--bfloat16")
    done = train(model, tmp_path / "run", "--activation", activation, "-q", *options)
    assert done.exit_code == 0, done.output
    sae = load_dictionary(tmp_path / "run" / "sae")
    assert sae.features == 64
    assert kind is None or type(sae.activation) is kind
    assert bool(options) or not (tmp_path / "kept").exists()


def test_text_of_ones_own(model, tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("\n\n".join(f"{i} green bottles hanging on the wall" for i in range(400)))
    done = train(model, tmp_path / "run", "--text", text, "--read", "4k", "-q")
    assert done.exit_code == 0, done.output
    opened = open_model(model, text=str(text), context=32)
    rows = len(opened.heldout) + len(opened.train)
    assert len(opened.heldout) == rows // 20
    shared = {tuple(r) for r in opened.train.tolist()} & {tuple(r) for r in opened.heldout.tolist()}
    assert not shared
    both = open_model(model, text=str(text), heldout=str(text), context=32)
    assert torch.equal(both.train, both.heldout)
    with pytest.raises(ValueError, match="text: expected at least 20 rows"):
        open_model(model, text=str(text), context=300, tokens=1)


BAD = [
    (("--activation", "softmax"), "activation: expected one of relu, topk.*got 'softmax'"),
    (("--site", "9"), "site: expected a block below 2, got 9"),
    (("--tokens", "many"), "expected a number as 500, 20k or 2.5M, got 'many'"),
    (("--text", "nothing.txt"), "text: expected a file, hf:NAME or pocket, got nothing.txt"),
    (("--widths", "16,32"), "widths: expected the last to be the 64 latents"),
]


@pytest.mark.parametrize(("options", "sentence"), BAD, ids=str)
def test_bad_input_is_one_sentence(options, sentence, model, tmp_path):
    done = train(model, tmp_path, *options)
    assert done.exit_code == 1
    assert re.search(sentence, done.stderr), done.stderr
    assert "Traceback" not in done.output


def test_a_model_that_is_not_there_is_named(tmp_path):
    place = tmp_path / "none"
    sentence = f"model: expected pocket, a folder or a hub id, got {re.escape(str(place))}: "
    with pytest.raises(ValueError, match=sentence):
        load_model(str(place))


def test_other_models_need_a_text_and_dictionaries_a_place(model, tmp_path):
    done = run("train", "--model", "google/gemma-2-2b", "--out", tmp_path)
    assert "text: expected a source of text for google/gemma-2-2b, got none" in done.stderr
    from gemma_ext.integrations.saelens import save_saelens

    save_saelens(SparseAutoencoder(32, 8, TopK(2)), tmp_path / "bare")
    done = run("eval", tmp_path / "bare", "--model", model, "--context", 32)
    assert "site: expected --site, since" in done.stderr


def test_counts():
    assert [count(t) for t in ("500", "20k", "2.5M", "1B")] == [500, 20_000, 2_500_000, 10**9]
    for text in ("", "0", "-3", "1.5", "k", "x"):
        with pytest.raises(ValueError, match="expected a number as 500"):
            count(text)


def test_new_dictionaries():
    a, b = (new_dictionary(8, 20, "topk", 3, seed=s) for s in (0, 0))
    assert torch.equal(a.decoder, b.decoder)
    assert a.unit_norm
    assert not torch.equal(new_dictionary(8, 20, "topk", 3, seed=1).decoder, a.decoder)
    relu = new_dictionary(8, 20, "relu", 3)
    torch.testing.assert_close(relu.decoder.norm(dim=-1), torch.full((20,), 0.1))
    assert not relu.unit_norm


@pytest.mark.slow
def test_example_trains_saves_loads_and_steers(model, tmp_path):
    import typer

    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script_app = typer.Typer()
    script_app.command()(script.main)
    options = ("--model", model, "--out", tmp_path / "x", "--site", 1, "--features", 64, "--k", 4)
    done = CliRunner().invoke(script_app, [str(o) for o in (*options, "--tokens", "20k")])
    assert done.exit_code == 0, (done.output, done.exception)
    shares = [
        float(s) for s in re.findall(r": fires on ([0-9.]+)% of the tokens that", done.stdout)
    ]
    assert len(shares) == 2
    assert (tmp_path / "x" / "latents.html").exists()
    assert load_dictionary(tmp_path / "x" / "sae").activation == TopK(4)
