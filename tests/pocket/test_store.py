"""Made once, checked on every load, taken up where it stopped."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gemma_ext.pocket import load, load_text, store
from gemma_ext.pocket.cache import cache_dir


def test_load_trains_once_and_reads_the_same_afterwards(tiny_size, monkeypatch):
    first = load(tiny_size, show_progress=False)
    monkeypatch.setattr(store, "train", None)
    second = load(tiny_size, show_progress=False)
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(first.train_ids, second.train_ids)
    assert first.report == second.report
    assert not first.model.training
    assert len(first.report["losses"]) == 6
    assert first.report["heldout_tokens"] % 32 == 0


def test_load_refuses_a_changed_file(tiny_size):
    load(tiny_size, show_progress=False)
    (weights,) = cache_dir().rglob("model.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ValueError, match=r"model\.safetensors: expected sha256"):
        load(tiny_size, show_progress=False)


def test_load_goes_on_after_an_interruption(tiny_size, tiny, monkeypatch, tmp_path):
    expected = load(tiny_size, show_progress=False)
    monkeypatch.setenv("GEMMA_EXT_CACHE", str(tmp_path / "other"))

    def interrupted(*args, **options):
        original(*args, **options, stop_after=3)
        raise KeyboardInterrupt

    original = store.train
    monkeypatch.setattr(store, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load(tiny_size, show_progress=False)
    assert not list(cache_dir().rglob("manifest.json"))

    seen = []
    monkeypatch.setattr(store, "train", lambda *a, **o: seen.append(o) or original(*a, **o))
    got = load(tiny_size, show_progress=False)
    assert seen[0]["checkpoint"].name == "training.safetensors"
    assert got.report["losses"] == expected.report["losses"]
    for a, b in zip(expected.model.parameters(), got.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not list(cache_dir().rglob("*.partial"))


def test_text_needs_no_training(tiny_size, monkeypatch):
    monkeypatch.setattr(store, "train", None)
    text = load_text(tiny_size)
    assert text.tokenizer.decode(text.train_ids[:40]).startswith("<bos>")
    assert int(text.train_ids.max()) < len(text.tokenizer)


def test_the_folder_is_one_that_transformers_reads(tiny_size):
    pocket = load(tiny_size, show_progress=False)
    (manifest,) = cache_dir().rglob("manifest.json")
    model = AutoModelForCausalLM.from_pretrained(manifest.parent)
    tokenizer = AutoTokenizer.from_pretrained(manifest.parent)
    assert torch.equal(model.lm_head.weight, pocket.model.lm_head.weight)
    assert tokenizer("import os").input_ids == pocket.tokenizer("import os").input_ids
    report = json.loads(manifest.read_text())["report"]
    assert report["heldout_perplexity"] == pocket.report["heldout_perplexity"]


def test_a_missing_package_is_named_with_its_remedy(tiny_size, monkeypatch):
    monkeypatch.setattr(store, "_PACKAGES", ("transformers", "no_such_package"))
    remedy = r"the pocket needs no_such_package: pip install 'gemma_ext\[hf\]'"
    for call in (load, load_text):
        with pytest.raises(ImportError, match=remedy):
            call(tiny_size)


@pytest.mark.exhaustive
@pytest.mark.timeout(1500)  # pocket_nano trains where no cache has it
def test_nano_beats_the_bigram_model(pocket_nano):
    report = pocket_nano.report
    assert report["heldout_tokens"] > 20_000
    assert report["heldout_perplexity"] < 0.9 * report["bigram_perplexity"]
    assert report["losses"][-1] < report["losses"][0] / 1.5
