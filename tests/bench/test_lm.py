"""The scoring benchmark on a tiny model: what is asked, what is compared, what is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import transformers

pytest.importorskip("lm_eval")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import bench_lm

V = 320


@pytest.fixture
def model():
    torch.manual_seed(0)
    return transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(
            vocab_size=V, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        )
    ).eval()  # fmt: skip


@pytest.fixture
def tokenizer(pocket_nano):
    return pocket_nano.tokenizer


@pytest.mark.parametrize("name", bench_lm.CASES)
def test_requests_are_those_of_the_case(name):
    case = bench_lm.CASES[name]
    asked = bench_lm.requests_of(case, bench_lm.zipf_ids(V))
    assert len(asked) == case.prompts * case.options
    for place, (_, context, tokens) in enumerate(asked):
        assert len(context) in range(max(1, 3 * case.context // 4), case.context + 1)
        assert len(tokens) in range(case.tokens[0], case.tokens[1] + 1)
        assert context == asked[place // case.options * case.options][1]
        assert all(0 <= token < V for token in context + tokens)
    assert asked == bench_lm.requests_of(case, bench_lm.zipf_ids(V))


def test_rows_of_both(model, tokenizer):
    asked = bench_lm.requests_of(bench_lm.Case(3, 2, (1, 4), 12), bench_lm.zipf_ids(V))
    hf, ours = bench_lm.run_case(model, tokenizer, asked, "fp32", batch=2, tokens=64, seconds=0.0)
    assert (hf["name"], ours["name"]) == bench_lm.ORDER
    assert hf["error"] == 0.0 < ours["error"] < 1e-5
    assert ours["same_greedy"] == 1.0
    for row in (hf, ours):
        assert row["rate"] * row["total"] == pytest.approx(
            sum(len(c) + len(t) for _, c, t in asked)
        )
    assert ours["x_hf"] > 0
    assert (ours["bars"], ours["note"]) == ("", "")


def test_a_wide_vocabulary_has_a_bar(model, tokenizer, monkeypatch):
    monkeypatch.setattr(bench_lm, "WIDE", V)
    asked = bench_lm.requests_of(bench_lm.Case(2, 2, (1, 4), 12), bench_lm.zipf_ids(V))
    _, ours = bench_lm.run_case(model, tokenizer, asked, "fp32", batch=2, tokens=64, seconds=0.0)
    assert "x tokens/s of hf, 1.5 asked, " in ours["bars"]


def test_wrong_scores_have_no_time(model, tokenizer, monkeypatch):
    right = bench_lm.GemmaExtLM._loglikelihood_tokens
    monkeypatch.setattr(
        bench_lm.GemmaExtLM,
        "_loglikelihood_tokens",
        lambda self, asked, **_: [(value + 1, greedy) for value, greedy in right(self, asked)],
    )
    asked = bench_lm.requests_of(bench_lm.Case(2, 2, (1, 4), 12), bench_lm.zipf_ids(V))
    _, ours = bench_lm.run_case(model, tokenizer, asked, "fp32", batch=2, tokens=64, seconds=0.0)
    assert ours["note"].startswith("RED: off by ")
    assert "total" not in ours


def test_text_comes_piece_by_piece(tokenizer):
    ids = bench_lm.text_ids(tokenizer)
    first, second = ids(7), ids(5)
    assert (len(first), len(second)) == (7, 5)
    assert first != second


def test_the_command_prints_and_saves(model, tokenizer, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench_lm, "build", lambda *_: (model, tokenizer, bench_lm.zipf_ids(V)))
    monkeypatch.setattr(bench_lm, "RESULTS", tmp_path)
    monkeypatch.setitem(bench_lm.CASES, "letters", bench_lm.Case(2, 2, (1, 1), 8))
    words = ["bench_lm.py", "--cases", "letters", "--batch", "2", "--seconds", "0", "--save"]
    monkeypatch.setattr(sys, "argv", [*words, "--dtype", "fp32"])
    with pytest.raises(SystemExit, match="0"):
        bench_lm.main()
    (page,) = tmp_path.rglob("lm.md")
    for text in (capsys.readouterr().out, page.read_text()):
        assert "gemma2-2x32-V320 fp32, letters, batches of 2" in text
        assert "| gemma_ext |" in text
