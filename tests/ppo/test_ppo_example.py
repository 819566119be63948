"""The example: its rewards, and a run of each critic from options to page."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from ppo_tiny import tiny_model, tokenizer

SCRIPT = Path(__file__).resolve().parents[2] / "python_examples" / "ppo.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("ppo_example", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_rewards_are_shares_of_words(example):
    texts = ["The cat, an owl", "the the", "", "word"]
    assert example.articles(texts) == [5.0, 10.0, 0.0, 0.0]
    assert example.distinct(texts) == [1.0, 0.5, 0.0, 1.0]


def test_prompts_are_the_beginnings_of_docstrings(example):
    found = example.prompts(4)
    assert len(found) == len(set(found)) > 60
    assert all(len(prompt.split()) == 4 for prompt in found)


@pytest.mark.parametrize(
    ("critic", "lora", "used"), [("", 0, "copy"), ("shared", 0, "shared"), ("", 2, "adapter")]
)
def test_a_run_ends_in_a_page(example, tmp_path, capsys, monkeypatch, critic, lora, used):
    if lora:
        pytest.importorskip("peft")
    monkeypatch.setattr(example, "prompts", lambda: ["w3 w4", "w5", "w6 w7", "w8"])
    tiny_model().save_pretrained(tmp_path / "tiny")
    tokenizer().save_pretrained(tmp_path / "tiny")
    capsys.readouterr()
    example.main(
        model=str(tmp_path / "tiny"), device="cpu", dtype="float32", out=tmp_path / "out",
        advantage="gae", lora=lora, critic=critic, steps=2, batch=4, length=3, rate=1e-3,
        value_rate=1e-3, kl=0.1, seed=0,
    )  # fmt: skip
    assert "val/explained_variance" in capsys.readouterr().out
    lines = (tmp_path / "out" / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    html = (tmp_path / "out" / "report.html").read_text()
    assert "explained variance" in html
    assert f"<td>critic</td><td>{used}</td>" in html
